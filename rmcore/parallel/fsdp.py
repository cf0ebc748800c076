"""FSDP2 (`fully_shard`): ZeRO-2, ZeRO-3 and HSDP.

Input: a reward model, whole on every rank, or on the meta device with this rank's rows of every weight.
Output: the strategy `zero2`, `zero3` or `hsdp`.
Example: `q_proj.weight` [5, 4] under zero3 on 2 ranks: rank 0 keeps rows 0 to 2, rank 1 keeps rows 3 and 4.

Communication: every rank keeps 1/ranks of each weight, of its gradient and of its AdamW state, all fp32. In the forward
the weights of a layer are all-gathered (in bf16 if that is the precision), one layer ahead of the compute.
- ZeRO-3 frees them after each layer and gathers them again in the backward. There it reduce-scatters the gradients of
  each layer in fp32 (mean over ranks) while earlier layers compute. A rank never holds more than a few whole layers,
  but every micro batch pays for the communication.
- ZeRO-2 keeps the gathered weights until the backward of the last micro batch (`reshard_after_forward=False`) and
  reduce-scatters gradients only there. It sends less. It needs 2 more bytes per parameter, and 4 more for unsharded
  gradients if a step has several micro batches.
- HSDP is ZeRO-3 within each host, where links are fast. Every host holds a replica of each shard, and the gradients of
  the replicas are all-reduced once per step, with the last micro batch.
The optimizer works on the local shards only.

Each decoder layer is sharded by itself; layers that share weights, together. The rest (embedding, final norm, score
head) belongs to the root module and is gathered with its forward, so the fused op receives the whole score weight. A
router that transformers keeps in fp32 is gathered by itself too, without a cast.

No rank ever holds the whole model: it is built on the meta device, and each rank reads its own rows of every weight
(`materialise`). The self-test at the start runs on a sharded copy in fp32, whose rows the strategy then takes over.
With `model.weights=bf16` the shards are bf16, and need no cast before they are gathered. Gradients are reduced in fp32
as before; FSDP2 then rounds the result to the dtype of the weights, once per reduction. It is stored in fp32, so that
the sum over several micro batches is one of fp32 numbers.
A stored base of LoRA (`model.lora.base`) is split too: its codes are flat buffers, and each layer gathers those of one
weight in its forward and again in its backward (rmcore/model/frozen.py), under ZeRO-2 as under ZeRO-3.
With `parallel.offload`, weights, gradients and AdamW's state stay in host memory; the layers visit the GPU one by one.
"""

from collections.abc import Iterable, Iterator
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
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from rmcore.config import Config
from rmcore.model.backbone import decoder_layers
from rmcore.model.fp32_parts import fp32_modules
from rmcore.model.frozen import FrozenLinear
from rmcore.model.lazy_model import LazyModel
from rmcore.model.reward_model import RewardModel
from rmcore.parallel.ema import Ema
from rmcore.parallel.optim import (
    LocalAdamW,
    adamw_arguments,
    adamw_class,
    parameter_groups,
    trained_dtype,
    trained_in_bf16,
)
from rmcore.parallel.placement import held
from rmcore.parallel.strategy import Shards, Weights, clip_in_update, gradient_norms
from rmcore.parallel.world import World, device_mesh


def shard(
    model: nn.Module, mesh: DeviceMesh, *, half: bool = False, reshard_after_forward: bool = True, offload: bool = False
) -> FSDPModule:
    """Split every weight over the mesh by its first dimension: each decoder layer by itself, the rest with the root."""
    # Half-precision weights give half-precision activations. Margins and pair weights in the batch must stay fp32.
    uncast = MixedPrecisionPolicy(cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if half else uncast
    arguments: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": policy,
        "reshard_after_forward": reshard_after_forward,
        "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy(),
    }
    if half:
        for module in fp32_modules(model):
            fully_shard(module, **{**arguments, "mp_policy": uncast})
    for layers in _layer_groups(decoder_layers(model)):
        fully_shard(layers, **arguments)
    return fully_shard(model, **arguments)


