"""The layout of the packed row that a forward computes, for functions that run deep inside a Hugging Face model.

Input: `with packed_layout(layout):` around the model's forward. Output: `current_layout()` within it; or, if the model
computes a grid in place of a packed row, `current_grid()`; and `current_part()`, if the row is split over ranks.
Example: StableLM's layers do not hand unknown keywords to their attention; `attention_forward` reads the layout here.

The value belongs to the thread (or task) that set it: two threads with a model each do not see the layout of the other.
A backward may run in a thread of its own: what it computes again gets the layout from `recompute_contexts`.
While torch.compile traces a layer it cannot read a context variable: it reads what `traced_layout` was given.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

from rmcore.data.batches.batch import AttentionLayout
from rmcore.model.grid import Grid
from rmcore.model.row_split import RowPart

Layout = AttentionLayout | Grid | None
_LAYOUT: ContextVar[Layout] = ContextVar("rmcore_layout", default=None)
_PART: ContextVar[RowPart | None] = ContextVar("rmcore_row_part", default=None)


class _Traced:
    """The layout among the arguments of the function that is being compiled; None outside it."""

    layout: Layout = None


_TRACED = _Traced()


def traced_layout(layout: Layout) -> None:
    """Called by a function that is being compiled: what it calls sees this layout."""
    _TRACED.layout = layout


def current() -> Layout:
    """The layout or the grid of this thread."""
    return _TRACED.layout if torch.compiler.is_compiling() else _LAYOUT.get()


@contextmanager
def packed_layout(layout: Layout, part: RowPart | None = None) -> Iterator[None]:
    """Within, `current_layout()` or `current_grid()` returns `layout`; None: the batch is neither.

    `part`: the rows of the layout that this rank computes; None: all of them.
    """
    token, token_of_part = _LAYOUT.set(layout), _PART.set(part)
    try:
        yield
    finally:
        _LAYOUT.reset(token)
        _PART.reset(token_of_part)


def current_layout() -> AttentionLayout | None:
    """The layout of the packed row that this thread computes, or None outside a packed forward."""
    layout = current()
    return layout if isinstance(layout, AttentionLayout) else None


def current_part() -> RowPart | None:
    """The rows of `current_layout()` that this rank computes, or None if it computes all of them."""
    return None if torch.compiler.is_compiling() else _PART.get()  # a split row is never compiled


def current_grid() -> Grid | None:
    """The grid that this thread computes, or None outside such a forward."""
    layout = current()
    return layout if isinstance(layout, Grid) else None


def recompute_contexts(
    contexts: Callable[[], tuple[AbstractContextManager, AbstractContextManager]] | None = None,
) -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` of torch.utils.checkpoint: what the backward computes again sees the layout of the forward.

    contexts: another `context_fn`, whose two contexts apply too.
    """
    forward, again = contexts() if contexts else (nullcontext(), nullcontext())
    return forward, _with_layout(_LAYOUT.get(), _PART.get(), again)


@contextmanager
def _with_layout(layout: Layout, part: RowPart | None, inner: AbstractContextManager) -> Iterator[None]:
    with packed_layout(layout, part), inner:
        yield
