"""Packs comparisons into one micro batch: a row of tokens without padding, in which each prompt appears once.

Input: `TokenizedComparisons`, and the numbers of the comparisons that this rank computes together.
Output: a `RaggedBatch`: the row of T tokens, an `AttentionLayout` (which tokens see which), and the labels.
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

from rmcore.data.batches.answers import chosen_answers, first_answer_token
from rmcore.data.labels import LABEL_FIELDS, OFFSETS
from rmcore.data.tokens.comparisons import TokenizedComparison, TokenizedComparisons
from rmcore.ops.gather_prefix import GatherPlan, gather_plan, scored_plan
from rmcore.ops.tiled_attention import TilePlan, tile_plan


class Comparisons(Protocol):
    """Anything that returns tokenised comparisons by number."""

    def comparison(self, number: int) -> TokenizedComparison: ...


@dataclass(frozen=True)
class AttentionLayout:
    """Which tokens of a packed row see which.

    `segments_S4` (int32, CPU): (query_start, query_end, prefix_start, prefix_end), half open. The queries of a segment
    see all its prefix rows and, causally, its own rows. The segments of one comparison follow each other, and their
    query ranges tile the row. The lengths stay on the host, so attention never waits for the device to read them.
    """

    segments_S4: Tensor
    gather: GatherPlan | None = None  # for CUDA: which rows are the keys of each segment
    device_segments_S4: Tensor | None = None  # for CUDA: the segments where kernels can read them
    scored: GatherPlan | None = None  # for CUDA: which rows are the keys of each scored row
    tiles: TilePlan | None = None  # for CUDA: the same as `gather`, for attention with more terms
    scored_tiles: TilePlan | None = None  # for CUDA: the same as `scored`

    @cached_property
    def texts(self) -> list[list[int]]:
        """For each segment the packed rows of its whole text (prefix rows, then its own), as host lists."""
        return [
            [*range(prefix_start, prefix_end), *range(start, end)]
            for start, end, prefix_start, prefix_end in self.segments_S4.tolist()
        ]

    def for_varlen(self) -> "AttentionLayout":
        """The same layout with the index tensors that CUDA attention reads, still on the CPU."""
        gather, tiles = gather_plan(self.segments_S4), tile_plan(self.segments_S4)
        return replace(self, gather=gather, tiles=tiles, device_segments_S4=self.segments_S4)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "AttentionLayout":
        """The same layout with the tensors for CUDA changed; the segments for the host stay."""
        if self.device_segments_S4 is None:
            return self
        plans = {name: getattr(self, name) for name in ("gather", "scored", "tiles", "scored_tiles")}
        changed = {name: plan.mapped(change) for name, plan in plans.items() if plan is not None}
        return replace(self, device_segments_S4=change(self.device_segments_S4), **changed)

    def segments_on(self, device: torch.device) -> Tensor:
        """The segments in the memory of `device`. Raises ValueError if the batch was not made for that device."""
        if device.type == "cpu":
            return self.segments_S4
        if self.device_segments_S4 is None:
            raise ValueError(f"the segments are not on {device}: use RaggedBatch.on to move a batch")
        return self.device_segments_S4


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The labels of A answers as tensors: one or two for each entry of LABEL_FIELDS, which states their names.

    `winner_P`, `loser_P`, `tie_a_Q` and `tie_b_Q` (int64) are answers, 0 <= . < A. The numbers are fp32. `score_A` is
    NaN where the data have no score, `attribute_A` [A, W] where an attribute is unknown. `list_A` (int64) is the
    comparison of each answer, 0 <= . < C. `lists` counts the comparisons of the objective. Of a run with several
    objectives, the comparisons of the others have no labels, and no pairs.
    """

    winner_P: Tensor
    loser_P: Tensor
    margin_P: Tensor
    weight_P: Tensor
    tie_a_Q: Tensor
    tie_b_Q: Tensor
    tie_weight_Q: Tensor
    score_A: Tensor
    attribute_A: Tensor
    list_A: Tensor
    lists: int

    @classmethod
    def of(cls, data: TokenizedComparisons, objective: int = 0) -> "Judged":
        """The labels of a whole data set for an objective; answers are counted from the first of the data set."""
        own_N = data.of_objective(objective)
        columns = []
        for label in LABEL_FIELDS:
            counts = np.diff(getattr(data, OFFSETS[label.of]))
            first, own = np.repeat(data.answer_offset[:-1], counts), np.repeat(own_N, counts)
            arrays = [getattr(data, array) for array in label.arrays]
            if label.wide and not data.width:
                arrays = [np.zeros((len(own), 0), dtype=label.dtype)]
            if label.of == "answers":
                shown = own[:, None] if label.wide else own
                columns.append([np.where(shown, array, np.float32(label.missing)) for array in arrays])
            else:
                columns.append([(first + array if label.is_pair else array)[own] for array in arrays])
        answers = np.repeat(np.arange(len(data)), np.diff(data.answer_offset))
        return cls(**_tensors(columns), list_A=_int64(answers), lists=int(own_N.sum()))


