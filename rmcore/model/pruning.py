"""Prunes the last layer: it computes keys and values for all tokens, and everything else for the scored tokens only.

Input: a Hugging Face decoder, and for each forward the rows at which answers are scored.
Output: the final hidden states of those rows, [1, A, D] in place of [1, T, D].
Example: 2 answers in a packed row of 400 tokens, 6 layers. The last layer projects 400 keys and values, but runs its
attention, its MLP and its norms for 2 rows. This saves about an eighth of the training step.

It is exact: a reward reads one row of the last layer's output, and inside that layer a row depends on other rows only
through their keys and values. The layer's own code runs, on fewer rows. Hooks arrange this; they do nothing except
within `only_rows`:
- before the layer, its input becomes the scored rows, so the residuals, the MLP and the final norm see only those;
- before the layer's attention, its input becomes all rows again, so keys and values are those of all tokens. If a norm
  precedes the attention, the norm runs once more, on all rows;
- the attention function attends from the scored rows only (`ScoredRows`);
- before the output projection, its input becomes the result of the scored rows. If there is no projection with a known
  name, the rows are taken from the attention's output.
A layer with another structure fails or gives other rewards; the start-up self-test then turns pruning off.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from rmcore.data.batches.batch import AttentionLayout
from rmcore.model.attention_terms import Terms
from rmcore.model.backbone import decoder_layers
from rmcore.model.layout_context import current_part
from rmcore.model.row_split import SplitHeads
from rmcore.model.varlen import takes_varlen, varlen_attention
from rmcore.ops.tiled_attention import tiled_attention

# The names that transformers' decoders give to the parts.
ATTENTION = ("self_attn", "attention", "attn", "self_attention", "multi_head_attention")
OUTPUT = ("o_proj", "dense", "c_proj", "out_proj", "wo")
QUERY = ("q_proj", "q_b_proj")


@dataclass
class ScoredRows:
    """What the attention of the last layer computes: only the rows `rows_A` attend.

    They are counted in the packed row, or in this rank's part of it (rmcore.model.row_split).
    """

    rows_A: Tensor
    attended: tuple[Tensor, Tensor] | None = None  # the result [A, H, V], and the same spread over T rows

    def attend(
        self,
        query_THK: Tensor,
        key_TGK: Tensor,
        value_TGV: Tensor,
        layout: AttentionLayout,
        terms: Terms,
        split: SplitHeads | None = None,
    ) -> Tensor:
        """Attention from the scored rows, spread over the T rows: [T, H, V]; see `scored_attention`.

        split: keys and values are all rows of this rank's heads, and the queries are this rank's rows of all heads.
        """
        query_AHK = query_THK.index_select(0, self.rows_A)
        if split:
            query_AHK = split.queries(query_AHK)
        if split is None and layout.scored is not None and takes_varlen(key_TGK, value_TGV, terms):
            out_AHV = varlen_attention(query_AHK, key_TGK, value_TGV, layout.scored, terms)
        elif split is None and layout.scored_tiles is not None:
            out_AHV = tiled_attention(query_AHK, key_TGK, value_TGV, layout.scored_tiles, *terms)
        else:
            visible_AT, behind_AT = self.visible(key_TGK.shape[0], layout, terms.window)
            out_AHV = scored_attention(query_AHK, key_TGK, value_TGV, visible_AT, behind_AT, terms)
        if split:
            out_AHV = split.back(out_AHV)
        self.attended = out_AHV, spread(out_AHV, self.rows_A, query_THK.shape[0])
        return self.attended[1]

    def visible(self, tokens: int, layout: AttentionLayout, window: int) -> tuple[Tensor, Tensor]:
        """The rows that each scored row sees, bool [A, T]: its segment's prefix, and the segment up to itself.

        And how far back along the text each of them is [A, T], 0 for the scored row itself. Where the row is split, A
        are the scored rows of all ranks.
        """
        part = current_part()
        rows_A = part.scored_Na if part else self.rows_A
        segments_S4 = layout.segments_on(rows_A.device)
        starts_S = segments_S4[:, 0].contiguous()
        own_A4 = segments_S4[torch.searchsorted(starts_S, rows_A.to(starts_S.dtype), right=True) - 1]
        start_A, prefix_start_A, prefix_end_A = (own_A4[:, column : column + 1] for column in (0, 2, 3))
        row_T, last_A = torch.arange(tokens, device=rows_A.device), rows_A[:, None]
        in_prefix_AT = (row_T >= prefix_start_A) & (row_T < prefix_end_A)
        in_own_AT = (row_T >= start_A) & (row_T <= last_A)
        # Within the segment the difference of the rows; for the prefix, the rows of the segment up to the scored one,
        # plus the distance to the end of the prefix.
        behind_AT = torch.where(in_own_AT, last_A - row_T, last_A - start_A + prefix_end_A - row_T)
        visible_AT = in_prefix_AT | in_own_AT
        return (visible_AT & (behind_AT < window) if window else visible_AT), behind_AT


# Without cuDNN, which PyTorch prefers on recent GPUs: it builds a plan for every new number of answers and tokens, and
# nearly every micro batch has new ones.
_BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def scored_attention(
    query_AHK: Tensor, key_TGK: Tensor, value_TGV: Tensor, visible_AT: Tensor, behind_AT: Tensor, terms: Terms
) -> Tensor:
    """softmax(scale q k^T) v from A queries to the rows of T that each may see; [A, H, V] in value's dtype.

    One matrix product computes the scores of every query with all T keys, and a mask hides the invisible ones. That
    takes 4 A T H K operations, about a hundredth of the layer's projections, and needs no loop over answers. Sums run
    in fp32 (fp64 for fp64 input).
    """
    answers, heads, size = query_AHK.shape
    tokens, groups = key_TGK.shape[:2]
    share = heads // groups
    if query_AHK.is_cuda and value_TGV.dtype != torch.float64 and answers and terms.plain:
        query, key, value = (x.to(value_TGV.dtype).transpose(0, 1) for x in (query_AHK, key_TGK, value_TGV))
        key, value = (x.repeat_interleave(share, 0) if share > 1 else x for x in (key, value))
        mask = visible_AT[None, None]
        with sdpa_kernel(_BACKENDS):
            out = F.scaled_dot_product_attention(query[None], key[None], value[None], mask, scale=terms.scale)
        return out.squeeze(0).transpose(0, 1)
    wide = torch.float64 if query_AHK.dtype == torch.float64 else torch.float32
    with torch.autocast(query_AHK.device.type, enabled=False):
        # The `share` query heads of a key head are rows of one product: [G, share * A, K] @ [G, K, T].
        key_GTK, value_GTV = (x.to(wide).transpose(0, 1) for x in (key_TGK, value_TGV))
        query = query_AHK.to(wide).view(answers, groups, share, size).permute(1, 2, 0, 3)
        scores = query.reshape(groups, share * answers, size) @ key_GTK.mT * terms.scale
        scores_HAT = terms.adjusted(scores.view(heads, answers, tokens), behind_AT).masked_fill(~visible_AT, -torch.inf)
        p_HAT = terms.softmax(scores_HAT)
        out = (p_HAT.view(groups, share * answers, tokens) @ value_GTV).view(groups, share, answers, value_TGV.shape[2])
    return out.permute(2, 0, 1, 3).reshape(answers, heads, value_TGV.shape[2]).to(value_TGV.dtype)


_ROWS: ContextVar[Tensor | None] = ContextVar("rmcore_scored_rows", default=None)


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
    return None if torch.compiler.is_compiling() else _SCORED.get()  # the last layer is never compiled


def spread(values_A: Tensor, rows_A: Tensor, rows: int) -> Tensor:
    """[A, ...] -> [rows, ...]: the values at their rows, zeros elsewhere."""
    # Two answers are scored at one row if one is a prefix of the other: the value is taken from the first of them.
    again_A = (rows_A[:, None] == rows_A).tril(-1).any(1)
    once_A = values_A.masked_fill(again_A.view(-1, *[1] * (values_A.dim() - 1)), 0.0)
    return values_A.new_zeros(rows, *values_A.shape[1:]).index_add(0, rows_A, once_A)


class Pruning:
    """Hooks on the last decoder layer of `backbone`, inactive except within `only_rows`.

    Raises ValueError if the layer has no attention to hook.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        layer = decoder_layers(backbone)[-1]
        attention = attention_of(layer)
        # GPT-2 and its like give their final states the shape of their input, which takes as many rows.
        self.spreads = "output_shape" in _source(type(backbone).forward)
        self._rows_A: Tensor | None = None  # set while the layer's forward runs
        self._shape = torch.Size()  # of the layer's input without its last dimension: [1, T], or [R, L] in a grid
        self._known: list[tuple[Tensor, Callable[[], Tensor]]] = []  # values of the scored rows -> those of all rows
        self._projected = False  # whether the output projection has taken the scored rows
        layer.register_forward_pre_hook(self._enter, with_kwargs=True)
        layer.register_forward_hook(self._leave, always_call=True)
        for child in layer.children():
            if child is not attention:
                child.register_forward_hook(self._before_attention)
        attention.register_forward_pre_hook(self._attention_input, with_kwargs=True)
        attention.register_forward_hook(self._attention_output)
        for name, module in attention.named_modules():
            if name in OUTPUT:
                module.register_forward_pre_hook(self._projection_input)
            elif name in QUERY:
                module.register_forward_pre_hook(self._query_input)
                module.register_forward_hook(self._query_output)

    def _take(self, everything: Tensor) -> Tensor:
        """The scored rows of [1, T, ...] or [R, L, ...]: [1, A, ...]."""
        assert self._rows_A is not None
        return everything.flatten(0, 1).index_select(0, self._rows_A).unsqueeze(0)

    def _enter(
        self, layer: nn.Module, arguments: tuple, keywords: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        self._rows_A = _ROWS.get()
        if self._rows_A is None:
            return None
        everything: Tensor = arguments[0] if arguments else keywords["hidden_states"]
        self._shape, self._projected = everything.shape[:2], False
        rows = self._take(everything)
        self._known = [(rows, lambda: everything)]
        _SCORED.set(ScoredRows(self._rows_A))
        if not arguments:
            return (), {**keywords, "hidden_states": rows}
        # Gemma 4 gives its layers one more input for each token.
        per_token = [isinstance(x, Tensor) and x.dim() == 3 and x.shape[:2] == self._shape for x in arguments]
        others = (self._take(x) if take else x for x, take in zip(arguments[1:], per_token[1:], strict=True))
        return (rows, *others), keywords

    def _leave(self, layer: nn.Module, arguments: tuple, output: Any) -> Any:
        rows_A, self._rows_A, self._known = self._rows_A, None, []
        _SCORED.set(None)
        if rows_A is None or output is None or not self.spreads:  # None: the layer failed
            return None
        states, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        # Not a view: FSDP2's hooks at the layer's output do not survive a change in place of a view.
        states = spread(states[0], rows_A, self._shape.numel()).unflatten(0, self._shape).clone()
        return states if rest is None else (states, *rest)

    def _before_attention(self, module: nn.Module, arguments: tuple, output: Any) -> None:
        if arguments and (everything := self._known_for(arguments[0])):
            self._known.append((output, lambda: module.forward(everything(), *arguments[1:])))

    def _known_for(self, rows: Tensor) -> Callable[[], Tensor] | None:
        return next((everything for known, everything in self._known if known is rows), None)

    def _everything(self, rows: Tensor) -> Tensor:
        everything = self._known_for(rows)
        if everything is None:
            raise ValueError("no module of the last layer computes the input of its attention")
        return everything()

    def _attention_input(
        self, attention: nn.Module, arguments: tuple, keywords: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if self._rows_A is None:
            return None
        if arguments:
            return (self._everything(arguments[0]), *arguments[1:]), keywords
        return (), {**keywords, "hidden_states": self._everything(keywords["hidden_states"])}

    def _attention_output(self, attention: nn.Module, arguments: tuple, output: Any) -> Any:
        if self._rows_A is None or self._projected:
            return None
        return (self._take(output[0]), *output[1:]) if isinstance(output, tuple) else self._take(output)

    def _projection_input(self, projection: nn.Module, arguments: tuple) -> tuple | None:
        if self._rows_A is None:
            return None
        self._projected = True
        scored = _SCORED.get()
        if scored and scored.attended and _same_memory(arguments[0], scored.attended[1]):
            return scored.attended[0].flatten(1).unsqueeze(0), *arguments[1:]
        return self._take(arguments[0]), *arguments[1:]  # a gate or a norm comes between the two

    def _query_input(self, projection: nn.Module, arguments: tuple) -> tuple | None:
        return None if self._rows_A is None else (self._take(arguments[0]), *arguments[1:])

    def _query_output(self, projection: nn.Module, arguments: tuple, output: Tensor) -> Tensor | None:
        """Put the queries back at their rows, because the layer's code rotates all rows; no other row is read."""
        if self._rows_A is None:
            return None
        return spread(output[0], self._rows_A, self._shape.numel()).unflatten(0, self._shape)


def attention_of(layer: nn.Module) -> nn.Module:
    """The layer's attention, by the names that transformers gives it. Raises ValueError if there is none."""
    for name, child in layer.named_children():
        if name in ATTENTION:
            return child
    raise ValueError(f"{type(layer).__name__} has no {' or '.join(ATTENTION)}")


def _source(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # made at run time
        return ""


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and one.untyped_storage()._cdata == other.untyped_storage()._cdata
