"""Attention over a packed row in which answers share their prompt: each query sees its own text and nothing else.

Input: what a Hugging Face attention layer passes to an attention function (query [1, H, T, K], key and value
[1, G, T, K]), and the batch's `AttentionLayout`. Output: the attention output [1, T, H, K], as those layers expect it.
Example: the row [p0 p1 | a | b] (a prompt of 2 tokens, answers a and b) has the segments (0, 3, 0, 0) and (3, 4, 0, 2).
a sees p0 p1 a; b sees p0 p1 b, never a.

It is exact: attention is causal, so the hidden states of p0 p1 do not depend on a or b. Three implementations compute
the same function: the op `ragged_attention` (CPU), `varlen_attn` with the shared keys gathered once for each answer
(CUDA in half precision), and one PyTorch call per segment (CUDA in other precisions).
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
from rmcore.model.layout_context import current_layout
from rmcore.model.pruning import current_scored_rows
from rmcore.ops.gather_prefix import gather_prefix_kv
from rmcore.ops.ragged_attention import ragged_attention

NAME = "rmcore_ragged"


class UnsupportedAttention(Exception):
    """The architecture needs something from attention that the packed paths do not compute."""


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

    query [1, H, T, K]; key, value [1, G, T, K] with H a multiple of G (grouped-query attention). `sliding_window` is
    the number of keys that a query sees along its own text, itself included. Raises UnsupportedAttention for a mask,
    dropout, soft capping, attention sinks or a position bias; the start-up self-test then chooses a slower path.
    """
    unsupported = [name for name in ("softcap", "s_aux", "position_bias", "alibi") if kwargs.get(name) is not None]
    if attention_mask is not None or dropout or unsupported:
        raise UnsupportedAttention(", ".join(unsupported) or "an attention mask or dropout")
    layout = current_layout()
    if layout is None:
        raise UnsupportedAttention("attention outside a packed forward")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = sliding_window or 0
    # squeeze, not [0]: the backward of an index fills a tensor with zeros and copies the gradient into it.
    query_THK, key_TGK, value_TGK = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if scored := current_scored_rows():
        return scored.attend(query_THK, key_TGK, value_TGK, scale, window).unsqueeze(0), None
    if value.is_cuda and value.dtype in (torch.bfloat16, torch.float16):
        out_THK = _varlen(query_THK, key_TGK, value_TGK, layout, scale, window)
    elif query.is_cuda:
        out_THK = composed_attention(query_THK, key_TGK, value_TGK, layout.segments_S4, scale, window)
    else:
        out_THK = ragged_attention(query_THK, key_TGK, value_TGK, layout.segments_S4, scale, window)
    return out_THK.unsqueeze(0), None


AttentionInterface.register(NAME, attention_forward)


def compile_layers(backbone: nn.Module) -> None:
    """Compile each decoder layer except the last with torch.compile, for any number of tokens.

    The layers are alike, so one compilation serves all of them; the last layer runs on other shapes
    (rmcore.model.pruning). Attention is not compiled, because its calls depend on lengths that change with every batch.
    """
    AttentionInterface.register(NAME, torch.compiler.disable(attention_forward))
    for layer in decoder_layers(backbone)[:-1]:
        layer.compile(dynamic=True)


def composed_attention(
    query_THK: Tensor, key_TGK: Tensor, value_TGK: Tensor, segments_S4: Tensor, scale: float, window: int
) -> Tensor:
    """The same function by one call of PyTorch's own attention per segment. Any device, any floating dtype."""
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
        outputs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


@cache
def _varlen_kernel() -> tuple[Callable[..., Any], bool]:
    """PyTorch's variable-length attention, and whether it accepts G < H key heads (torch 2.12 and later do)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:  # a build without it
        raise UnsupportedAttention("torch.nn.attention.varlen") from error
    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def _varlen(
    query_THK: Tensor, key_TGK: Tensor, value_TGK: Tensor, layout: AttentionLayout, scale: float, window: int
) -> Tensor:
    """One kernel call for all segments: queries in place, keys and values gathered as [prefix, own rows] per segment.

    The kernel aligns causal masks of unequal lengths at the bottom right, which is what [prefix, own rows] needs.
    Windows are right because the gathered keys are contiguous. The gather's backward sums the gradients that the
    answers contribute to the prefix.
    """
    varlen_attn, takes_groups = _varlen_kernel()
    plan = layout.gather
    if plan is None:
        raise ValueError("the batch has no gather plan: use RaggedBatch.on to move a batch")
    # Under autocast the rotary embedding makes queries and keys fp32, while values stay in half precision.
    query_THK, key_TGK = query_THK.to(value_TGK.dtype), key_TGK.to(value_TGK.dtype)
    key, value = gather_prefix_kv(key_TGK, value_TGK, plan)
    groups = query_THK.shape[1] // key.shape[1]
    extra = {}
    if groups > 1 and takes_groups:
        extra["enable_gqa"] = True
    elif groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    window_size = (window - 1 if window else -1, 0)
    query_THK = query_THK.contiguous()
    return varlen_attn(
        query_THK,
        key,
        value,
        plan.cu_q,
        plan.cu_k,
        plan.max_q,
        plan.max_k,
        scale=scale,
        window_size=window_size,
        **extra,
    )