@dataclass(frozen=True, kw_only=True)
class RaggedBatch(Judged):
    """One micro batch on one rank, and the labels of its answers.

    `last_token_index_A` are packed rows, `last_rows_A` the same on the host. `comparisons_C` and `answers_C` (on the
    host): which comparisons these are, and how many answers each has. `logical_tokens`: what a batch of separate texts
    would compute. `length_A` (fp32): tokens of each answer behind the prompt. `language_row_M`, `language_token_M`
    (only with loss.sft): packed rows, and the token of a chosen answer (rmcore.data.batches.answers) that follows each.
    `parts`: with several objectives the labels for each of them; else empty.
    """

    input_ids_T: Tensor
    position_ids_T: Tensor
    last_token_index_A: Tensor
    layout: AttentionLayout
    last_rows_A: np.ndarray
    comparisons_C: np.ndarray
    answers_C: np.ndarray
    logical_tokens: int
    length_A: Tensor
    language_row_M: Tensor | None = None
    language_token_M: Tensor | None = None
    parts: tuple[Judged, ...] = ()

    def of_objective(self, number: int) -> Judged:
        """The labels for one of the objectives."""
        return self.parts[number] if self.parts else self

    @property
    def computed_tokens(self) -> int:
        return self.input_ids_T.numel()

    def answer_rows(self) -> list[list[int]]:
        """For each answer the packed rows of its text, in order. It ends at the scored token, also within a segment."""
        texts = {row: rows for rows in self.layout.texts for row in rows}  # a prefix row: of any text that begins so
        return [[row for row in texts[last] if row <= last] for last in self.last_rows_A.tolist()]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "RaggedBatch":
        parts = tuple(replace(part, **_mapped(part, change)) for part in self.parts)
        return replace(self, layout=self.layout.mapped(change), parts=parts, **_mapped(self, change))

    def filled(self, rows: int) -> "RaggedBatch":
        """The batch with so many more rows, which no other row reads: copies of the first token, in a segment of their
        own. Experts get no token that is not in the batch, and no embedding of positions needs more rows.
        """
        if not rows:
            return self
        tokens = self.computed_tokens
        more = torch.tensor([[tokens, tokens + rows, tokens, tokens]], dtype=torch.int32)
        return replace(
            self,
            input_ids_T=torch.cat([self.input_ids_T, self.input_ids_T[:1].expand(rows)]),
            position_ids_T=torch.cat([self.position_ids_T, self.position_ids_T[:1].expand(rows)]),
            layout=AttentionLayout(torch.cat([self.layout.segments_S4, more])),
        )

    def with_varlen(self) -> "RaggedBatch":
        """The batch with the index tensors that CUDA attention reads. Without answers row 0 counts as scored."""
        rows_A = self.last_rows_A if len(self.last_rows_A) else np.zeros(1, dtype=np.int64)
        layout = self.layout.for_varlen()
        scored, tiles = scored_plan(layout.segments_S4, rows_A), tile_plan(layout.segments_S4, rows_A)
        return replace(self, layout=replace(layout, scored=scored, scored_tiles=tiles))

    def pin_memory(self) -> "RaggedBatch":
        return self.mapped(Tensor.pin_memory)

    def to(self, device: torch.device) -> "RaggedBatch":
        """The batch on `device`, copied without waiting when it is pinned; the segments stay on the host."""
        return self.mapped(lambda t: t.to(device, non_blocking=True))

    def on(self, device: torch.device) -> "RaggedBatch":
        """The batch on `device`, with the index tensors that attention reads there.

        A copy from memory that is not pinned would wait until a GPU has computed all that came before.
        """
        return (self.with_varlen().pin_memory() if device.type == "cuda" else self).to(device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`; the host does not wait for a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def build_batch(
    data: Comparisons,
    numbers: Sequence[int] | np.ndarray,
    share: bool = True,
    *,
    language: bool = False,
    multiple: int = 1,
) -> RaggedBatch:
    """Packs the comparisons `numbers` of `data` into one row, with their prefixes shared or (share=False) repeated.

    `language`: with the tokens of the chosen answers. `multiple`: the row is filled up to a multiple of so many tokens
    by a segment that nothing reads, so that as many ranks can compute equal parts of it (rmcore.model.row_split).

    Without comparisons the batch is one token that no answer and no pair reads. Its loss is 0 and its gradients are
    zeros, so a rank that has nothing to do in this micro batch still takes part in every collective.
    """
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[tuple[int, int, int, int]] = []
    last: list[int] = []
    lengths: list[int] = []
    language_rows: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    language_tokens: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    row = logical = 0
    items = [data.comparison(int(number)) for number in numbers]
    answers_C = np.array([len(item.tails) for item in items], dtype=np.int64)
    list_A = _int64(np.repeat(np.arange(len(items)), answers_C))
    width, losses = getattr(data, "width", 0), getattr(data, "losses", 1)

    def note_tokens(item: TokenizedComparison, answer: int, rows: np.ndarray) -> None:
        """`rows`: the packed rows of the answer's text. Each token of the answer is predicted at the row before it."""
        first = first_answer_token(item)
        language_rows.append(rows[first - 1 : -1])
        language_tokens.append(item.text(answer)[first:])

    for item in items:
        prefix_start, prefix_length = row, len(item.prefix)
        chosen = set(chosen_answers(item.pairs).tolist()) if language else ()
        for k, tail in enumerate(item.tails):
            logical += prefix_length + len(tail)
            lengths.append(prefix_length + len(tail) - min(item.prompt_length, prefix_length))
            own = k > 0 and share  # the segment of this answer is only its tail, and sees the prefix of the first
            if own and len(tail) == 0:  # the answer is a prefix of the others: its last token is in the shared part
                last.append(prefix_start + prefix_length - 1)
                if k in chosen:
                    note_tokens(item, k, np.arange(prefix_start, prefix_start + prefix_length))
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
            if k in chosen:
                before = prefix_start if own else start
                own_rows = np.arange(row - len(tail), row)
                note_tokens(item, k, np.concatenate([np.arange(before, before + prefix_length), own_rows]))
    if not segments:
        ids, positions, segments = [np.zeros(1, dtype=np.int64)], [np.zeros(1, dtype=np.int64)], [(0, 1, 0, 0)]
        row = 1
    if filling := -row % multiple:
        ids.append(np.zeros(filling, dtype=np.int64))
        positions.append(np.arange(filling))
        segments.append((row, row + filling, row, row))
    return RaggedBatch(
        input_ids_T=_int64(np.concatenate(ids)),
        position_ids_T=_int64(np.concatenate(positions)),
        last_token_index_A=_int64(np.array(last, dtype=np.int64)),
        last_rows_A=np.array(last, dtype=np.int64),
        **_tensors(_label_columns(items, answers_C, width)),
        list_A=list_A,
        lists=len(items),
        layout=AttentionLayout(torch.tensor(segments, dtype=torch.int32).reshape(-1, 4)),
        comparisons_C=np.asarray(numbers, dtype=np.int64),
        answers_C=answers_C,
        logical_tokens=logical,
        length_A=torch.from_numpy(np.array(lengths, dtype=np.float32)),
        language_row_M=_int64(np.concatenate(language_rows)) if language else None,
        language_token_M=_int64(np.concatenate(language_tokens)) if language else None,
        parts=tuple(
            Judged(
                **_tensors(_label_columns([_seen_by(number, item) for item in items], answers_C, width)),
                list_A=list_A,
                lists=sum(item.objective == number for item in items),
            )
            for number in range(losses if losses > 1 else 0)
        ),
    )


def _seen_by(objective: int, item: TokenizedComparison) -> TokenizedComparison:
    return item if item.objective == objective else item.without_labels()


def _mapped(holder: Judged, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    values = {field.name: getattr(holder, field.name) for field in fields(holder)}
    return {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}


def _label_columns(items: Sequence[TokenizedComparison], answers_C: np.ndarray, width: int) -> list[list[np.ndarray]]:
    """For each entry of LABEL_FIELDS its one or two arrays, of all comparisons; answers are counted in the batch."""
    first_C = np.cumsum(answers_C) - answers_C
    columns = []
    for label in LABEL_FIELDS:
        values = [label.values(item, label.view, len(item.tails), width) for item in items]
        if label.wide:
            columns.append([np.concatenate([np.zeros((0, width), dtype=label.dtype), *values])])
        elif label.is_pair:
            values = [pairs + first for pairs, first in zip(values, first_C, strict=True)]
            columns.append([*np.concatenate([np.zeros((0, 2), dtype=np.int64), *values]).T])
        else:
            columns.append([np.concatenate([np.zeros(0, dtype=label.dtype), *values])])
    return columns


def _tensors(columns: Sequence[Sequence[np.ndarray]]) -> dict[str, Any]:
    """The tensors of a batch, copies of `columns`: for each entry of LABEL_FIELDS its one or two arrays."""
    return {
        name: torch.from_numpy(array.astype(np.int64 if label.is_pair else np.float32))
        for label, arrays in zip(LABEL_FIELDS, columns, strict=True)
        for name, array in zip(label.tensors, arrays, strict=True)
    }


def _int64(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
