"""Cuts a packed row into the pieces that a recurrent layer scans, and arranges them as rectangles.

Input: the batch's `AttentionLayout`.
Output: `pieces(layout)`: each prompt that several answers share is one piece, and so is each continuation of it. `Scan`
runs a function over them: first over the pieces that start from the zero state, then over those that start from the
final state of another one. `window_of` arranges the row for layers that look back over a fixed number of tokens.
Example: segments (0, 5, 0, 0) and (5, 6, 0, 3), a prompt of 3 tokens with tails of 2 and 1, are the pieces [0, 3) from
zero, and [3, 5) and [5, 6) from the final state of [0, 3).

Pieces of similar length are the rows of one rectangle [B, L, ...]. Pieces that start from zero are padded on the left
with tokens that do not change a zero state; the others are padded on the right, where no state is read any more. Every
row of the packed row lies in one place, so both directions are copies, and a gradient stays within its own text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmcore.data.batches.batch import AttentionLayout

NOTHING = -1  # in an index: a place that holds zeros


class Piece(NamedTuple):
    """The rows [start, end) of the packed row. `parent`: the piece whose final state it starts from; None: zero."""

    start: int
    end: int
    parent: "Piece | None" = None

    @property
    def length(self) -> int:
        return self.end - self.start


def pieces(layout: AttentionLayout) -> list[Piece]:
    """The pieces of a packed row, in the order of the rows.

    Raises ValueError if two answers share different parts of one prompt, or a part that is not the start of a text.
    """
    segments = layout.segments_S4.tolist()
    shared = {start: end for _, _, start, end in segments if end > start}
    prompts: dict[int, Piece] = {}
    found: list[Piece] = []
    for start, end, prefix_start, prefix_end in segments:
        if prefix_end > prefix_start:
            if prefix_start not in prompts or shared[prefix_start] != prefix_end:
                raise ValueError(
                    "the answers of a prompt share it in different ways: recurrent layers need one point where it ends"
                )
            found.append(Piece(start, end, prompts[prefix_start]))
        elif start in shared:
            found.append(Piece(start, shared[start]))
            prompts[start] = found[-1]
            if shared[start] < end:
                found.append(Piece(shared[start], end, prompts[start]))
        else:
            found.append(Piece(start, end))
    return found


class Places(NamedTuple):
    """Where the T rows of a packed row lie in a buffer of N places.

    source_N: the row that each place holds, or `NOTHING`. place_T: the place of each row. `copies`: places that hold a
    row which lies at its own place too; `copied`: the rows that they hold.
    """

    source_N: Tensor
    place_T: Tensor
    copies: Tensor
    copied: Tensor
    empty: Tensor  # the places that hold nothing

    @classmethod
    def of(cls, source_N: Tensor, own_N: Tensor, device: torch.device) -> "Places":
        """From what each place holds, and whether it is the own place of that row (bool)."""
        own = own_N.nonzero().squeeze(1)
        place_T = torch.empty_like(own)
        place_T[source_N[own]] = own
        copies = ((source_N != NOTHING) & ~own_N).nonzero().squeeze(1)
        empty = (source_N == NOTHING).nonzero().squeeze(1)
        return cls(*(_on(index, device) for index in (source_N, place_T, copies, source_N[copies], empty)))


def _on(index: Tensor, device: torch.device) -> Tensor:
    """The index on the device, copied without waiting for what runs there."""
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)


class _Arrange(torch.autograd.Function):
    """Rows [T, ...] to a buffer [N, ...]. Autograd's own index would add the gradients row by row."""

    @staticmethod
    def forward(ctx: Any, rows_T: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return rows_T.index_select(0, places.source_N.clamp(min=0)).index_fill_(0, places.empty, 0)

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None]:
        places: Places = ctx.places
        gradient_T = gradient_N.index_select(0, places.place_T)
        if places.copies.numel():
            gradient_T.index_add_(0, places.copied, gradient_N.index_select(0, places.copies))
        return gradient_T, None


