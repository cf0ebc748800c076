"""Attention over a packed row in which answers share their prompt: each query sees its own text and nothing else.

Input: what a Hugging Face attention layer passes to an attention function (query [1, H, T, K], key [1, G, T, K], value
[1, G, T, V]), and the batch's `AttentionLayout`. Output: the attention output [1, T, H, V], as those layers expect it.
Example: the row [p0 p1 | a | b] (a prompt of 2 tokens, answers a and b) has the segments (0, 3, 0, 0) and (3, 4, 0, 2).
a sees p0 p1 a; b sees p0 p1 b, never a.

It is exact: attention is causal, so the hidden states of p0 p1 do not depend on a or b. Three implementations compute
the same function: the op `ragged_attention` (CPU), variable-length kernels with the shared keys gathered once for each
answer (CUDA, rmcore.model.varlen), and the op `tiled_attention` (CUDA with soft capping or sinks, or in fp32 with a
window). `composed_attention` is what tests compare them with.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from rmcore.data.batches.batch import AttentionLayout
from rmcore.model.attention_terms import Terms
from rmcore.model.layout_context import current_layout, current_part
from rmcore.model.pruning import current_scored_rows
from rmcore.model.row_split import SplitHeads
from rmcore.model.varlen import UnsupportedAttention, takes_varlen, varlen_attention
from rmcore.ops.ragged_attention import ragged_attention
from rmcore.ops.tiled_attention import tiled_attention

NAME = "rmcore_ragged"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention-function contract (AttentionInterface) for packed rows.

    query [1, H, T, K]; key [1, G, T, K] and value [1, G, T, V] with H a multiple of G (grouped-query attention).
    `sliding_window` is the number of keys that a query sees along its own text, itself included; `s_aux` the sinks [H].
    Raises UnsupportedAttention for a mask, dropout or a position bias; the start-up self-test then chooses another way.
    """
    layout = current_layout()
    if layout is None:
        raise UnsupportedAttention("attention outside a packed forward")
    unsupported = [name for name in ("position_bias", "alibi") if kwargs.get(name) is not None]
    if attention_mask is not None or dropout or unsupported:
        raise UnsupportedAttention(", ".join(unsupported) or "an attention mask or dropout")
    if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True):
        query = query * _temperature(module, layout, query)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    terms = Terms(scale, sliding_window or 0, softcap or 0.0, s_aux)
    if chunk := _chunk(module):
        layout = chunked(layout, chunk)
    return attend(query, key, value, layout, terms), None


def attend(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, terms: Terms) -> Tensor:
    """The output [1, T, H, V] of a layer's attention, from query [1, H, T, K], key [1, G, T, K], value [1, G, T, V].

    In the last layer, rows that are not scored are zeros. Where the row is split, T are the rows of this rank.
    """
    # squeeze, not [0]: the backward of an index fills a tensor with zeros and copies the gradient into it.
    query_THK, key_TGK, value_TGV = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    split = None
    if part := current_part():  # this rank has some rows of all heads; the kernels below get all rows of some heads
        split = SplitHeads(part.ranks, query_THK.shape[1], key_TGK.shape[1])
        if value.is_cuda and terms.plain:  # rotary embeddings make fp32 of half precision, and the kernels undo it
            query_THK, key_TGK = query_THK.to(value.dtype), key_TGK.to(value.dtype)
        key_TGK, value_TGV = split.keys(key_TGK), split.keys(value_TGV)
        terms = terms._replace(sinks_H=split.per_head(terms.sinks_H), slopes_H=split.per_head(terms.slopes_H))
    if scored := current_scored_rows():
        return scored.attend(query_THK, key_TGK, value_TGV, layout, terms, split).unsqueeze(0)
    if split:
        query_THK = split.queries(query_THK)
    if (plan := layout.gather) is not None and takes_varlen(key_TGK, value_TGV, terms):
        out_THV = varlen_attention(query_THK, key_TGK, value_TGV, plan, terms)
    elif layout.tiles is not None:
        out_THV = tiled_attention(query_THK, key_TGK, value_TGV, layout.tiles, *terms)
    else:
        out_THV = ragged_attention(query_THK, key_TGK, value_TGV, layout.segments_S4, *terms)
    return (split.back(out_THV) if split else out_THV).unsqueeze(0)


