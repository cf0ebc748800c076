"""DDP, and ZeRO-1 on top of it.

Input: a whole reward model on every rank.
Output: the strategy `ddp` or `zero1`.
Example: 2.8b parameters on 8 ranks. Under ddp each rank sends about 20 GB of gradients per step. Under zero1 each rank
keeps 2.8 GB of AdamW's averages instead of 22 GB.

Communication: every rank holds all weights. During the backward of the last micro batch of a step, DDP all-reduces the
gradients (fp32, mean over ranks) in buckets, while earlier layers still compute. The micro batches before it only add
to the local gradients. Then every rank clips by the same norm and makes the same AdamW update. With ZeRO-1
(ZeroRedundancyOptimizer) each rank keeps AdamW's state of its own share of the parameters, updates these, and
broadcasts them. This costs one more pass over the weights and saves 8 * (1 - 1/ranks) bytes per parameter.

DDP averages over ranks, so the loop multiplies the summed loss by world size / global weight: the local sums are added
over ranks and divided once. One rank needs no wrapping.

With `model.weights=bf16` the gradients are fp32 too: see rmcore/parallel/reduction.py, which takes the place of DDP. So
it does on GPUs in bf16, where the model computes with copies of the fp32 weights (rmcore/parallel/half_copies.py).
"""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from rmcore.config import Config
from rmcore.host.memory import keep_freed_memory, return_freed_memory
from rmcore.model.reward_model import RewardModel
from rmcore.parallel.ema import Ema
from rmcore.parallel.half_copies import HalfCopies
from rmcore.parallel.optim import adamw_arguments, adamw_class, parameter_groups, trained_dtype, trained_in_bf16
from rmcore.parallel.reduction import GradientReduction
from rmcore.parallel.strategy import Shards, clip_in_update, gradient_norms
from rmcore.parallel.world import World


class DataParallel:
    """The strategies `ddp` and `zero1`; see `rmcore.parallel.strategy.Strategy`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    adamw: torch.optim.Optimizer
    dtype: torch.dtype
    ema: Ema | None = None

    def __init__(self, config: Config, model: RewardModel, world: World, shards: Shards | None = None) -> None:
        assert shards is None, "every rank needs the whole model"
        self._inner, self._world = model.to(world.device), world
        self.dtype = trained_dtype(config)
        if world.device.type == "cpu":
            return_freed_memory() if saves_memory(config) else keep_freed_memory()
        self._reduction: GradientReduction | None = None
        in_bf16 = config.model.trains_bf16
        self._copies = HalfCopies(self._inner) if config.computes_with_copies(cuda=_is_cuda(world)) else None
        if in_bf16:
            trained_in_bf16(self._inner)
            for parameter in self._inner.parameters():
                parameter.grad_dtype = torch.float32
        own_reduction = in_bf16 or self._copies is not None
        if own_reduction and world.size > 1:
            trained = {name: p for name, p in self._inner.named_parameters() if p.requires_grad}
            sums = [self._copies.weights[name] for name in trained] if self._copies else list(trained.values())
            self._reduction = GradientReduction(list(trained.values()), sums, world.size)
        self._half = config.parallel.bf16 and not own_reduction  # bf16 weights and copies need no casts
        self.model = self._inner if world.size == 1 or own_reduction else self._replicate()
        self._parameters = list(self.named_parameters().values())
        groups = parameter_groups(self.named_parameters(), config.optim)
        arguments = adamw_arguments(config.optim)
        adamw = adamw_class(config, self.named_parameters())
        self.adamw_is_split = config.parallel.traits.shards_optimizer and world.size > 1
        if self.adamw_is_split:
            optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=adamw, **arguments)  # type: ignore[arg-type]
            self.optimizer, self.adamw = optimizer, optimizer.optim
        else:
            self.optimizer = self.adamw = adamw(groups, **arguments)

    def _replicate(self) -> DistributedDataParallel:
        device_ids = [self._world.device] if self._world.device.type == "cuda" else None
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch < 2.13
        arguments: dict[str, Any] = {"gradient_as_bucket_view": True, buffers: False}
        if self._inner.skips_weights:  # DDP then looks for them in every graph, in place of waiting for all gradients
            arguments["find_unused_parameters"] = True
        return DistributedDataParallel(self._inner, device_ids=device_ids, **arguments)

    def gradient_sync(self, enabled: bool) -> AbstractContextManager:
        if self._reduction:
            return self._reduction.around(last=enabled)
        if enabled or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def autocast(self) -> AbstractContextManager:
        if self._copies:
            self._copies.refresh()
        return torch.autocast(self._world.device.type, dtype=torch.bfloat16, enabled=self._half)

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        if self._copies:
            self._copies.changing()  # the update follows
        self.grad_norms_W = gradient_norms(self._parameters)
        norm = torch.linalg.vector_norm(self.grad_norms_W)
        clip_in_update(self.adamw, max_norm, norm)
        return norm

    def named_parameters(self) -> dict[str, nn.Parameter]:
        if self._copies:
            self._copies.changing()  # whoever reads a checkpoint or exchanges averages asks first
            return dict(self._copies.weights)
        return dict(self._inner.named_parameters())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._inner.state_dict().items()}

    def whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        state = self._copies.state_dict(self._inner) if self._copies else self._inner.state_dict()
        for name, tensor in state.items():
            yield name, tensor.detach().cpu() if self._world.is_main else tensor.new_empty(0)


def _is_cuda(world: World) -> bool:
    return world.device.type == "cuda"


def saves_memory(config: Config) -> bool:
    """Whether memory counts for more than page faults (rmcore.host.memory): something is stored in fewer bits, LoRA
    trains little of the model, or ranks divide rows that are too long for one.
    """
    formats = {config.model.weights, config.optim.states}
    return formats != {"fp32"} or config.model.lora.rank is not None or config.parallel.context > 1
