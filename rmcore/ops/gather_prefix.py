"""Gathers keys and values for variable-length attention, with the shared prompt repeated for each answer.

Input: k and v [T, G, K] of one packed row, and a `GatherPlan` made from its segments (see ragged_attention.py).
Output: k and v [M, G, K], in which the keys of each segment lie together as [prefix, own rows]. In the backward, the
gradient of a row is the sum of the gradients of its copies, in fp32 and in the order of the copies.
Example: segments [[0, 4, 0, 0], [4, 5, 0, 2]] of T = 5 rows [p0 p1 a0 a1 | b0]: the keys are rows [0 1 2 3 | 0 1 4],
cu_q = [0, 4, 5], cu_k = [0, 4, 7]; d k of row 0 is the sum of the gradients of copies 0 and 4.

The result is meant for `torch.nn.attention.varlen.varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, ...)`, causal and
aligned at the bottom right. This file is the contract and the PyTorch reference.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rmcore.ops.contract import LIBRARY, accumulate_dtype, add_at, differentiable_once

LIBRARY.define(
    "gather_prefix(Tensor k, Tensor v, Tensor key_index, Tensor copy_offset, Tensor copies) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "gather_prefix_backward(Tensor grad_k, Tensor grad_v, Tensor copy_offset, Tensor copies) -> (Tensor, Tensor)"
)


class GatherPlan(NamedTuple):
    """Where keys come from, and the lengths that variable-length attention wants; made on the host, moved once."""

    key_index: Tensor  # int64 [M]: the source row of each key
    copy_offset: Tensor  # int64 [T + 1]: copies of row t are copies[copy_offset[t] : copy_offset[t + 1]]
    copies: Tensor  # int64 [M]: key positions, by source row, rising within a row
    cu_q: Tensor  # int32 [S + 1]
    cu_k: Tensor  # int32 [S + 1]
    max_q: int
    max_k: int

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "GatherPlan":
        """The same plan with its tensors changed: pinned, or moved to a device."""
        return GatherPlan(*(change(value) if isinstance(value, Tensor) else value for value in self))  # type: ignore[arg-type]


def gather_plan(segments_S4: Tensor) -> GatherPlan:
    """The plan of a packed row, on the CPU. `segments_S4` (int32, CPU) tile the row, as in ragged_attention.py."""
    segments = segments_S4.numpy().astype(np.int64)
    return _plan(segments, segments[:, 1] - segments[:, 0], tokens=int(segments[:, 1].max(initial=0)))


def scored_plan(segments_S4: Tensor, rows_A: np.ndarray) -> GatherPlan:
    """The plan for the rows `rows_A` as queries, in their order; each row sees what it sees in its segment.

    Example: the segments [[0, 4, 0, 0], [4, 5, 0, 2]] and the rows [3, 4]: the keys are rows [0 1 2 3 | 0 1 4],
    cu_q = [0, 1, 2], cu_k = [0, 4, 7].
    """
    segments = segments_S4.numpy().astype(np.int64)
    own_A4 = segments[np.searchsorted(segments[:, 0], rows_A, side="right") - 1].copy()
    own_A4[:, 1] = rows_A + 1
    return _plan(own_A4, np.ones(len(rows_A), dtype=np.int64), tokens=int(segments[-1, 1]))


def _plan(segments_S4: np.ndarray, queries_S: np.ndarray, tokens: int) -> GatherPlan:
    """The keys of segments, which need not tile the `tokens` rows. The last `queries_S` rows of each are queries."""
    query_start_S, query_end_S, prefix_start_S, prefix_end_S = segments_S4.T
    # A segment without queries gets no keys either: no kernel has to write their gradients.
    prefix_S = np.where(queries_S > 0, prefix_end_S - prefix_start_S, 0)
    keys_S = prefix_S + query_end_S - query_start_S
    cu_q, cu_k = (np.concatenate([[0], np.cumsum(lengths)]) for lengths in (queries_S, keys_S))
    # The keys of a segment are its prefix rows, then its own rows. Key number `place` of a segment is therefore row
    # prefix_start + place while place < prefix, and row query_start + (place - prefix) afterwards.
    place_M = np.arange(cu_k[-1]) - np.repeat(cu_k[:-1], keys_S)
    in_prefix_M = place_M < np.repeat(prefix_S, keys_S)
    first_M = np.where(in_prefix_M, np.repeat(prefix_start_S, keys_S), np.repeat(query_start_S - prefix_S, keys_S))
    key_index = first_M + place_M
    # The inverse: keys sorted by their row, and where the keys of each row begin.
    copy_offset = np.concatenate([[0], np.cumsum(np.bincount(key_index, minlength=tokens))])
    return GatherPlan(
        key_index=torch.from_numpy(key_index),
        copy_offset=torch.from_numpy(copy_offset),
        copies=torch.from_numpy(np.argsort(key_index, kind="stable")),
        cu_q=torch.from_numpy(cu_q.astype(np.int32)),
        cu_k=torch.from_numpy(cu_k.astype(np.int32)),
        max_q=int(queries_S.max(initial=0)),
        max_k=int(keys_S.max(initial=0)),
    )


def gather_prefix_kv(k_TGK: Tensor, v_TGK: Tensor, plan: GatherPlan) -> tuple[Tensor, Tensor]:
    """k and v [M, G, K], contiguous: rows plan.key_index of k_TGK and v_TGK ([T, G, K], fp32, bf16, fp16 or fp64).

    The plan must be on their device and made for T rows. Differentiable once, bitwise repeatable.
    Raises ValueError for shapes or devices outside this contract.
    """
    if k_TGK.dim() != 3 or k_TGK.shape != v_TGK.shape or k_TGK.dtype != v_TGK.dtype:
        got = f"{k_TGK.dtype} {list(k_TGK.shape)} and {v_TGK.dtype} {list(v_TGK.shape)}"
        raise ValueError(f"gather_prefix_kv: expected k and v [T, G, K] of one dtype, got {got}")
    if plan.copy_offset.shape[0] != k_TGK.shape[0] + 1:
        raise ValueError(
            f"gather_prefix_kv: the plan is for {plan.copy_offset.shape[0] - 1} rows, k has {k_TGK.shape[0]}"
        )
    if not k_TGK.device == v_TGK.device == plan.key_index.device == plan.copies.device == plan.copy_offset.device:
        raise ValueError(f"gather_prefix_kv: k, v and the plan must be on one device, not {k_TGK.device} and others")
    return torch.ops.rmcore.gather_prefix(k_TGK, v_TGK, plan.key_index, plan.copy_offset, plan.copies)


def reference_forward(
    k: Tensor, v: Tensor, key_index: Tensor, copy_offset: Tensor, copies: Tensor
) -> tuple[Tensor, Tensor]:
    """The specification. Only the backward uses the copies."""
    return k.index_select(0, key_index), v.index_select(0, key_index)


def reference_backward(grad_k: Tensor, grad_v: Tensor, copy_offset: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """d k and d v [T, G, K], contiguous: each row is the ordered sum of its copies."""
    row = torch.repeat_interleave(copy_offset.diff(), output_size=copies.shape[0])
    return _sum_copies(grad_k, row, copies, copy_offset), _sum_copies(grad_v, row, copies, copy_offset)


def _sum_copies(grad: Tensor, row: Tensor, copies: Tensor, copy_offset: Tensor) -> Tensor:
    dtype = accumulate_dtype(grad)
    total = grad.new_zeros((copy_offset.shape[0] - 1, *grad.shape[1:]), dtype=dtype)
    return add_at(total, row, grad.index_select(0, copies).to(dtype)).to(grad.dtype)


LIBRARY.impl("gather_prefix", reference_forward, "CompositeExplicitAutograd")
LIBRARY.impl("gather_prefix_backward", reference_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("rmcore::gather_prefix", lib=LIBRARY)
def _(k, v, key_index, copy_offset, copies):  # type: ignore[no-untyped-def]
    shape = (key_index.shape[0], *k.shape[1:])
    return k.new_empty(shape), v.new_empty(shape)


@torch.library.register_fake("rmcore::gather_prefix_backward", lib=LIBRARY)
def _(grad_k, grad_v, copy_offset, copies):  # type: ignore[no-untyped-def]
    shape = (copy_offset.shape[0] - 1, *grad_k.shape[1:])
    return grad_k.new_empty(shape), grad_v.new_empty(shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[3:])


def _backward(ctx, grad_k: Tensor, grad_v: Tensor):  # type: ignore[no-untyped-def]
    return (*torch.ops.rmcore.gather_prefix_backward(grad_k, grad_v, *ctx.saved_tensors), None, None, None)


torch.library.register_autograd("rmcore::gather_prefix", _backward, setup_context=_setup_context, lib=LIBRARY)
differentiable_once("gather_prefix_backward")
