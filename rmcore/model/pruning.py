"""Prunes the last layer: it computes keys and values for all tokens, and everything else for the scored tokens only.

Input: a Hugging Face decoder, and with each forward the rows at which answers are scored.
Output: the final hidden states of those rows, [1, A, D] in place of [1, T, D].
Example: 2 answers in a packed row of 400 tokens, 6 layers. The last layer projects 400 keys and values, but runs its
attention, its MLP and its norms for 2 rows. This saves about an eighth of the training step.

It is exact: a reward reads one row of the last layer's output, and inside that layer a row depends on other rows only
through their keys and values. The layer's own code runs, on fewer rows. Hooks arrange this; they do nothing unless a
forward passes the rows:
- before the layer, its input becomes the scored rows, so the residuals, the MLP and the final norm see only those;
- before its input norm, the input becomes all rows again, so keys and values are those of all tokens;
- the attention function gets `ScoredRows` as its layout, attends from the scored rows and stores its result there;
- before the output projection, that result becomes its input.
A layer with another structure fails or gives other rewards; the start-up self-test then turns pruning off.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rmcore.data.batches.batch import AttentionLayout
from rmcore.model.backbone import decoder_layers
from rmcore.model.layout_context import current_layout

_ROWS: ContextVar[Tensor | None] = ContextVar("rmcore_scored_rows", default=None)

# The names that transformers' decoders give to the parts.
ATTENTION = ("self_attn", "attention", "attn")
INPUT_NORM = ("input_layernorm", "ln_1")
OUTPUT = ("o_proj", "dense", "c_proj", "out_proj")
QUERY = ("q_proj",)


@dataclass
class ScoredRows:
    """Takes the place of the layout for the last layer's attention: only the rows `rows_A` of the packed row attend."""

    layout: AttentionLayout
    rows_A: Tensor
    attended: list[Tensor] = field(default_factory=list)  # [1, A, H * head size], from attention to output projection

    def attend(self, query_THK: Tensor, key_TGK: Tensor, value_TGK: Tensor, scale: float, window: int) -> Tensor:
        """Attention from the scored rows [A, H, K]; see `scored_attention`."""
        query_AHK = query_THK.index_select(0, self.rows_A)
        visible_AT = self.visible(key_TGK.shape[0], window)
        return scored_attention(query_AHK, key_TGK, value_TGK, visible_AT, scale)

    def visible(self, tokens: int, window: int) -> Tensor:
        """The rows that each scored row sees, bool [A, T]: its segment's prefix, and the segment up to itself."""
        segments_S4 = self.layout.segments_on(self.rows_A.device)
        starts_S = segments_S4[:, 0].contiguous()
        own_A4 = segments_S4[torch.searchsorted(starts_S, self.rows_A.to(starts_S.dtype), right=True) - 1]
        start_A, prefix_start_A, prefix_end_A = (own_A4[:, column : column + 1] for column in (0, 2, 3))
        row_T, last_A = torch.arange(tokens, device=self.rows_A.device), self.rows_A[:, None]
        in_prefix_AT = (row_T >= prefix_start_A) & (row_T < prefix_end_A)
        in_own_AT = (row_T >= start_A) & (row_T <= last_A)
        if not window:
            return in_prefix_AT | in_own_AT
        # The distance back along the text: within the segment the difference of the rows; for the prefix, the rows of
        # the segment up to the scored one, plus the distance to the end of the prefix.
        behind_AT = torch.where(in_own_AT, last_A - row_T, last_A - start_A + prefix_end_A - row_T)
        return (in_prefix_AT | in_own_AT) & (behind_AT < window)


