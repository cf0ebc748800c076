"""The layout of the packed row that a forward computes, for functions that run deep inside a Hugging Face model.

Input: `with packed_layout(layout):` around the model's forward. Output: `current_layout()` within it.
Example: StableLM's layers do not hand unknown keywords to their attention; `attention_forward` reads the layout here.

The value belongs to the thread (or task) that set it, so two threads may compute with one model. A backward may run in
a thread of its own: what it computes again gets the layout from `recompute_contexts`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

from rmcore.data.batches.batch import AttentionLayout

_LAYOUT: ContextVar[AttentionLayout | None] = ContextVar("rmcore_layout", default=None)


@contextmanager
def packed_layout(layout: AttentionLayout | None) -> Iterator[None]:
    """Within, `current_layout()` returns `layout`; None: the batch is not a packed row."""
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def current_layout() -> AttentionLayout | None:
    """The layout of the packed row that this thread computes, or None outside a packed forward."""
    return _LAYOUT.get()


def recompute_contexts(
    contexts: Callable[[], tuple[AbstractContextManager, AbstractContextManager]] | None = None,
) -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` of torch.utils.checkpoint: what the backward computes again sees the layout of the forward.

    contexts: another `context_fn`, whose two contexts apply too.
    """
    forward, again = contexts() if contexts else (nullcontext(), nullcontext())
    return forward, _with_layout(current_layout(), again)


@contextmanager
def _with_layout(layout: AttentionLayout | None, inner: AbstractContextManager) -> Iterator[None]:
    with packed_layout(layout), inner:
        yield
