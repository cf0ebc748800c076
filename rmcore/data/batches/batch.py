"""Comparisons in, one packed micro batch out.

Enters: `TokenizedComparisons` and the numbers of the comparisons that this rank computes together.
Leaves: a `RaggedBatch`: one row of T tokens without padding, and an `AttentionLayout` that says who sees whom.

Example: prompt [5 6 7], answers [8 9] and [4]. Shared, the row is [5 6 7 | 8 9 | 4] with positions [0 1 2 | 3 4 | 3],
segments (0, 5, 0, 0) and (5, 6, 0, 3), last tokens [4, 5]. Packed without sharing it is [5 6 7 8 9 | 5 6 7 4].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rmcore.data.tokens.comparisons import TokenizedComparisons
from rmcore.ops.gather_prefix import GatherPlan, gather_plan


class TokenizedComparison(Protocol):
    """What a batch needs to know of a comparison: int arrays of tokens, [p, 2] pairs, [p] margins and weights, [q, 2]
    ties and [q] weights of them, a score of each answer (NaN: none)."""

    @property
    def prefix(self) -> np.ndarray: ...
    @property
    def tails(self) -> list[np.ndarray]: ...
    @property
    def pairs(self) -> np.ndarray: ...
    @property
    def margin(self) -> np.ndarray: ...
    @property
    def weight(self) -> np.ndarray: ...
    @property
    def ties(self) -> np.ndarray: ...
    @property
    def tie_weight(self) -> np.ndarray: ...
    @property
    def score(self) -> np.ndarray: ...


class Comparisons(Protocol):
    """Anything that gives tokenised comparisons by number."""

    def comparison(self, number: int) -> TokenizedComparison: ...


@dataclass(frozen=True)
class AttentionLayout:
    """Who sees whom in a packed row.

    `segments_S4` (int32, CPU): (query_start, query_end, prefix_start, prefix_end), half open. The queries of a segment
    see all its prefix rows and, causally, its own rows. The segments of one comparison stand together, and their query
    ranges tile the row. The lengths stay on the host: attention never waits for the device to learn them.
    """

    segments_S4: Tensor
    gather: GatherPlan | None = None  # for CUDA: which rows are the keys of each segment
    device_segments_S4: Tensor | None = None  # for CUDA: the segments where kernels can read them

    @cached_property
    def texts(self) -> list[list[int]]:
        """For each segment the packed rows of its whole text (prefix rows, then its own), as host lists."""
        return [
            [*range(prefix_start, prefix_end), *range(start, end)]
            for start, end, prefix_start, prefix_end in self.segments_S4.tolist()
        ]

    def for_varlen(self) -> "AttentionLayout":
        """The same layout with the index tensors that CUDA attention reads, still on the CPU."""
        return replace(self, gather=gather_plan(self.segments_S4), device_segments_S4=self.segments_S4)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "AttentionLayout":
        """The same layout with the tensors for CUDA changed; the segments for the host stay."""
        if self.gather is None or self.device_segments_S4 is None:
            return self
        return replace(self, gather=self.gather.mapped(change), device_segments_S4=change(self.device_segments_S4))

    def segments_on(self, device: torch.device) -> Tensor:
        """The segments where the device can read them: those that came with the batch, or the host's for the CPU."""
        if device.type == "cpu":
            return self.segments_S4
        if self.device_segments_S4 is None:
            raise ValueError(f"the segments are not on {device}: use RaggedBatch.on to move a batch")
        return self.device_segments_S4


@dataclass(frozen=True)
class RaggedBatch:
    """One micro batch on one rank. T packed tokens, A answers, P pairs, Q ties, C comparisons.

    `winner_P`, `loser_P`, `tie_a_Q`, `tie_b_Q` are answers of this batch (0 <= . < A); `last_token_index_A` are packed
    rows; `score_A` is what the data say of each answer, NaN where they say nothing. `comparisons_C`
    and `answers_C` (host) say which comparisons these are and how many answers each has; `logical_tokens` is what a
    batch of separate texts would compute.
    """

    input_ids_T: Tensor
    position_ids_T: Tensor
    last_token_index_A: Tensor
    winner_P: Tensor
    loser_P: Tensor
    margin_P: Tensor
    weight_P: Tensor
    tie_a_Q: Tensor
    tie_b_Q: Tensor
    tie_weight_Q: Tensor
    score_A: Tensor
    layout: AttentionLayout
    comparisons_C: np.ndarray
    answers_C: np.ndarray
    logical_tokens: int

    @property
    def computed_tokens(self) -> int:
        return self.input_ids_T.numel()

    @property
    def lists(self) -> int:
        """Comparisons: what an objective on whole rankings counts."""
        return len(self.answers_C)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "RaggedBatch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, layout=self.layout.mapped(change), **tensors)

    def with_varlen(self) -> "RaggedBatch":
        return replace(self, layout=self.layout.for_varlen())

    def pin_memory(self) -> "RaggedBatch":
        return self.mapped(Tensor.pin_memory)

    def to(self, device: torch.device) -> "RaggedBatch":
        """The batch on `device`, copied without waiting when it is pinned; the segments stay on the host."""
        return self.mapped(lambda t: t.to(device, non_blocking=True))

    def on(self, device: torch.device) -> "RaggedBatch":
        """The batch on `device`, with the index tensors that attention reads there."""
        return (self.with_varlen() if device.type == "cuda" else self).to(device)