def scored_attention(query_AHK: Tensor, key_TGK: Tensor, value_TGK: Tensor, visible_AT: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v from A queries to the rows of T that each may see; [A, H, K] in value's dtype.

    One matrix product computes the scores of every query with all T keys, and a mask hides the invisible ones. That
    takes 4 A T H K operations, about a hundredth of the layer's projections, and needs no loop over answers. Sums run
    in fp32 (fp64 for fp64 input).
    """
    answers, heads, size = query_AHK.shape
    tokens, groups = key_TGK.shape[:2]
    share = heads // groups
    if query_AHK.is_cuda and value_TGK.dtype != torch.float64 and answers:
        query, key, value = (x.to(value_TGK.dtype).transpose(0, 1) for x in (query_AHK, key_TGK, value_TGK))
        key, value = (x.repeat_interleave(share, 0) if share > 1 else x for x in (key, value))
        out = F.scaled_dot_product_attention(query[None], key[None], value[None], visible_AT[None, None], scale=scale)
        return out.squeeze(0).transpose(0, 1)
    wide = torch.float64 if query_AHK.dtype == torch.float64 else torch.float32
    with torch.autocast(query_AHK.device.type, enabled=False):
        # The `share` query heads of a key head are rows of one product: [G, share * A, K] @ [G, K, T].
        key_GTK, value_GTK = (x.to(wide).transpose(0, 1) for x in (key_TGK, value_TGK))
        query = query_AHK.to(wide).view(answers, groups, share, size).permute(1, 2, 0, 3)
        scores = query.reshape(groups, share * answers, size) @ key_GTK.mT * scale
        scores = scores.view(groups, share, answers, tokens).masked_fill(~visible_AT, -torch.inf)
        probabilities = scores.softmax(-1).view(groups, share * answers, tokens)
        out = (probabilities @ value_GTK).view(groups, share, answers, size)
    return out.permute(2, 0, 1, 3).reshape(answers, heads, size).to(value_TGK.dtype)


@contextmanager
def only_rows(rows_A: Tensor) -> Iterator[None]:
    """Forwards within compute the last layer for the rows `rows_A` only."""
    token = _ROWS.set(rows_A)
    try:
        yield
    finally:
        _ROWS.reset(token)


_SCORED: ContextVar[ScoredRows | None] = ContextVar("rmcore_pruned_layer", default=None)


def current_scored_rows() -> ScoredRows | None:
    """What the attention of the pruned last layer computes, or None in every other layer."""
    return _SCORED.get()


class Pruning:
    """Hooks on the last decoder layer of `backbone`, inactive except within `only_rows`.

    Raises ValueError if a part of the layer is missing, so that there is nothing to hook.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        layer = decoder_layers(backbone)[-1]
        attention = part(layer, ATTENTION)
        self._all_rows: Tensor | None = None  # the layer's input [1, T, D]
        self._scored: ScoredRows | None = None  # set while the layer's forward runs
        layer.register_forward_pre_hook(self._enter, with_kwargs=True)
        layer.register_forward_hook(self._leave, always_call=True)
        part(layer, INPUT_NORM).register_forward_pre_hook(self._whole_input)
        part(attention, OUTPUT).register_forward_pre_hook(self._attended)
        if query := [getattr(attention, name) for name in QUERY if hasattr(attention, name)]:
            query[0].register_forward_pre_hook(self._scored_input)
            query[0].register_forward_hook(self._spread)

    def _enter(
        self, layer: nn.Module, arguments: tuple, keywords: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        rows_A, layout = _ROWS.get(), current_layout()
        if rows_A is None or layout is None:
            return None
        self._scored = ScoredRows(layout, rows_A)
        _SCORED.set(self._scored)
        self._all_rows = arguments[0] if arguments else keywords["hidden_states"]
        rows = self._all_rows.index_select(1, rows_A)
        return ((rows, *arguments[1:]), keywords) if arguments else ((), {**keywords, "hidden_states": rows})

    def _leave(self, layer: nn.Module, arguments: tuple, output: Any) -> None:
        self._all_rows = self._scored = None
        _SCORED.set(None)

    def _whole_input(self, norm: nn.Module, arguments: tuple) -> tuple | None:
        return None if self._scored is None else (self._all_rows, *arguments[1:])

    def _attended(self, projection: nn.Module, arguments: tuple) -> tuple | None:
        return None if self._scored is None else (self._scored.attended.pop(), *arguments[1:])

    def _scored_input(self, projection: nn.Module, arguments: tuple) -> tuple | None:
        return None if self._scored is None else (arguments[0].index_select(1, self._scored.rows_A), *arguments[1:])

    def _spread(self, projection: nn.Module, arguments: tuple, output: Tensor) -> Tensor | None:
        """Put the queries back at their rows among T, because the layer's code rotates T rows; no other row is read."""
        if self._scored is None or self._all_rows is None:
            return None
        rows_A = self._scored.rows_A
        # Two answers are scored at one row if one is a prefix of the other: the query is taken from the first of them.
        again_A = (rows_A[:, None] == rows_A).tril(-1).any(1)
        everywhere = output.new_zeros(1, self._all_rows.shape[1], output.shape[2])
        return everywhere.index_add(1, rows_A, output.masked_fill(again_A[:, None], 0.0))


def part(module: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """The first of `names` that the module has. Raises ValueError if it has none of them."""
    for name in names:
        if isinstance(part := getattr(module, name, None), nn.Module):
            return part
    raise ValueError(f"{type(module).__name__} has no {' or '.join(names)}")
