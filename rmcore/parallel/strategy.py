"""What every strategy offers to the loop, and which one the config asks for.

A strategy wraps the model and makes its optimizer; the loop and the model do not know of ranks. Precision belongs to
the strategy: DDP and ZeRO-1 run under autocast, FSDP2 casts by its own policy; never both.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rmcore.config import Config


class Strategy(Protocol):
    """How ranks share the work. `model` is called as the reward model is; `optimizer` steps its parameters.

    `adamw`: the AdamW inside `optimizer` that holds this rank's state; `adamw_is_split`: of whole parameters that no
    other rank has state of (ZeRO-1), and not of every parameter, or of this rank's part of every parameter.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    adamw: torch.optim.Optimizer
    adamw_is_split: bool
    grad_norms_P: Tensor

    def gradient_sync(self, enabled: bool) -> AbstractContextManager:
        """Around forward and backward of a micro batch: reduce gradients over ranks now (the last one) or later."""

    def autocast(self) -> AbstractContextManager:
        """Around the forward: the arithmetic that the config asks for."""

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Global L2 norm of the gradients over all ranks, before they are scaled down to `max_norm` (0: not scaled)."""

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters (DTensors where they are sharded) under the reward model's names."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight under the reward model's names."""

    def whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """One weight after the other, whole, on the CPU of rank 0; empty on other ranks. A collective: every rank goes
        through all of them, and no rank holds more than one.
        """


def is_sharded(config: Config) -> bool:
    """Whether the strategy splits the weights, so that they need not be whole anywhere."""
    return config.parallel.strategy in ("zero2", "zero3", "hsdp")


def gradient_norms(parameters: Sequence[nn.Parameter]) -> Tensor:
    """L2 norm of each gradient as far as this rank holds it, fp32 [P]; 0 where there is none."""
    local = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters]
    norms = iter(torch._foreach_norm([grad for grad in local if grad is not None]))  # as nn.utils.get_total_norm does
    zero = torch.zeros((), device=parameters[0].device)
    return torch.stack([zero if grad is None else next(norms) for grad in local])
