"""FSDP2 (`fully_shard`): ZeRO-2, ZeRO-3 and HSDP.

The story of its communication: every rank keeps 1/ranks of each weight, its gradient and its AdamW state, all fp32. In
the forward a layer's weights are all-gathered (in bf16 when that is the precision), one layer ahead of the compute.
ZeRO-3 frees them again after each layer and gathers them once more in the backward, where each layer's gradients are
reduce-scattered in fp32 (mean over ranks) while earlier layers compute; so a rank never holds more than some layers,
and pays for it with each micro batch. ZeRO-2 keeps the weights until the backward of the step's last micro batch
(`reshard_after_forward=False`) and scatters gradients there alone: less is sent, for 2 bytes a parameter, and, when
a step is several micro batches, 4 more for gradients that add up unsharded. The optimizer then works on the local
shards alone. HSDP is ZeRO-3 within each host, where links are fast; over the hosts every shard is replicated and its
gradient all-reduced once, with the last micro batch.

Layers are sharded one by one; what is left (embedding, final norm, score head) is the root's, gathered with its
forward, so the fused op meets a whole score weight.

No rank ever holds the whole model: it is built on the meta device, and each rank reads its own rows of every weight
(`materialise`). The start-up self-test runs on a copy that is sharded too, in fp32; its rows are then the strategy's.
With `parallel.offload` weights, gradients and AdamW live in host memory; layers visit the GPU one by one.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from rmcore.config import Config
from rmcore.model.attention import compile_layers
from rmcore.model.backbone import decoder_layers
from rmcore.model.lazy_model import LazyModel
from rmcore.model.reward_model import RewardModel
from rmcore.parallel.optim import adamw_arguments, parameter_groups
from rmcore.parallel.placement import held
from rmcore.parallel.strategy import gradient_norms
from rmcore.parallel.world import World

Weights = dict[str, nn.Parameter]  # this rank's rows of each, as DTensors


def shard(
    model: nn.Module, mesh: DeviceMesh, *, half: bool = False, reshard_after_forward: bool = True, offload: bool = False
) -> FSDPModule:
    """Split every weight over the mesh by its first dimension: each decoder layer by itself, the rest with the root."""
    # Weights in half precision make the activations so; margins and pair weights in the batch must stay fp32.
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if half else None
    arguments: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": policy or MixedPrecisionPolicy(cast_forward_inputs=False),
        "reshard_after_forward": reshard_after_forward,
        "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy(),
    }
    for layer in decoder_layers(model):
        fully_shard(layer, **arguments)
    return fully_shard(model, **arguments)


@torch.no_grad()
def materialise(model: nn.Module, outline: LazyModel, device: torch.device, prefix: str = "") -> Weights:
    """Give a sharded model on meta the rows that this rank holds, and return them.

    Args:
        device: of the rows: the CPU when they are offloaded.
        prefix: what transformers calls the engine's `backbone`; none for a model with transformers' own names.
    Raises:
        UserError: a file cannot be read.
    """
    weights: Weights = {name: _empty_rows(p, device) for name, p in model.named_parameters()}
    take_over(model, weights)
    wanted = {}
    for name, weight in weights.items():
        assert isinstance(weight, DTensor)
        theirs = f"{prefix}.{name.removeprefix('backbone.')}" if prefix and name.startswith("backbone.") else name
        wanted[theirs] = (held(weight).row, weight.to_local())
    outline.fill(wanted)
    return weights


def _empty_rows(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device=device))


def take_over(model: nn.Module, weights: Weights) -> None:
    """Make the rows those of a model that is sharded over the same mesh."""
    model.load_state_dict(weights, strict=False, assign=True)


def sharded_for_test(
    model: RewardModel, outline: LazyModel, mesh: DeviceMesh, world: World, *, offload: bool = False
) -> Weights:
    """Shard a model for the self-test: fp32 arithmetic, its single texts through FSDP's hooks. Returns its rows."""
    shard(model, mesh, offload=offload)
    register_fsdp_forward_method(model, "reward_alone")
    device = torch.device("cpu") if offload else world.device
    return materialise(model, outline, device, model.backbone.base_model_prefix)


class FullySharded:
    """Strategy `zero2`; `zero3` with `reshard_after_forward`; `hsdp` with `by_host` too; see `Strategy`.

    `weights`: the rows of `model`, which then lies on meta; without them it holds its weights whole.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    adamw: torch.optim.Optimizer
    adamw_is_split = False

    def __init__(
        self,
        config: Config,
        model: RewardModel,
        world: World,
        *,
        mesh: DeviceMesh,
        weights: Weights | None = None,
    ) -> None:
        self.mesh, self._world, self._offload = mesh, world, config.parallel.offload
        self._frees = config.parallel.strategy != "zero2"  # neither weights nor gradients are ever whole on a rank
        if weights is None:
            model = model.to(world.device)
        if config.parallel.compile:
            compile_layers(model.backbone)
        self._sharded = shard(
            model,
            mesh,
            half=config.parallel.precision == "bf16",
            reshard_after_forward=self._frees,
            offload=self._offload,
        )
        if weights is not None:
            take_over(model, weights)
        self.model = model
        groups = parameter_groups(self.model.parameters(), config.optim)
        self.optimizer = self.adamw = torch.optim.AdamW(groups, **adamw_arguments(config.optim))
        self._parameters = list(self.model.parameters())

    @contextmanager
    def gradient_sync(self, enabled: bool) -> Iterator[None]:
        if self._frees:
            self._sharded.set_requires_all_reduce(enabled)
        else:
            self._sharded.set_requires_gradient_sync(enabled)
            # Between the micro batches of a step the gathered weights may stay: they do not change.
            self._sharded.set_reshard_after_backward(enabled)
        yield

    def autocast(self) -> AbstractContextManager:
        return nullcontext()  # the MixedPrecisionPolicy casts

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        self.grad_norms_P = gradient_norms(self._parameters).to(self._world.device)
        square = self.grad_norms_P.square().sum()
        dist.all_reduce(square, group=self.mesh.get_group("shard"))  # with hsdp every host has the same gradients
        norm = square.sqrt()
        if max_norm > 0:
            nn.utils.clip_grads_with_norm_(self._parameters, max_norm, norm)
        return norm

    def named_parameters(self) -> dict[str, nn.Parameter]:
        # After an evaluation ZeRO-2 still has the gathered weights registered, in bf16: copies that the optimizer does
        # not know. The shards are the weights.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return dict(self.model.named_parameters())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

    def whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.state_dict().items():
            whole = self._gathered(tensor.detach())
            yield name, whole.cpu() if self._world.is_main else whole.new_empty(0)

    def _gathered(self, tensor: Tensor) -> Tensor:
        """A collective."""
        if not isinstance(tensor, DTensor):
            return tensor
        if self._offload and self._world.device.type != "cpu":  # gathered where the mesh's group works
            local, shape = tensor.to_local().to(self._world.device), tensor.shape
            tensor = DTensor.from_local(local, self.mesh, tensor.placements, shape=shape, stride=tensor.stride())
        return tensor.full_tensor()
