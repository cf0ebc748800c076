"""A packed row as a rectangle with one comparison per row, for models that share prompts through their own attention.

Input: a packed batch. Output: the grid [C, L] of its tokens, and which cells of a row belong to the text of which.
Example: the packed row [p0 p1 | a | b | q0 | c] of two comparisons becomes the rows [p0 p1 a b] and [q0 c . .], with
the positions [0 1 2 2] and [0 1 2 3].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
