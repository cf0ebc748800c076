"""Splits the packed row over the ranks of a context group, and exchanges heads for rows around attention.

Input: a batch whose row of T tokens is a multiple of N ranks, and the `ContextGroup` of this rank.
Output: a `RowPart`: the T/N rows that this rank computes. Everything in a decoder but attention works on single tokens.
Example: 16,384 tokens on 4 ranks with 8 query heads and 2 key heads. Rank 1 holds the rows 4,096 to 8,191. For
attention it gets all 16,384 rows of the query heads 2 and 3, and of a copy of the first key head, which they read.

Communication: in each layer, an all-to-all of queries, of keys and of values before attention, and one of its output
after it; in the backward the same ones for the gradients (DeepSpeed-Ulysses: Jacobs et al., arXiv 2309.14509, section
3). So rmcore's kernels compute whole rows of fewer heads: shared prompts, windows, sinks and pruning work unchanged.

Every rank computes the loss of the whole row from all rewards, but the backward of the gather hands each rank only the
gradients of its own rewards. So a rank's gradients are the part of the group that its rows contribute, and the sum over
the ranks, which every strategy forms in any case, is the gradient of the loss.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rmcore.data.batches.batch import RaggedBatch


@dataclass(frozen=True)
class ContextGroup:
    """The `size` ranks that compute one packed row together; this one is number `rank` of them."""

    group: dist.ProcessGroup | None
    rank: int
    size: int

    def exchange(self, values_N: Tensor) -> Tensor:
        """[N, ...] -> [N, ...]: entry r goes to rank r, entry s comes from rank s."""
        values_N = values_N.contiguous()
        received_N = torch.empty_like(values_N)
        dist.all_to_all_single(received_N, values_N, group=self.group)
        return received_N

    def gather(self, values: Tensor) -> Tensor:
        """[t, ...] -> [N * t, ...], the values of all ranks."""
        values = values.contiguous()
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values, group=self.group)
        return torch.cat(parts)


@dataclass(frozen=True)
class RowPart:
    """The rows of one packed row that this rank computes.

    Attributes:
        tokens: T, of the whole row.
        scored_a: int64 [a], the scored rows of this rank, counted from its first row. All ranks have equally many:
            where a rank has fewer, its row 0 fills up.
        scored_Na: int64 [N * a], the same of all ranks, counted from the first row of the whole row.
        place_A: int64 [A], where each answer is in `scored_Na`.
    """

    ranks: ContextGroup
    tokens: int
    scored_a: Tensor
    scored_Na: Tensor
    place_A: Tensor

    @classmethod
    def of(cls, batch: RaggedBatch, ranks: ContextGroup) -> "RowPart":
        """Raises ValueError if the row cannot be cut into equal parts: see `build_batch`."""
        tokens, device = batch.computed_tokens, batch.input_ids_T.device
        if tokens % ranks.size:
            raise ValueError(f"a row of {tokens} tokens cannot be cut into {ranks.size} equal parts")
        own = tokens // ranks.size
        rank_A, row_A = np.divmod(batch.last_rows_A, own)
        # Answers are numbered within their rank, in their order: `number_A`. The fullest rank sets the number of slots.
        number_A = np.tril(rank_A[:, None] == rank_A, -1).sum(1)
        slots = int(number_A.max(initial=0)) + 1
        scored_NA = np.zeros((ranks.size, slots), dtype=np.int64)
        scored_NA[rank_A, number_A] = row_A
        whole_NA = scored_NA + own * np.arange(ranks.size)[:, None]
        arrays = (scored_NA[ranks.rank], whole_NA.reshape(-1), rank_A * slots + number_A)
        return cls(ranks, tokens, *(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays))

    @property
    def rows(self) -> slice:
        """The rows of this rank."""
        own = self.tokens // self.ranks.size
        return slice(self.ranks.rank * own, (self.ranks.rank + 1) * own)

    def rewards(self, rewards_a: Tensor) -> Tensor:
        """The rewards [A] of the whole row on every rank, from those of this rank's scored rows [a]."""
        return _GatherOwn.apply(rewards_a, self.ranks).index_select(0, self.place_A)

    def whole(self, values_t: Tensor) -> Tensor:
        """[T, ...] on every rank, from the [T/N, ...] of each; not differentiable."""
        return self.ranks.gather(values_t.detach())


class SplitHeads:
    """How the H query heads and G key heads of a layer are divided over the ranks of a group.

    Each rank gets the same number of neighboring query heads and the key heads that they read. Where there are fewer
    key heads than ranks, ranks share a head, and each gets a copy. Where H is not a multiple of the ranks, every query
    head gets its own key head, and heads of zeros fill up, whose output is dropped.
    """

    def __init__(self, ranks: ContextGroup, heads: int, groups: int) -> None:
        self._ranks, self._heads = ranks, heads
        size = ranks.size
        self._filled = -(-heads // size) * size  # query heads, with those of zeros
        fitting = (count for count in range(groups, heads + 1, groups) if count % size == 0 and heads % count == 0)
        self._repeat = next(fitting, heads) // groups

    def queries(self, query_tHK: Tensor) -> Tensor:
        """All rows of this rank's query heads, from all query heads of this rank's rows."""
        return self._to_heads(query_tHK)

    def keys(self, key_tGK: Tensor) -> Tensor:
        """The same for keys or values."""
        return self._to_heads(key_tGK.repeat_interleave(self._repeat, 1) if self._repeat > 1 else key_tGK)

    def per_head(self, values_H: Tensor | None) -> Tensor | None:
        """The numbers of this rank's query heads, from one for each query head."""
        if values_H is None:
            return None
        return F.pad(values_H, (0, self._filled - self._heads)).chunk(self._ranks.size)[self._ranks.rank]

    def back(self, out_ThV: Tensor) -> Tensor:
        """All query heads of this rank's rows, from all rows of this rank's query heads."""
        out_NthV = _Exchange.apply(out_ThV.unflatten(0, (self._ranks.size, -1)), self._ranks)
        return out_NthV.transpose(0, 1).flatten(1, 2)[:, : self._heads]

    def _to_heads(self, values_tHK: Tensor) -> Tensor:
        missing = self._filled - values_tHK.shape[1] if self._filled != self._heads else 0
        if missing:
            values_tHK = F.pad(values_tHK, (0, 0, 0, missing))
        values_NthK = values_tHK.unflatten(1, (self._ranks.size, -1)).transpose(0, 1)
        return _Exchange.apply(values_NthK, self._ranks).flatten(0, 1)


class _Exchange(torch.autograd.Function):
    """[N, ...] -> [N, ...]: entry r goes to rank r, entry s comes from rank s. Its backward is the same exchange."""

    @staticmethod
    def forward(ctx: Any, values_N: Tensor, ranks: ContextGroup) -> Tensor:
        ctx.ranks = ranks
        return ranks.exchange(values_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.exchange(grads[0]), None


class _GatherOwn(torch.autograd.Function):
    """[a] -> [N * a], the values of all ranks; each rank gets back the gradient of its own values, once."""

    @staticmethod
    def forward(ctx: Any, values_a: Tensor, ranks: ContextGroup) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(values_a)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].chunk(ctx.ranks.size)[ctx.ranks.rank], None