@dataclass(frozen=True)
class Judgements:
    """What the data say of all their answers, numbered from the first comparison's first; as in `RaggedBatch`."""

    winner_P: Tensor
    loser_P: Tensor
    margin_P: Tensor
    weight_P: Tensor
    tie_a_Q: Tensor
    tie_b_Q: Tensor
    tie_weight_Q: Tensor
    score_A: Tensor
    lists: int

    @classmethod
    def of(cls, data: TokenizedComparisons) -> "Judgements":
        first_N = data.answer_offset[:-1]
        first_P, first_Q = np.repeat(first_N, data.pairs_N), np.repeat(first_N, np.diff(data.tie_offset))
        numbers = (data.margin, data.weight, data.tie_weight, data.score)
        margin_P, weight_P, tie_weight_Q, score_A = (torch.from_numpy(x.astype(np.float32)) for x in numbers)
        return cls(
            _int64(first_P + data.winner), _int64(first_P + data.loser), margin_P, weight_P,
            _int64(first_Q + data.tie_a), _int64(first_Q + data.tie_b), tie_weight_Q, score_A, len(data),
        )  # fmt: skip


def build_batch(data: Comparisons, numbers: Sequence[int] | np.ndarray, share: bool = True) -> RaggedBatch:
    """Packs the comparisons `numbers` of `data` into one row, with their prefixes shared or (share=False) repeated.

    With no comparisons the batch is one token that no answer and no pair reads: its loss is 0 and its gradients are
    zeros, so a rank that has nothing to do in this micro batch still takes part in every collective.
    """
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[tuple[int, int, int, int]] = []
    last: list[int] = []
    row = logical = 0
    items = [data.comparison(int(number)) for number in numbers]
    answers_C, judged = _judged(items)
    for item in items:
        prefix_start, prefix_length = row, len(item.prefix)
        for k, tail in enumerate(item.tails):
            logical += prefix_length + len(tail)
            own = k > 0 and share  # this answer's segment holds its tail alone and sees the prefix of the first
            if own and len(tail) == 0:  # the answer is a prefix of the others: its last token lies in the shared part
                last.append(prefix_start + prefix_length - 1)
                continue
            start = row
            if not own:
                ids.append(item.prefix)
                positions.append(np.arange(prefix_length))
                row += prefix_length
            ids.append(tail)
            positions.append(np.arange(prefix_length, prefix_length + len(tail)))
            row += len(tail)
            prefix = (prefix_start, prefix_start + prefix_length) if own else (start, start)
            segments.append((start, row, *prefix))
            last.append(row - 1)
    if not segments:
        ids, positions, segments = [np.zeros(1, dtype=np.int64)], [np.zeros(1, dtype=np.int64)], [(0, 1, 0, 0)]
    return RaggedBatch(
        input_ids_T=_int64(np.concatenate(ids)),
        position_ids_T=_int64(np.concatenate(positions)),
        last_token_index_A=_int64(np.array(last, dtype=np.int64)),
        **judged,
        layout=AttentionLayout(torch.tensor(segments, dtype=torch.int32).reshape(-1, 4)),
        comparisons_C=np.asarray(numbers, dtype=np.int64),
        answers_C=answers_C,
        logical_tokens=logical,
    )


def _judged(items: Sequence[TokenizedComparison]) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Answers of each comparison [C], and what the data say of them, in the numbering of the batch."""
    answers_C = np.array([len(item.tails) for item in items], dtype=np.int64)
    first_C = np.cumsum(answers_C) - answers_C
    none, nothing = np.zeros((0, 2), dtype=np.int64), np.zeros(0, dtype=np.float32)
    pairs_P2 = np.concatenate([none, *(item.pairs + first for item, first in zip(items, first_C, strict=True))])
    ties_Q2 = np.concatenate([none, *(item.ties + first for item, first in zip(items, first_C, strict=True))])
    numbers = {"margin_P": "margin", "weight_P": "weight", "tie_weight_Q": "tie_weight", "score_A": "score"}
    tensors = {
        field: torch.from_numpy(np.concatenate([nothing, *(getattr(item, name) for item in items)]).astype(np.float32))
        for field, name in numbers.items()
    }
    tensors |= {"winner_P": _int64(pairs_P2[:, 0]), "loser_P": _int64(pairs_P2[:, 1])}
    return answers_C, {**tensors, "tie_a_Q": _int64(ties_Q2[:, 0]), "tie_b_Q": _int64(ties_Q2[:, 1])}


def _int64(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
