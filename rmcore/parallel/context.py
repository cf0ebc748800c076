"""Forms the context groups: neighboring ranks that compute the same packed rows together.

Input: `parallel.context` and this process's `World`.
Output: the world with its groups, and the `ContextGroup` of this rank for the model.
Example: parallel.context=4 on 8 ranks: the ranks 0 to 3 and 4 to 7 are two groups. The plan gives each group other
comparisons, as it gives them to two ranks without groups. A comparison of 128,000 tokens takes 32,000 rows on a rank.

Communication: within a group, attention exchanges heads for rows (rmcore/model/row_split.py), and the rewards of the
few scored tokens are gathered. The strategies reduce gradients over all ranks, as without groups: each rank has the
part of its rows, the parts of all ranks sum to the gradient of the step, and the loss is still multiplied by the world
size. Neighboring ranks lie on one host, where links are fast.
"""

from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from rmcore.config import UserError
from rmcore.model.row_split import ContextGroup
from rmcore.parallel.world import World


def with_context(world: World, context: int) -> World:
    """The world in groups of `context` ranks. Raises UserError if the ranks do not divide into such groups."""
    if world.size % context:
        raise UserError(
            f"parallel.context={context}: {world.size} process{'es' if world.size > 1 else ''} cannot form groups of "
            f"{context}; start a multiple of {context}, or change parallel.context"
        )
    return replace(world, context=context)


def context_group(world: World) -> ContextGroup | None:
    """The group of this rank, or None where every rank computes whole rows; a collective."""
    if world.context == 1:
        return None
    ranks = torch.arange(world.size).view(-1, world.context).tolist()
    # Without a timeout of their own, new groups wait half an hour for a dead rank.
    group, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timedelta(seconds=world.timeout_seconds))
    return ContextGroup(group, world.rank % world.context, world.context)
