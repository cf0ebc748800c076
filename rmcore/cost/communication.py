"""Predicts what the ranks send in a step, over which links, and which computation can hide it.

Input: strategy, parameters, ranks and hosts, micro batches per step.
Output: the `Collective`s of one rank.
Example: zero2 in bf16, 2.8b parameters on 8 GPUs of one host: 4.6 GB of weights are gathered during the forward,
9.3 GB of gradients are scattered during the backward.

In a ring all-reduce of S bytes over n ranks, each rank sends 2 (n - 1)/n S; in an all-gather or a reduce-scatter half
of that (Patarasu and Yuan 2009; Rajbhandari et al., arXiv 1910.02054, section 7). On hosts with g GPUs and one network
port per GPU, g rings run in parallel and each leaves the host through another port, so 1/g of what a rank sends goes
over the network.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from rmcore.config import Config
from rmcore.cost.dry_run import Sizes
from rmcore.cost.formats import BASE
from rmcore.cost.machines import LINK_SHARE, Machine

FORWARD, BACKWARD, NOTHING = "forward", "backward", "nothing"  # what can hide a collective


@dataclass(frozen=True)
class Collective:
    """One collective operation of a step.

    within, between: bytes that a rank sends each time to ranks of its host, and to other hosts.
    behind: FORWARD or BACKWARD, which computes at the same time; or NOTHING.
    times: how often it runs in a step.
    """

    what: str
    within: float
    between: float
    behind: str
    times: int = 1

    def seconds(self, machine: Machine) -> float:
        """Duration of one time. Both links work at once, at LINK_SHARE of their rates. 0 where the rate is unknown."""
        if not machine.within:
            return 0.0
        return max(self.within / machine.within, self.between / machine.between) / LINK_SHARE


def collectives(
    config: Config, model: Sizes, ranks: int, hosts: int, micro_batches: int, passes: int = 2
) -> list[Collective]:
    """Everything that one rank sends in a step; nothing on one rank.

    passes: through each layer in a micro batch: 2, forward and backward; 3 with recompute.
    """
    return list(_collectives(config, model, ranks, hosts, micro_batches, passes)) if ranks > 1 else []


def _collectives(
    config: Config, model: Sizes, ranks: int, hosts: int, micro_batches: int, passes: int
) -> Iterator[Collective]:
    base = config.model.lora.base
    by_fsdp = model.total + model.adapters - (model.adapted if base != "fp32" else 0)
    gradients, weights = 4.0 * model.trained, (2.0 if config.parallel.bf16 else 4.0) * by_fsdp
    updated = (2.0 if config.model.trains_bf16 else 4.0) * model.trained
    local, traits = ranks // hosts, config.parallel.traits
    if not traits.shards_weights:
        yield _ring("all-reduce gradients", 2 * gradients, ranks, local, BACKWARD)
        if traits.shards_optimizer:
            yield _ring("broadcast weights", updated, ranks, local, NOTHING)
        return
    group = local if traits.by_host else ranks  # ranks that share one state
    times = micro_batches if traits.gathers_each_micro_batch else 1
    yield _ring("gather weights", weights, group, local, FORWARD, times)
    if traits.gathers_each_micro_batch:  # freed after the forward
        yield _ring("gather weights again", weights, group, local, BACKWARD, times)
    if base != "fp32":  # each layer waits for the codes of its weight, in each pass (rmcore/model/frozen.py)
        codes = BASE[base] * model.adapted
        yield _ring("gather the stored base", codes, group, local, NOTHING, passes * micro_batches)
    yield _ring("scatter gradients", gradients, group, local, BACKWARD, times)
    if traits.by_host:
        yield _ring("all-reduce gradients between hosts", 2 * gradients / local, hosts, 1, BACKWARD)


def exchange(model: Sizes, precision: str, tokens: float, context: int, local: int, passes: int) -> list[Collective]:
    """What a rank sends in a step to the ranks of its context group, for its `tokens` (rmcore/model/row_split.py).

    local: ranks per host; neighboring ranks form a group. passes: 2, forward and backward; 3 with recompute.
    Keys and values are counted with as many heads as queries, which is more than grouped queries send.
    """
    if context == 1:
        return []
    layer = 4 * tokens * model.width * (2.0 if precision == "bf16" else 4.0)  # queries, keys, values, output
    here = min(context, local)
    sent = passes * model.layers * layer / context
    return [Collective("exchange heads", sent * (here - 1), sent * (context - here), NOTHING)]


def _ring(what: str, size: float, ranks: int, local: int, behind: str, times: int = 1) -> Collective:
    """A ring over `ranks`, `local` of them on each host. `size`: bytes of the tensor, twice that for an all-reduce."""
    sent = size * (ranks - 1) / ranks
    if ranks <= local:
        return Collective(what, sent, 0.0, behind, times)
    return Collective(what, sent * (local - 1) / local, sent / local, behind, times)
