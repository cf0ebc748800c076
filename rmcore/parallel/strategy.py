"""The interface between the training loop and the way in which ranks share the work.

Input: a reward model and a config (see `rmcore.parallel.make`).
Output: a `Strategy`: the wrapped model, its optimizer, and the methods that the loop calls.
Example: in a step of two micro batches the loop enters `gradient_sync(False)`, then `gradient_sync(True)`. DDP reduces
the gradients only in the second one.

The loop and the model do not know about ranks. Precision belongs to the strategy: DDP and ZeRO-1 use autocast, FSDP2
casts by its own policy; never both.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from rmcore.parallel.ema import Ema

Weights = dict[str, nn.Parameter]  # this rank's rows of each weight, as DTensors


class Shards(NamedTuple):
    """The rows of every weight that this rank read for a model on meta, and the mesh over which they are split."""

    mesh: DeviceMesh
    weights: Weights


class Strategy(Protocol):
    """How ranks share the work. Every implementation is built as `Class(config, model, world, shards)`.

    Attributes:
        model: called as the reward model is.
        optimizer: updates the parameters of `model`.
        adamw: the AdamW inside `optimizer`, with this rank's state.
        adamw_is_split: True if `adamw` holds whole parameters of which no other rank has the state (ZeRO-1), and not
            every parameter, or this rank's part of every parameter.
        dtype: of the trained weights; no checkpoint holds them in another one.
        grad_norms_W: L2 norm of each gradient, as far as this rank holds it; set by `clip_grad_norm`.
        ema: the moving average of the weights, with optim.ema.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    adamw: torch.optim.Optimizer
    adamw_is_split: bool
    dtype: torch.dtype
    grad_norms_W: Tensor
    ema: Ema | None

    def gradient_sync(self, enabled: bool) -> AbstractContextManager:
        """Goes around the forward and backward of a micro batch. `enabled`: reduce gradients over ranks now (the last
        micro batch of the step); otherwise later.
        """

    def autocast(self) -> AbstractContextManager:
        """Goes around the forward and sets the configured precision."""

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Global L2 norm of the gradients over all ranks. AdamW's next step scales them down to `max_norm` (0: not)."""

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters (DTensors where they are sharded) under the reward model's names."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every whole weight under the reward model's names."""

    def whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields one whole weight after the other, on the CPU of rank 0; other ranks get empty tensors.

        A collective: every rank must iterate to the end. No rank holds more than one whole weight at a time.
        """


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_in_update(adamw: torch.optim.Optimizer, max_norm: float, norm: Tensor) -> None:
    """Make the next step of AdamW clip gradients whose global norm is `norm` to `max_norm` (0: not at all).

    nn.utils.clip_grads_with_norm_ multiplies the gradients by min(1, max_norm / (norm + 1e-6)), in a pass over all of
    them. AdamW divides each by the inverse, `grad_scale`, when it reads it anyway. `norm` is where the weights are.
    """
    scale = torch.clamp((norm + 1e-6) / max_norm, min=1.0) if max_norm > 0 else None
    adamw.grad_scale = scale  # type: ignore[attr-defined]


def gradient_norms(parameters: Sequence[nn.Parameter]) -> Tensor:
    """L2 norm of each gradient as far as this rank holds it, fp32 [W]; 0 where there is none."""
    grads = [None if p.grad is None else local(p.grad) for p in parameters]
    norms = iter(torch._foreach_norm([grad for grad in grads if grad is not None]))  # as nn.utils.get_total_norm does
    zero = torch.zeros((), device=parameters[0].device)
    return torch.stack([zero if grad is None else next(norms) for grad in grads])
