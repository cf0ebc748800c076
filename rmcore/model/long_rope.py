"""Keeps the texts of a batch apart whose rotary embedding depends on their length, as it does with longrope.

Input: a backbone and a batch. Output: which tokens belong to long texts; within `long_texts` of them, every token is
rotated as in its text alone.
Example: Phi-3 with 128k positions uses one set of frequencies for texts of up to 4,096 tokens and another one for
longer texts. transformers takes the set of the longest text of a batch, which moves the rewards of all others.

A batch with texts on both sides of the threshold computes both sets and selects per token. The answers of a prompt that
lie on both sides cannot share it: such a batch is packed without sharing, and then computes more tokens than planned.

Source of longrope: Ding et al., arXiv 2402.13753.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rmcore.config import UserError
from rmcore.data.batches.batch import AttentionLayout, RaggedBatch

# Whether each token belongs to a long text, bool, in the shape of the position ids that the backbone gets.
_LONG: ContextVar[Tensor | None] = ContextVar("rmcore_long_texts", default=None)


class LongRope:
    """The rotary embeddings of a backbone that use longrope. `threshold`: most tokens of a short text."""

    def __init__(self, backbone: nn.Module) -> None:
        self.threshold: int | None = None
        for module in backbone.modules():
            if threshold := _threshold(module):
                self.threshold = threshold
                module.register_forward_hook(_both_sides(threshold), with_kwargs=True)

    def separated(self, batch: RaggedBatch) -> tuple[RaggedBatch, Tensor | None]:
        """The batch, without sharing if that would mix sides; and whether each token belongs to a long text, bool [T].

        The latter is None if all texts are on one side.
        """
        if self.threshold is None or not len(batch.last_rows_A):
            return batch, None
        texts = batch.answer_rows()
        long_A = [len(rows) > self.threshold for rows in texts]
        if all(long_A) or not any(long_A):
            return batch, None
        sides: dict[int, set[bool]] = {}
        for rows, long in zip(texts, long_A, strict=True):
            for row in rows:
                sides.setdefault(row, set()).add(long)
        if any(len(found) > 1 for found in sides.values()):
            batch, sides = unshared(batch, texts), {}
            for (start, end), long in zip(pairwise(np.cumsum([0, *map(len, texts)]).tolist()), long_A, strict=True):
                sides |= {row: {long} for row in range(start, end)}
        long_T = torch.tensor([True in sides.get(row, set()) for row in range(batch.computed_tokens)])
        return batch, long_T.to(batch.input_ids_T.device, non_blocking=True)


@contextmanager
def long_texts(long_T: Tensor | None, cells: Tensor | None = None) -> Iterator[None]:
    """Within, the tokens in `long_T` are rotated as those of long texts, all others as those of short texts.

    cells: the token of each cell, if the backbone gets a rectangle in place of the packed row.
    """
    long = None if long_T is None else long_T[None] if cells is None else long_T[cells.clamp(min=0)]
    token = _LONG.set(long)
    try:
        yield
    finally:
        _LONG.reset(token)


def unshared(batch: RaggedBatch, texts: list[list[int]]) -> RaggedBatch:
    """The same answers, each as a text of its own; `texts` are their packed rows."""
    ends = np.cumsum([len(rows) for rows in texts])
    device = batch.input_ids_T.device
    index = torch.tensor([row for rows in texts for row in rows]).to(device, non_blocking=True)
    segments = [(end - len(rows), end, 0, 0) for rows, end in zip(texts, ends.tolist(), strict=True)]
    layout = AttentionLayout(torch.tensor(segments, dtype=torch.int32))
    if device.type == "cuda":
        layout = layout.for_varlen().mapped(lambda t: t.to(device, non_blocking=True))
    return replace(
        batch,
        input_ids_T=batch.input_ids_T[index],
        position_ids_T=batch.position_ids_T[index],
        last_token_index_A=torch.from_numpy(ends - 1).to(device, non_blocking=True),
        last_rows_A=ends - 1,
        layout=layout,
    )


def check_split(backbone: nn.Module, longest: int) -> None:
    """Raises UserError if the rotation of a text of `longest` tokens depends on its length.

    A rank that computes some rows of a text (rmcore.model.row_split) does not see the length.
    """
    for module in backbone.modules():
        for kind in _rotations(module):
            config: Any = module.config
            limit = kind.get("original_max_position_embeddings") or config.max_position_embeddings
            if kind.get("rope_type") in ("longrope", "dynamic") and longest > limit:
                raise UserError(
                    f"parallel.context: the rotary embedding of this model ({kind['rope_type']}) depends on the length "
                    f"of texts of more than {limit:,} tokens, which a rank with a part of the row does not see; lower "
                    f"data.max_tokens to {limit}, or set parallel.context=1"
                )


def _threshold(module: nn.Module) -> int | None:
    """Most tokens of a short text, if the module is a rotary embedding with longrope."""
    kinds = _rotations(module)
    found = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return int(found[0]) if found else None


def _rotations(module: Any) -> list[dict[str, Any]]:
    """The parameters of each kind of layer, if the module is a rotary embedding."""
    parameters = getattr(getattr(module, "config", None), "rope_parameters", None)
    if "Rotary" not in type(module).__name__ or not isinstance(parameters, dict):
        return []
    return [parameters, *(value for value in parameters.values() if isinstance(value, dict))]


def _both_sides(threshold: int) -> Any:
    """A forward hook: where texts of both sides are computed, the embedding of each token is that of its side."""

    def select(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple[Tensor, Tensor]) -> Any:
        long = _LONG.get()
        if long is None:
            return output
        # The output is that of long texts, because the longest text of the batch chose it.
        given = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | kwargs
        given["position_ids"] = given["position_ids"].clamp(max=threshold - 1)
        short = module.forward(**given)
        return tuple(torch.where(long[..., None], a, b) for a, b in zip(output, short, strict=True))

    return select
