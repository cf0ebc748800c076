"""Attention over a packed row in which answers share their prompt: each query sees its text, and nothing else.

Enters: what a Hugging Face attention layer passes to an attention function (query, key, value [1, H, T, head size]),
and the batch's `AttentionLayout`. Leaves: the attention output [1, T, H, head size], as those layers expect it.

Example: the row [p0 p1 | a | b] (prompt of 2, answers a and b) has the segments (0, 3, 0, 0) and (3, 4, 0, 2): a sees
p0 p1 a; b sees p0 p1 b, never a. It is exact: attention is causal, so the hidden states of p0 p1 do not depend on a
or b.

Three paths compute the same function: the C++ op (CPU), `varlen_attn` (CUDA, half precision) with the shared keys
gathered once for each answer, and a composition of PyTorch calls a segment, for everything else.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from rmcore.data.batches.batch import AttentionLayout
from rmcore.model.backbone import decoder_layers
from rmcore.model.pruning import LAYOUT, ScoredRows
from rmcore.ops.gather_prefix import gather_prefix_kv
from rmcore.ops.ragged_attention import ragged_attention

NAME = "rmcore_ragged"


class UnsupportedAttention(Exception):
    """The architecture asks attention for something that the ragged paths do not compute."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention-function contract (AttentionInterface) for packed rows.

    query [1, H, T, K]; key, value [1, G, T, K] with H a multiple of G (grouped-query attention). `sliding_window`
    counts the keys that a query sees, itself included, along its own text. Raises UnsupportedAttention for a mask,
    dropout, soft
    capping, attention sinks or a position bias: the start-up self-test then chooses a slower path.
    """
    asked = [name for name in ("softcap", "s_aux", "position_bias", "alibi") if kwargs.get(name) is not None]
    if attention_mask is not None or dropout or asked:
        raise UnsupportedAttention(", ".join(asked) or "an attention mask or dropout")
    layout: AttentionLayout | ScoredRows = kwargs[LAYOUT]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = sliding_window or 0
    query_THK, key_TGK, value_TGK = (x[0].transpose(0, 1) for x in (query, key, value))
    if isinstance(layout, ScoredRows):
        layout.attended.append(layout.attend(query_THK, key_TGK, value_TGK, scale, window).flatten(1).unsqueeze(0))
        # The layer's code reshapes what it gets to [1, T, any]; the output projection then takes what was laid aside.
        return value.new_empty(1, value.shape[2], 1, 1), None
    if value.is_cuda and value.dtype in (torch.bfloat16, torch.float16):
        out_THK = _varlen(query_THK, key_TGK, value_TGK, layout, scale, window)
    elif query.is_cuda:
        out_THK = composed_attention(query_THK, key_TGK, value_TGK, layout.segments_S4, scale, window)
    else:
        out_THK = ragged_attention(query_THK, key_TGK, value_TGK, layout.segments_S4, scale, window)
    return out_THK.unsqueeze(0), None


AttentionInterface.register(NAME, attention_forward)


def compile_layers(backbone: nn.Module) -> None:
    """torch.compile for each decoder layer but the last, whatever the number of tokens; attention stays as it is.

    Layers are alike, so one compilation serves them all; the last one runs on other shapes (rmcore.model.pruning). The
    calls inside attention depend on lengths that change with every batch: they are kept out of what is compiled.
    """
    AttentionInterface.register(NAME, torch.compiler.disable(attention_forward))
    for layer in decoder_layers(backbone)[:-1]:
        layer.compile(dynamic=True)


def composed_attention(
    query_THK: Tensor, key_TGK: Tensor, value_TGK: Tensor, segments_S4: Tensor, scale: float, window: int
) -> Tensor:
    """The same function from PyTorch's own attention, one call a segment. Any device, any floating dtype."""
    outputs = []
    grouped = query_THK.shape[1] != key_TGK.shape[1]
    for start, end, prefix_start, prefix_end in segments_S4.tolist():
        query, key, value = query_THK[start:end], key_TGK[start:end], value_TGK[start:end]
        prefix = prefix_end - prefix_start
        if prefix:
            key = torch.cat([key_TGK[prefix_start:prefix_end], key])
            value = torch.cat([value_TGK[prefix_start:prefix_end], value])
        mask = None
        if prefix or 0 < window < end - start:
            ahead = prefix + torch.arange(end - start, device=query.device)[:, None]
            ahead = ahead - torch.arange(key.shape[0], device=query.device)[None, :]
            mask = (ahead >= 0) & (ahead < window) if window else ahead >= 0
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


@cache
def _varlen_kernel() -> tuple[Callable[..., Any], bool]:
    """PyTorch's variable-length attention and whether it takes unequal head counts (2.12 and later do)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:  # a build without it
        raise UnsupportedAttention("torch.nn.attention.varlen") from error
    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def _varlen(
    query_THK: Tensor, key_TGK: Tensor, value_TGK: Tensor, layout: AttentionLayout, scale: float, window: int
) -> Tensor:
    """One kernel call for all segments: queries as they lie, keys and values gathered as [prefix, own] for each
    segment.

    Causal masks of unequal lengths are aligned at the bottom right, which is what [prefix, own] needs; windows stay
    right because the gathered keys are contiguous. The gather's backward adds what the answers contribute to the
    prefix.
    """
    varlen_attn, takes_groups = _varlen_kernel()
    plan = layout.gather
    if plan is None:
        raise ValueError("the batch has no gather plan: use RaggedBatch.on to move a batch")
    # Under autocast the rotary tables, in fp32, leave queries and keys in fp32 beside half-precision values.
    query_THK, key_TGK = query_THK.to(value_TGK.dtype), key_TGK.to(value_TGK.dtype)
    key, value = gather_prefix_kv(key_TGK, value_TGK, plan)
    groups = query_THK.shape[1] // key.shape[1]
    extra = {}
    if groups > 1 and takes_groups:
        extra["enable_gqa"] = True
    elif groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return varlen_attn(
        query_THK.contiguous(), key, value, plan.cu_q, plan.cu_k, plan.max_q, plan.max_k,
        scale=scale, window_size=(window - 1 if window else -1, 0), **extra,
    )  # fmt: skip