def _layer_groups(layers: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """The layers one by one, but those that share weights, as Zamba's do, together: FSDP gathers a weight once."""
    groups: list[tuple[set[nn.Parameter], list[nn.Module]]] = []
    for layer in layers:
        weights, members = set(layer.parameters()), [layer]
        for group in [group for group in groups if group[0] & weights]:
            groups.remove(group)
            weights, members = weights | group[0], group[1] + members
        groups.append((weights, members))
    return [members for _, members in groups]


def shard_frozen(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split the stored base of LoRA over the ranks; under hsdp over those of a host."""
    placements: list[Placement] = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            module.shard(mesh, placements)


@torch.no_grad()
def materialise(model: nn.Module, lazy: LazyModel, device: torch.device, prefix: str = "") -> Weights:
    """Read this rank's rows into a sharded model on meta, and return them.

    Args:
        device: where the rows go: the CPU if they are offloaded.
        prefix: what transformers has in place of the engine's `backbone.`; empty for a model with its names.
    Raises:
        UserError: a file cannot be read.
    """
    weights: Weights = {
        name: nn.Parameter(torch.empty_like(parameter, device=device)) for name, parameter in model.named_parameters()
    }
    take_over(model, weights)
    wanted = {}
    for name, weight in weights.items():
        assert isinstance(weight, DTensor)
        theirs = f"{prefix}{name.removeprefix('backbone.')}" if prefix and name.startswith("backbone.") else name
        wanted[theirs] = (held(weight).row, weight.to_local())
    lazy.fill(wanted)
    return weights


def take_over(model: nn.Module, weights: Weights) -> None:
    """Put rows into a model that is sharded over the same mesh."""
    model.load_state_dict(weights, strict=False, assign=True)


def _in_bf16(weights: Weights) -> Weights:
    """The rows in bf16; the fp32 ones are freed one after the other."""
    for name in list(weights):
        weights[name] = nn.Parameter(weights[name].detach().to(torch.bfloat16), weights[name].requires_grad)
    return weights


def _keep_in_fp32(parameter: Tensor) -> None:
    """Make the reduced gradient fp32, so that those of later micro batches are added so."""
    if parameter.grad is not None and parameter.grad.dtype != torch.float32:
        parameter.grad = parameter.grad.float()


def sharded_for_test(model: RewardModel, lazy: LazyModel, mesh: DeviceMesh, world: World, *, offload: bool) -> Weights:
    """Shard a model on meta for the self-test, which computes in fp32, read this rank's rows and return them."""
    shard(model, mesh, offload=offload)
    register_fsdp_forward_method(model, "reward_alone")  # FSDP's hooks run around this method too
    device = torch.device("cpu") if offload else world.device
    return materialise(model, lazy, device, lazy.prefix())


def most(number: int) -> int:
    """The largest of the ranks' numbers; a collective of the CPU, which does not wait for the GPU."""
    found = torch.tensor(number)
    if dist.get_world_size() > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


class FullySharded:
    """The strategies `zero2`, `zero3` and `hsdp`; see `rmcore.parallel.strategy.Strategy`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    adamw: torch.optim.Optimizer
    ema: Ema | None = None
    adamw_is_split = False
    dtype: torch.dtype

    def __init__(self, config: Config, model: RewardModel, world: World, shards: Shards | None = None) -> None:
        self._world, self._offload = world, config.parallel.offload
        self._each_micro_batch = config.parallel.traits.gathers_each_micro_batch
        self.mesh = shards.mesh if shards else device_mesh(world, by_host=config.parallel.traits.by_host)
        self.dtype = trained_dtype(config)
        if shards is None:
            model = model.to(world.device)
        if config.model.trains_bf16:
            trained_in_bf16(model)
        self._sharded = shard(
            model,
            self.mesh,
            half=config.parallel.bf16,
            reshard_after_forward=self._each_micro_batch,
            offload=self._offload,
        )
        if shards:
            take_over(model, _in_bf16(shards.weights) if config.model.trains_bf16 else shards.weights)
        shard_frozen(model, self.mesh)
        model.most = most
        self.model = model
        self._parameters = list(self.model.parameters())
        # torch before 2.13 calls hooks while the gradient is still being copied to host memory.
        self._after_backward = config.model.trains_bf16 and self._offload
        if config.model.trains_bf16:
            for parameter in self._parameters:
                parameter.grad_dtype = None
                if not self._offload:
                    parameter.register_post_accumulate_grad_hook(_keep_in_fp32)
        named = dict(self.model.named_parameters())
        adamw = adamw_class(config, named, LocalAdamW)
        groups = parameter_groups(named, config.optim)
        self.optimizer = self.adamw = adamw(groups, **adamw_arguments(config.optim))

    @contextmanager
    def gradient_sync(self, enabled: bool) -> Iterator[None]:
        if self._each_micro_batch:
            self._sharded.set_requires_all_reduce(enabled)
        else:
            self._sharded.set_requires_gradient_sync(enabled)
            # The weights do not change between the micro batches of a step, so the gathered copies may stay.
            self._sharded.set_reshard_after_backward(enabled)
        yield
        if self._after_backward:
            for parameter in self._parameters:
                _keep_in_fp32(parameter)

    def autocast(self) -> AbstractContextManager:
        return nullcontext()  # the MixedPrecisionPolicy casts

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        self.grad_norms_W = gradient_norms(self._parameters).to(self._world.device)
        square = self.grad_norms_W.square().sum()
        dist.all_reduce(square, group=self.mesh.get_group("shard"))  # under hsdp every host has the same gradients
        norm = square.sqrt()
        # With parallel.offload AdamW runs on the CPU, and torch would not wait for the copy that it makes itself.
        clip_in_update(self.adamw, max_norm, norm.to(self._parameters[0].device))
        return norm

    def named_parameters(self) -> dict[str, nn.Parameter]:
        # After an evaluation, ZeRO-2 leaves the gathered bf16 copies registered as parameters. The optimizer does not
        # know them: the shards are the weights.
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
        """The whole tensor; a collective."""
        if not isinstance(tensor, DTensor):
            return tensor
        if self._offload and self._world.device.type != "cpu":  # the mesh's group gathers on the GPU
            local, shape = tensor.to_local().to(self._world.device), tensor.shape
            tensor = DTensor.from_local(local, self.mesh, tensor.placements, shape=shape, stride=tensor.stride())
        return tensor.full_tensor()