class _Restore(torch.autograd.Function):
    """A buffer [N, ...] to the rows [T, ...] at their own places; what lies elsewhere is not read."""

    @staticmethod
    def forward(ctx: Any, buffer_N: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return buffer_N.index_select(0, places.place_T)

    @staticmethod
    def backward(ctx: Any, gradient_T: Tensor) -> tuple[Tensor, None]:
        places: Places = ctx.places
        gradient_N = gradient_T.index_select(0, places.source_N.clamp(min=0))
        return gradient_N.index_fill_(0, places.empty, 0).index_fill_(0, places.copies, 0), None


def arrange(rows_T: Tensor, places: Places) -> Tensor:
    return _Arrange.apply(rows_T, places)


def restore(buffer_N: Tensor, places: Places) -> Tensor:
    return _Restore.apply(buffer_N, places)


class Batch(NamedTuple):
    """Pieces that are scanned together: the rows of a rectangle, or one row in which they follow each other.

    rows, length: B and L of the inputs [B, L, ...]. `parents`: for each piece the number of its parent among all pieces
    that start from zero; None: these do themselves. `bounds` (int64): where each piece starts in the one row, and where
    the last one ends; None in a rectangle.
    """

    rows: int
    length: int
    parents: Tensor | None
    bounds: Tensor | None


Step = Callable[[list[Tensor], Batch, Tensor | None, bool], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Scan:
    """The batches of a packed row, and where its rows lie in them."""

    places: Places
    batches: list[Batch]
    shares: bool  # some piece starts from the final state of another one

    def run(self, rows: Sequence[Tensor], step: Step) -> Tensor:
        """The output [1, T, ...] of a recurrence that runs over every piece.

        Args:
            rows: its inputs, each [1, T, ...].
            step: from inputs [B, L, ...] (zeros where a piece is padded), their batch, the state of each piece (None:
                zero) and whether to return the final states, to the output [B, L, ...] and the final states.
        """
        sizes = [batch.rows * batch.length for batch in self.batches]
        buffers = zip(*(arrange(x.squeeze(0), self.places).split(sizes) for x in rows), strict=True)
        outputs, finals = [], []
        for batch, buffer in zip(self.batches, buffers, strict=True):
            inputs = [x.view(batch.rows, batch.length, *x.shape[1:]) for x in buffer]
            if batch.parents is None:
                output, final = step(inputs, batch, None, self.shares)
                finals += [final] if final is not None else []
            else:
                states = finals[0] if len(finals) == 1 else torch.cat(finals)
                finals = [states]
                output, _ = step(inputs, batch, states.index_select(0, batch.parents), False)
            outputs.append(output.flatten(0, 1))
        return restore(torch.cat(outputs), self.places).unsqueeze(0)


@lru_cache(maxsize=16)
def scan_of(layout: AttentionLayout, grain: int, device: torch.device) -> Scan:
    """How to scan a packed row.

    grain: pieces whose lengths are equal when rounded up to a multiple of `grain` form one rectangle. 0: no rectangles,
        the pieces of a batch follow each other in one row.
    """
    found = pieces(layout)
    numbers: dict[Piece, int] = {}  # of the pieces from zero, in the order of their final states
    batches: list[Batch] = []
    source: list[Tensor] = []
    for from_zero in (True, False):
        groups: dict[int, list[Piece]] = {}
        for piece in found:
            if (piece.parent is None) == from_zero:
                groups.setdefault(-(-piece.length // grain) if grain else 0, []).append(piece)
        for _, group in sorted(groups.items()):
            lengths = [piece.length for piece in group]
            longest = max(lengths) if grain else 0
            for piece in group:
                padding = torch.full((max(0, longest - piece.length),), NOTHING)
                rows = torch.arange(piece.start, piece.end)
                source += [padding, rows] if from_zero else [rows, padding]
            numbers |= {piece: len(numbers) + n for n, piece in enumerate(group)} if from_zero else {}
            parents = [numbers[piece.parent] for piece in group if piece.parent is not None]
            batches.append(
                Batch(
                    len(group) if grain else 1,
                    longest or sum(lengths),
                    _on(torch.tensor(parents), device) if parents else None,
                    None if grain else _on(torch.tensor([0, *accumulate(lengths)]), device),
                )
            )
    source_N = torch.cat(source)
    return Scan(Places.of(source_N, source_N != NOTHING, device), batches, len(numbers) < len(found))


@lru_cache(maxsize=16)
def window_of(layout: AttentionLayout, width: int, device: torch.device) -> Places:
    """The row with the `width` - 1 tokens of its text that precede each segment in front of it; zeros before a text."""
    source: list[Tensor] = []
    own: list[Tensor] = []
    for start, end, prefix_start, prefix_end in layout.segments_S4.tolist():
        before = torch.arange(max(prefix_start, prefix_end - (width - 1)), prefix_end)
        source += [torch.full((width - 1 - len(before),), NOTHING), before, torch.arange(start, end)]
        own += [torch.zeros(width - 1, dtype=torch.bool), torch.ones(end - start, dtype=torch.bool)]
    return Places.of(torch.cat(source), torch.cat(own), device)
