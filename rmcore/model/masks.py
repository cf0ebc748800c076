"""Shared prompts through a model's own attention: each comparison is a row of a rectangle, with a mask.

Input: a packed batch. Output: the grid [C, L] of its tokens, one comparison per row; and within `masked(grid)`, masks
in which each token sees the tokens of its own text only.
Example: the packed row [p0 p1 | a | b | q0 | c] of two comparisons becomes the rows [p0 p1 a b] and [q0 c . .]. In the
first row b sees p0 p1 b. With a sliding window of 2 it sees p1 b, because its position is 2, like that of a.

This serves architectures that compute attention in their own code (GPT-J, Bloom, Falcon), or that need a mask for more
than attention (sparse attention that selects keys). Transformers' mask functions make all their masks from a function
of the numbers of a query and a key; here it is called with their positions in the text. The rectangle costs padding,
and dense masks, but computes the prompt once.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from rmcore.data.batches.batch import RaggedBatch


@dataclass(frozen=True)
class Grid:
    """A packed row as a rectangle of C comparisons by L columns. Empty cells see themselves only."""

    row_CL: Tensor  # int64: the packed row of each cell, -1 for empty cells
    position_CL: Tensor  # int64: positions in the text
    start_CL: Tensor  # int64: the column where the segment of each cell begins
    prefix_start_CL: Tensor  # int64: the columns prefix_start .. prefix_end are also visible
    prefix_end_CL: Tensor

    @classmethod
    def of(cls, batch: RaggedBatch) -> "Grid":
        """The grid of a batch, on the batch's device. A comparison begins with a segment without prefix."""
        device = batch.input_ids_T.device
        segments = batch.layout.segments_S4.tolist()
        first = [place for place, segment in enumerate(segments) if segment[2] == segment[3]]
        rows = [segments[a:b] for a, b in zip(first, [*first[1:], len(segments)], strict=True)]
        longest = max(row[-1][1] - row[0][0] for row in rows)
        column_L = torch.arange(longest)
        row_CL = torch.full((len(rows), longest), -1)
        start_CL, prefix_start_CL, prefix_end_CL = column_L.repeat(3, len(rows), 1)
        for place, row in enumerate(rows):
            origin = row[0][0]
            row_CL[place, : row[-1][1] - origin] = torch.arange(origin, row[-1][1])
            for start, end, prefix_start, prefix_end in row:
                own = slice(start - origin, end - origin)
                start_CL[place, own] = start - origin
                prefix_start_CL[place, own], prefix_end_CL[place, own] = prefix_start - origin, prefix_end - origin
        row_CL = row_CL.to(device)
        position_CL = batch.position_ids_T[row_CL.clamp(min=0)].where(row_CL >= 0, column_L.to(device))
        return cls(row_CL, position_CL, *(x.to(device) for x in (start_CL, prefix_start_CL, prefix_end_CL)))

    def cells(self, rows_A: Tensor) -> Tensor:
        """The numbers of the cells of packed rows, in the flattened grid."""
        return (self.row_CL.flatten() >= 0).nonzero().squeeze(1)[rows_A]  # the grid is filled in the packed order

    def by_position(self, sees: Callable[..., Any]) -> Callable[..., Any]:
        """A mask function of columns: the key belongs to the text of the query, and `sees` their positions."""

        def visible(comparison: Any, head: Any, query: Any, key: Any) -> Any:
            own = (key >= self.start_CL[comparison, query]) & (key <= query)
            prompt = key >= self.prefix_start_CL[comparison, query]
            prompt = prompt & (key < self.prefix_end_CL[comparison, query])
            position = self.position_CL
            return (own | prompt) & sees(comparison, head, position[comparison, query], position[comparison, key])

        return visible


_GRID: ContextVar[Grid | None] = ContextVar("rmcore_grid", default=None)


@contextmanager
def masked(grid: Grid) -> Iterator[None]:
    """Forwards of the grid's tokens within use masks by its positions, once `prepare` has been called."""
    token = _GRID.set(grid)
    try:
        yield
    finally:
        _GRID.reset(token)


def prepare(backbone: nn.Module) -> None:
    """Let the masks and ALiBi biases that the architecture makes follow the grid. They stay as they are without one."""
    for name in ("sdpa", "eager"):
        original = ALL_MASK_ATTENTION_FUNCTIONS[name]
        if not hasattr(original, "rmcore"):
            AttentionMaskInterface.register(name, _masks_by_position(original))
    for module in {sys.modules.get(cls.__module__) for cls in type(backbone).__mro__}:
        build = getattr(module, "build_alibi_tensor", None)  # Bloom, Falcon
        if build is not None and not hasattr(build, "rmcore"):
            setattr(module, "build_alibi_tensor", _alibi_by_position(build))  # noqa: B010 (mypy knows no such name)


def _masks_by_position(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def mask(*arguments: Any, **keywords: Any) -> Any:
        if grid := _GRID.get():
            changed = {"mask_function": grid.by_position(keywords["mask_function"]), "allow_is_causal_skip": False}
            return original(*arguments, **{**keywords, **changed})
        return original(*arguments, **keywords)

    mask.rmcore = True  # type: ignore[attr-defined]
    return mask


def _alibi_by_position(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The bias [C * H, 1, L] of each key: that of the column that is its position."""

    @wraps(original)
    def alibi(*arguments: Any, **keywords: Any) -> Tensor:
        bias = original(*arguments, **keywords)
        if grid := _GRID.get():
            comparisons, length = grid.position_CL.shape
            bias = bias.view(comparisons, -1, length)
            bias = bias.gather(2, grid.position_CL[:, None].expand_as(bias)).view(-1, 1, length)
        return bias

    alibi.rmcore = True  # type: ignore[attr-defined]
    return alibi
