"""Attention of many texts by one call of a variable-length kernel of PyTorch, on CUDA.

Input: queries [N, H, K], keys [T, G, K] and values [T, G, V] of a packed row, and a `GatherPlan`: which rows are the
keys of each segment of queries.
Output: [N, H, V].
Example: the last layer of a row of 26,000 tokens with 128 scored answers: 128 queries, each a segment of its own, with
some 200 keys each. Without the plan it would be 128 x 26,000 scores and a mask of that size.

Half precision runs FlashAttention (`varlen_attn`). It has no fp32; there PyTorch's memory-efficient kernel runs, which
has neither grouped heads nor, in its backward, windows.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rmcore.model.attention_terms import Terms
from rmcore.ops.gather_prefix import GatherPlan, gather_prefix_kv


class UnsupportedAttention(Exception):
    """The architecture needs something from attention that the packed paths do not compute."""


HALF = (torch.bfloat16, torch.float16)
FROM_BOTTOM_RIGHT = 2  # causal masks of the memory-efficient kernel: aligned there


def takes_varlen(key: Tensor, value: Tensor, terms: Terms) -> bool:
    """Whether a kernel has this precision and these terms. Only batches for CUDA bring the plan that it needs."""
    if value.dtype in HALF:
        return terms.plain
    if torch.compiler.is_compiling():  # torch (2.11 to 2.13) cannot trace the backward of the fp32 kernel
        return False
    aligned = key.shape[-1] % 4 == value.shape[-1] % 4 == 0  # 16 bytes
    return value.dtype == key.dtype == torch.float32 and terms.plain and not terms.window and aligned


@cache
def _kernel() -> tuple[Callable[..., Any], bool]:
    """PyTorch's function, and whether it has to be given `enable_gqa` for G < H key heads.

    The kernel itself takes grouped heads in every version; the argument came with torch 2.12.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:  # a build without it
        raise UnsupportedAttention("torch.nn.attention.varlen") from error
    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def varlen_attention(query_NHK: Tensor, key_TGK: Tensor, value_TGV: Tensor, plan: GatherPlan, terms: Terms) -> Tensor:
    """softmax(scale q k^T) v of every segment; queries in place, keys and values gathered as [prefix, own rows].

    The kernel aligns causal masks of unequal lengths at the bottom right, which is what [prefix, own rows] needs.
    Windows are right because the gathered keys are contiguous. The gather's backward sums the gradients that the
    answers contribute to the prefix. The kernel has one head size; the smaller ones are padded with zeros (MLA has
    K = 192 and V = 128), which changes no score and adds zeros to the output, cut off again.
    """
    if value_TGV.dtype == torch.float32:
        return _memory_efficient(query_NHK, key_TGK, value_TGV, plan, terms.scale)
    # Under autocast the rotary embedding makes queries and keys fp32, while values stay in half precision.
    query_NHK, key_TGK = query_NHK.to(value_TGV.dtype), key_TGK.to(value_TGV.dtype)
    size, size_v = query_NHK.shape[2], value_TGV.shape[2]
    if size != size_v:
        query_NHK, key_TGK = (F.pad(x, (0, max(0, size_v - size))) for x in (query_NHK, key_TGK))
        value_TGV = F.pad(value_TGV, (0, max(0, size - size_v)))
    key, value = gather_prefix_kv(key_TGK, value_TGV, plan)
    out_NHV = attend_gathered(query_NHK, key, value, plan, terms)
    return out_NHV[..., :size_v] if size_v < size else out_NHV


def attend_gathered(query_NHK: Tensor, key_MGK: Tensor, value_MGK: Tensor, plan: GatherPlan, terms: Terms) -> Tensor:
    """FlashAttention over keys and values [M, G, K] that are gathered already, all in half precision."""
    varlen_attn, has_argument = _kernel()
    grouped = {"enable_gqa": True} if has_argument and query_NHK.shape[1] != key_MGK.shape[1] else {}
    return varlen_attn(
        query_NHK.contiguous(),
        key_MGK,
        value_MGK,
        plan.cu_q,
        plan.cu_k,
        plan.max_q,
        plan.max_k,
        scale=terms.scale,
        window_size=(terms.window - 1 if terms.window else -1, 0),
        **grouped,
    )


def _memory_efficient(query_NHK: Tensor, key_TGK: Tensor, value_TGV: Tensor, plan: GatherPlan, scale: float) -> Tensor:
    """The same in fp32. The gather takes keys and values of one size, so unequal ones are gathered one by one."""
    if key_TGK.shape == value_TGV.shape:
        key, value = gather_prefix_kv(key_TGK, value_TGV, plan)
    else:
        key, value = (gather_prefix_kv(x, x.detach(), plan)[0] for x in (key_TGK, value_TGV))
    share = query_NHK.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(share, 1) if share > 1 else x for x in (key, value))
    # Its public function, scaled_dot_product_attention, takes no lengths.
    return torch.ops.aten._efficient_attention_forward(
        query_NHK.contiguous().unsqueeze(0),
        key.unsqueeze(0),
        value.unsqueeze(0),
        None,  # bias
        plan.cu_q,
        plan.cu_k,
        plan.max_q,
        plan.max_k,
        0.0,  # dropout
        FROM_BOTTOM_RIGHT,
        True,  # the log-sum-exp, for the backward
        scale=scale,
    )[0].squeeze(0)
