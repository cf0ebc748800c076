"""Linear layers whose weight is not trained, stored in 16, 8 or 4 bits: the base of LoRA under `model.lora.base`.

Input: a linear layer. Output: a layer that computes the same with the numbers that the stored codes stand for.
Example: a weight [4096, 4096] takes 67 MB in fp32, 34 MB as bf16, 17 MB as int8 and 9.4 MB as nf4.

Each forward and each backward restores the weight, in the dtype of the arithmetic, and drops it again: the graph keeps
the codes. Under zero2, zero3 and hsdp each rank keeps its part of the codes (`shard`), and gathers the codes of one
weight at a time. So the self-test computes in fp32, and bf16 training in bf16, from the same numbers.

Source: QLoRA (Dettmers et al., arXiv 2305.14314); the formats are bitsandbytes' (rmcore.ops.blockwise).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

from rmcore.ops.blockwise import restored, stored_as


class FrozenLinear(nn.Module):
    """What `layer` (nn.Linear, or transformers' Conv1D) computes, from a weight stored as `kind`: bf16, int8 or nf4."""

    codes: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Module, kind: str) -> None:
        super().__init__()
        weight: Tensor = layer.weight  # type: ignore[assignment]
        self.shape, self.transposed = tuple(weight.shape), not isinstance(layer, nn.Linear)
        codes, scale = stored_as(kind, weight.cpu())
        self.register_buffer("codes", codes.to(weight.device))
        self.register_buffer("scale", scale.to(weight.device))
        self.bias: nn.Parameter | None = layer.bias  # type: ignore[assignment]

    @property
    def weight(self) -> Tensor:
        """The whole weight in fp32, a new tensor; peft's DoRA reads it."""
        return self.restored(torch.float32)

    def restored(self, dtype: torch.dtype) -> Tensor:
        """The whole weight, a new tensor; a collective if the codes are sharded."""
        codes, scale = (t.full_tensor() if isinstance(t, DTensor) else t for t in (self.codes, self.scale))
        return restored(codes, scale, self.shape, dtype)

    def shard(self, mesh: DeviceMesh, placements: list[Placement]) -> None:
        """Keep this rank's part of codes and scales, as every rank of the mesh does; all ranks hold the same ones."""
        for name in ("codes", "scale"):
            # No rank sends anything: each one has the whole tensor.
            setattr(self, name, distribute_tensor(getattr(self, name), mesh, placements, src_data_rank=None))

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        out: Tensor = _Product.apply(x.to(dtype), self)
        return out if self.bias is None else out + self.bias.to(dtype)


class _Product(torch.autograd.Function):
    """x W^T, where W is restored in the forward and again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        weight = layer.restored(x.dtype)
        return F.linear(x, weight.T if layer.transposed else weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        layer: FrozenLinear = ctx.layer
        weight = layer.restored(grad.dtype)
        return grad @ (weight.T if layer.transposed else weight), None
