"""What a step sends, by link, and what it can hide behind.

Enters: strategy, parameters, ranks and hosts, micro batches a step. Leaves: `Transfer`s of one rank. Example: zero2 in
bf16, 2.8b parameters on 8 GPUs of one host: 4.6 GB gathered while the forward computes, 9.3 GB of gradients scattered
while the backward does.

A ring all-reduce of S bytes over n ranks makes each send 2 (n - 1)/n S, an all-gather or a reduce-scatter half of that
(Patarasu and Yuan 2009; Rajbhandari et al., arXiv 1910.02054, section 7). Over hosts of g GPUs with a port each, g
rings run side by side, and each leaves the host through another port: of what a rank sends, 1/g goes over the network.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from rmcore.config.parallel import TRAITS
from rmcore.cost.dry_run import Sizes
from rmcore.cost.machines import LINK_SHARE, Machine

FORWARD, BACKWARD, NOTHING = "forward", "backward", "nothing"


@dataclass(frozen=True)
class Transfer:
    """Bytes that a rank sends `times` a step: `within` its host, `between` hosts; `behind`: what computes meanwhile."""

    what: str
    within: float
    between: float
    behind: str
    times: int = 1

    def seconds(self, machine: Machine) -> float:
        """Of one time, at LINK_SHARE of the links' rates; both links work at once. 0 where no rate is known."""
        if not machine.within:
            return 0.0
        return max(self.within / machine.within, self.between / machine.between) / LINK_SHARE


def transfers(
    strategy: str, precision: str, model: Sizes, ranks: int, hosts: int, micro_batches: int
) -> list[Transfer]:
    """Everything that one rank sends in a step; nothing on one rank."""
    return list(_transfers(strategy, precision, model, ranks, hosts, micro_batches)) if ranks > 1 else []


def _transfers(
    strategy: str, precision: str, model: Sizes, ranks: int, hosts: int, micro_batches: int
) -> Iterator[Transfer]:
    gradients, weights = 4.0 * model.total, (2.0 if precision == "bf16" else 4.0) * model.total
    local, traits = ranks // hosts, TRAITS[strategy]
    if not traits.shards_weights:
        yield _ring("all-reduce gradients", 2 * gradients, ranks, local, BACKWARD)
        if traits.shards_optimizer:
            yield _ring("broadcast weights", gradients, ranks, local, NOTHING)
        return
    group = local if traits.by_host else ranks  # ranks that share one state
    times = micro_batches if traits.gathers_each_micro_batch else 1
    yield _ring("gather weights", weights, group, local, FORWARD, times)
    if traits.gathers_each_micro_batch:  # freed after the forward
        yield _ring("gather weights again", weights, group, local, BACKWARD, times)
    yield _ring("scatter gradients", gradients, group, local, BACKWARD, times)
    if traits.by_host:
        yield _ring("all-reduce gradients between hosts", 2 * gradients / local, hosts, 1, BACKWARD)


def _ring(what: str, size: float, ranks: int, local: int, behind: str, times: int = 1) -> Transfer:
    sent = size * (ranks - 1) / ranks
    if ranks <= local:
        return Transfer(what, sent, 0.0, behind, times)
    return Transfer(what, sent * (local - 1) / local, sent / local, behind, times)
