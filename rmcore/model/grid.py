"""A packed row as a rectangle of whole comparisons, for models that share prompts through their own attention.

Input: a packed batch. Output: the grid [R, L] of its tokens, and which cells of a row belong to the text of which.
Example: the packed row [p0 p1 | a | b | q0 | c] of two comparisons becomes the rows [p0 p1 a b] and [q0 c . .], with
the positions [0 1 2 2] and [0 1 0 0].

A row is as long as the longest comparison, and holds as many of the following comparisons as fit. Two rows in turn hold
more tokens than one row has cells, so there are at most 2 T + L cells.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmcore.data.batches.batch import RaggedBatch, sent


@dataclass(frozen=True)
class Grid:
    """A packed row as a rectangle of R rows by L columns. Empty cells see themselves only."""

    token_RL: Tensor  # int64: the row of the packed batch for each cell, -1 for empty cells
    position_RL: Tensor  # int64: positions in the text
    start_RL: Tensor  # int64: the column where the segment of each cell begins
    prefix_start_RL: Tensor  # int64: the columns prefix_start .. prefix_end are also visible
    prefix_end_RL: Tensor
    cell_T: Tensor  # int64: the number of the cell, in the flattened grid, of each token

    @classmethod
    def of(cls, batch: RaggedBatch) -> "Grid":
        """The grid of a batch, on the batch's device. A comparison begins with a segment without prefix."""
        device = batch.input_ids_T.device
        segments = batch.layout.segments_S4.tolist()
        first = [place for place, segment in enumerate(segments) if segment[2] == segment[3]]
        comparisons = [segments[a:b] for a, b in zip(first, [*first[1:], len(segments)], strict=True)]
        longest = max(one[-1][1] - one[0][0] for one in comparisons)
        rows: list[list[list[int]]] = []  # of segments; a row is a part of the packed row
        for one in comparisons:
            if rows and one[-1][1] - rows[-1][0][0] <= longest:
                rows[-1] += one
            else:
                rows.append(list(one))
        column_L = torch.arange(longest)
        token_RL = torch.full((len(rows), longest), -1)
        start_RL, prefix_start_RL, prefix_end_RL = column_L.repeat(3, len(rows), 1)
        for place, row in enumerate(rows):
            origin = row[0][0]
            token_RL[place, : row[-1][1] - origin] = torch.arange(origin, row[-1][1])
            for start, end, prefix_start, prefix_end in row:
                own = slice(start - origin, end - origin)
                start_RL[place, own] = start - origin
                prefix_start_RL[place, own], prefix_end_RL[place, own] = prefix_start - origin, prefix_end - origin
        cell_T = (token_RL.flatten() >= 0).nonzero().squeeze(1)  # the grid is filled in the packed order
        token_RL = sent(token_RL, device)
        position_RL = batch.position_ids_T[token_RL.clamp(min=0)].where(token_RL >= 0, 0)
        return cls(
            token_RL, position_RL, *(sent(x, device) for x in (start_RL, prefix_start_RL, prefix_end_RL, cell_T))
        )

    def by_position(self, sees: Callable[..., Any]) -> Callable[..., Any]:
        """A mask function of columns: the key belongs to the text of the query, and `sees` their positions."""

        def visible(row: Any, head: Any, query: Any, key: Any) -> Any:
            own = (key >= self.start_RL[row, query]) & (key <= query)
            prompt = key >= self.prefix_start_RL[row, query]
            prompt = prompt & (key < self.prefix_end_RL[row, query])
            position = self.position_RL
            return (own | prompt) & sees(row, head, position[row, query], position[row, key])

        return visible