def _chunk(module: nn.Module) -> int | None:
    """The chunk that a layer's queries are confined to, in tokens (Llama 4); None in other layers."""
    config = getattr(module, "config", None)
    size, kinds = getattr(config, "attention_chunk_size", None), getattr(config, "layer_types", None)
    if size is None or kinds is None:
        return None  # before the number of the layer is read: a compiled layer that reads it serves no other layer
    layer = getattr(module, "layer_idx", None)
    return size if layer is not None and kinds[layer] == "chunked_attention" else None


def _temperature(module: Any, layout: AttentionLayout, query: Tensor) -> Tensor | float:
    """By how much the queries [1, H, T, K] of Llama 4's layers without rotation are off, [T, 1].

    These layers scale a query by its number in the row, which is its position only in a row of one text. The scale is
    1 for the first `floor_scale` tokens (8192).
    """
    part = current_part()  # the layer numbers the rows of this rank
    if query.shape[2] * (part.ranks.size if part else 1) < module.floor_scale:
        return 1.0
    position_T = torch.cat([torch.arange(d - c, d - c + b - a) for a, b, c, d in layout.segments_S4.tolist()])
    if part:
        position_T = position_T[part.rows]
    row_T = torch.arange(query.shape[2])
    wrong_T, right_T = (
        torch.log1p(torch.floor((place.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0
        for place in (row_T, position_T)
    )
    return (right_T / wrong_T)[:, None].to(query.device, query.dtype)


@lru_cache(maxsize=2)  # the layers of one forward
def chunked(layout: AttentionLayout, size: int) -> AttentionLayout:
    """The layout in which a token sees only the tokens of its own chunk of `size` positions.

    Example: a segment of 5 rows with a prefix of 2 has the positions 2 .. 7. With a size of 4 it becomes a segment of
    the positions 2 and 3, which sees the prefix, and one of the positions 4 .. 7, which sees itself.
    """
    pieces = []
    for start, end, prefix_start, prefix_end in layout.segments_S4.tolist():
        prefix = prefix_end - prefix_start
        origin = start - prefix  # the row of position 0, if the prefix lay before the segment
        for first in range(prefix // size * size, prefix + end - start, size):
            begin, stop = max(start, origin + first), min(end, origin + first + size)
            seen = (min(prefix_start + first, prefix_end), prefix_end) if first < prefix else (begin, begin)
            pieces.append((begin, stop, *seen))
    found = AttentionLayout(torch.tensor(pieces, dtype=torch.int32).reshape(-1, 4))
    if layout.device_segments_S4 is None:
        return found
    device = layout.device_segments_S4.device
    return found.for_varlen().mapped(lambda index: index.to(device, non_blocking=True))


AttentionInterface.register(NAME, attention_forward)


def composed_attention(
    query_THK: Tensor,
    key_TGK: Tensor,
    value_TGV: Tensor,
    segments_S4: Tensor,
    scale: float,
    window: int,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
    slopes_H: Tensor | None = None,
) -> Tensor:
    """The same function by one call of PyTorch's own attention per segment. Any device, any floating dtype.

    Soft cap, sinks and slopes take products and a softmax in fp32 (fp64 for fp64 input) instead.
    """
    outputs = []
    terms = Terms(scale, window, softcap, sinks_H, slopes_H)
    share = query_THK.shape[1] // key_TGK.shape[1]
    for start, end, prefix_start, prefix_end in segments_S4.tolist():
        query, key, value = query_THK[start:end], key_TGK[start:end], value_TGV[start:end]
        prefix = prefix_end - prefix_start
        if prefix:
            key = torch.cat([key_TGK[prefix_start:prefix_end], key])
            value = torch.cat([value_TGV[prefix_start:prefix_end], value])
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        behind = prefix + torch.arange(end - start, device=query.device)[:, None]
        behind = behind - torch.arange(key.shape[0], device=query.device)[None, :]
        visible = (behind >= 0) & (behind < window) if window else behind >= 0
        if terms.plain:
            mask = visible if prefix or 0 < window < end - start else None
            out = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=share > 1
            )
        else:
            wide = torch.float64 if query.dtype == torch.float64 else torch.float32
            with torch.autocast(query.device.type, enabled=False):
                k, v = (x.to(wide).repeat_interleave(share, 1) for x in (k, v))
                scores = terms.adjusted(q[0].to(wide) @ k[0].mT * scale, behind).masked_fill(~visible, -torch.inf)
                out = (terms.softmax(scores) @ v).to(value.dtype)
        outputs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)
