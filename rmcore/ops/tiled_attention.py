"""Attention over packed comparisons that share their prompt, by tiles, for GPUs: contract, plan and PyTorch reference.

Input: q [N, H, K], k [T, G, K] and v [T, G, V] (H a multiple of G: grouped-query attention), and a `TilePlan`, made
from the segments of a packed row (see ragged_attention.py): N = T; or of some of its rows, the scored ones: N = A.
Output: out [N, H, V]. It is what `ragged_attention` computes, with window, soft cap, sinks and ALiBi. Keys and values
are read where they are, and nothing of the size of the scores is ever in memory.
Example: segments [[0, 4, 0, 0], [4, 5, 0, 2]] of T = 5 rows [p0 p1 a0 a1 | b0]. The queries of a segment see two pieces
of the row, their prefix and their own rows: b0 (query 4) sees the keys 0 and 1, and 4. In the backward, the keys 0 .. 3
are read by the queries 0 .. 3, and 0 and 1 of them by query 4.

A program of a kernel computes a block of queries, or in the backward a block of keys with all queries that read them.
So the gradients of a shared prompt are summed in fp32 registers, in a fixed order: reruns are bitwise equal.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rmcore.ops.contract import LIBRARY, accumulate_dtype, differentiable_once
from rmcore.ops.ragged_attention import scores_of

TERMS = "float scale, int window, float softcap"
PLAN = "Tensor pieces, Tensor query_blocks, Tensor key_blocks, Tensor readers"
LIBRARY.define(
    f"tiled_attention(Tensor q, Tensor k, Tensor v, {PLAN}, {TERMS}, Tensor? sinks, Tensor? slopes) -> (Tensor, Tensor)"
)
LIBRARY.define(
    f"tiled_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sum, {PLAN}, "
    f"{TERMS}, Tensor? slopes) -> (Tensor, Tensor, Tensor, Tensor)"
)
BLOCK = 64  # rows of a block


class TilePlan(NamedTuple):
    """Which blocks of queries see which keys, and which blocks of keys are seen by which queries.

    A piece is a range of queries and a range of keys, with the offset by which query + offset - key is the distance of
    the two in their text. A query sees the keys of its pieces whose distance is not negative.
    """

    pieces: Tensor  # int32 [2 S, 5]: first query, its end, first key, its end, offset; of each segment prefix and own
    query_blocks: Tensor  # int32 [., 4]: first query, its end, first piece, its end
    key_blocks: Tensor  # int32 [., 4]: first key, its end, first place in `readers`, its end
    readers: Tensor  # int32: pieces

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "TilePlan":
        """The same plan with its tensors changed: pinned, or moved to a device."""
        return TilePlan(*map(change, self))


def tile_plan(segments_S4: Tensor, rows_A: np.ndarray | None = None) -> TilePlan:
    """The plan of a packed row, on the CPU. `segments_S4` (int32, CPU) tile the row, as in ragged_attention.py.

    rows_A: with these rows as the queries, in this order; each sees what it sees in its segment.
    """
    segments = segments_S4.numpy().astype(np.int64)
    own = segments if rows_A is None else segments[np.searchsorted(segments[:, 0], rows_A, side="right") - 1]
    start_S, end_S, prefix_start_S, prefix_end_S = own.T
    first_S, last_S = start_S, end_S
    if rows_A is not None:
        first_S, last_S, end_S = np.arange(len(rows_A)), np.arange(len(rows_A)) + 1, rows_A + 1
    # The last query of a segment is its last row. A prefix lies before the segment's first row.
    offset_S = end_S - last_S
    prefix = np.stack([first_S, last_S, prefix_start_S, prefix_end_S, offset_S - start_S + prefix_end_S], 1)
    pieces = np.stack([prefix, np.stack([first_S, last_S, start_S, end_S, offset_S], 1)], 1).reshape(-1, 5)

    segment_B, query_blocks = _blocks(first_S, last_S)
    query_blocks = np.column_stack([query_blocks, 2 * segment_B, 2 * segment_B + 2])

    # The blocks of keys tile the row, so each piece is read from consecutive ones.
    _, key_blocks = _blocks(segments[:, 0], segments[:, 1])
    used = np.flatnonzero((pieces[:, 0] < pieces[:, 1]) & (pieces[:, 2] < pieces[:, 3]))
    first_P = np.searchsorted(key_blocks[:, 1], pieces[used, 2], side="right")
    count_P = np.searchsorted(key_blocks[:, 0], pieces[used, 3], side="left") - first_P
    block_R = np.repeat(first_P, count_P) + _counted(count_P)
    readers = np.repeat(used, count_P)[np.argsort(block_R, kind="stable")]
    end_C = np.cumsum(np.bincount(block_R, minlength=len(key_blocks)))
    key_blocks = np.column_stack([key_blocks, np.concatenate([[0], end_C[:-1]])[: len(key_blocks)], end_C])
    found = (pieces, query_blocks, key_blocks, readers)
    return TilePlan(*(torch.from_numpy(array.astype(np.int32)) for array in found))


def _counted(count_S: np.ndarray) -> np.ndarray:
    """0 .. count - 1, one after the other for all counts."""
    return np.arange(count_S.sum()) - np.repeat(np.cumsum(count_S) - count_S, count_S)


def _blocks(first_S: np.ndarray, last_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of at most BLOCK rows of the ranges: the range of each, and its first row and end [., 2]."""
    count_S = -(-(last_S - first_S) // BLOCK)
    range_B = np.repeat(np.arange(len(count_S)), count_S)
    first_B = first_S[range_B] + BLOCK * _counted(count_S)
    return range_B, np.column_stack([first_B, np.minimum(first_B + BLOCK, last_S[range_B])])


def tiled_attention(
    q_NHK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    plan: TilePlan,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
    slopes_H: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v over the keys that the plan makes visible to each query; see `ragged_attention`.

    Args:
        q_NHK, k_TGK, v_TGV: fp32, bf16, fp16 or fp64, with any strides. q and k are cast to v's dtype.
        plan: on their device, made for N queries and T rows.
    Returns:
        [N, H, V], contiguous, in v's dtype; differentiable once with respect to q, k, v and sinks, bitwise repeatable.
        Sums and softmax run in fp32 (fp64 for fp64).
    Raises:
        ValueError: shapes or devices outside this contract.
    """
    q, k, v = q_NHK, k_TGK, v_TGV
    alike = q.dim() == k.dim() == v.dim() == 3 and k.shape[:2] == v.shape[:2] and q.shape[2] == k.shape[2]
    if not alike or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        shapes = f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        raise ValueError(f"tiled_attention: expected q [N, H, K], k [T, G, K] and v [T, G, V], got {shapes}")
    if not q.device == k.device == v.device == plan.pieces.device == plan.key_blocks.device:
        raise ValueError(f"tiled_attention: q, k, v and the plan must be on one device, not {q.device} and others")
    for heads in (sinks_H, slopes_H):
        if heads is not None and (heads.shape != q.shape[1:2] or heads.device != q.device):
            raise ValueError(f"tiled_attention: expected sinks and slopes [H], got {list(heads.shape)}")
    q, k = q.to(v.dtype), k.to(v.dtype)
    return torch.ops.rmcore.tiled_attention(q, k, v, *plan, scale, window, softcap, sinks_H, slopes_H)[0]


def _visible(pieces: Tensor, query_blocks: Tensor, window: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Of each block of queries: its queries, its keys [M], how far each is ahead of the query, and which it sees."""
    device, its_pieces = pieces.device, pieces.tolist()
    for first, last, first_piece, last_piece in query_blocks.tolist():
        query_L1 = torch.arange(first, last, device=device)[:, None]
        ranges = its_pieces[first_piece:last_piece]
        keys = [torch.arange(k_first, k_last, device=device) for _, _, k_first, k_last, _ in ranges]
        ahead = [its - query_L1 - offset for its, (*_, offset) in zip(keys, ranges, strict=True)]
        ahead_LM = torch.cat(ahead, 1)
        visible_LM = (ahead_LM <= 0) & (ahead_LM > -window) if window else ahead_LM <= 0
        yield slice(first, last), torch.cat(keys), ahead_LM, visible_LM


def reference_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pieces: Tensor,
    query_blocks: Tensor,
    key_blocks: Tensor,
    readers: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The specification: (out [N, H, V], log-sum-exp of the scores, the sinks' included [H, N])."""
    dtype, share = accumulate_dtype(q, k, v), q.shape[1] // k.shape[1]
    out = q.new_empty((*q.shape[:2], v.shape[2]))
    log_sum = q.new_empty((q.shape[1], q.shape[0]), dtype=dtype)
    for rows, keys, ahead_LM, visible_LM in _visible(pieces, query_blocks, window):
        keys_HMK, values_HMV = (x[keys].to(dtype).transpose(0, 1).repeat_interleave(share, 0) for x in (k, v))
        scores_HLM = scores_of(q[rows].to(dtype).transpose(0, 1), keys_HMK, ahead_LM, scale, softcap, slopes)[0]
        scores_HLM = scores_HLM.masked_fill(~visible_LM, -torch.inf)
        log_sum_HL = scores_HLM.logsumexp(-1)
        if sinks is not None:
            log_sum_HL = torch.logaddexp(log_sum_HL, sinks.to(dtype)[:, None])
        log_sum[:, rows] = log_sum_HL
        out[rows] = ((scores_HLM - log_sum_HL[..., None]).exp() @ values_HMV).transpose(0, 1).to(v.dtype)
    return out, log_sum


def reference_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    pieces: Tensor,
    query_blocks: Tensor,
    key_blocks: Tensor,
    readers: Tensor,
    scale: float,
    window: int,
    softcap: float,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, delta [H, N]): delta = dO . O, the sum of P * dP, of which the sinks' gradient is made."""
    dtype, (heads, share) = log_sum.dtype, (k.shape[1], q.shape[1] // k.shape[1])
    grad_q = q.new_empty(q.shape)
    grad_k, grad_v = (x.new_zeros(x.shape, dtype=dtype) for x in (k, v))
    delta = torch.empty_like(log_sum)
    for rows, keys, ahead_LM, visible_LM in _visible(pieces, query_blocks, window):
        keys_HMK, values_HMV = (x[keys].to(dtype).transpose(0, 1).repeat_interleave(share, 0) for x in (k, v))
        queries_HLK, grad_HLV, out_HLV = (x[rows].to(dtype).transpose(0, 1) for x in (q, grad_out, out))
        # The probabilities P again, from the scores and their saved log-sum-exp.
        scores_HLM, derivative = scores_of(queries_HLK, keys_HMK, ahead_LM, scale, softcap, slopes)
        p_HLM = (scores_HLM.masked_fill(~visible_LM, -torch.inf) - log_sum[:, rows, None]).exp()
        # The gradient of the softmax: dS = P * (dP - sum(P * dP)). A sink adds nothing, because its value is zero.
        delta[:, rows] = (grad_HLV * out_HLV).sum(-1)
        grad_scores_HLM = p_HLM * (grad_HLV @ values_HMV.mT - delta[:, rows, None]) * derivative * scale
        grad_q[rows] = (grad_scores_HLM @ keys_HMK).transpose(0, 1).to(q.dtype)
        for total, part in ((grad_k, grad_scores_HLM.mT @ queries_HLK), (grad_v, p_HLM.mT @ grad_HLV)):
            total[keys] += part.unflatten(0, (heads, share)).sum(1).transpose(0, 1)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), delta


LIBRARY.impl("tiled_attention", reference_forward, "CompositeExplicitAutograd")
LIBRARY.impl("tiled_attention_backward", reference_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("rmcore::tiled_attention", lib=LIBRARY)
def _(q, k, v, *others):  # type: ignore[no-untyped-def]
    log_sum = q.new_empty((q.shape[1], q.shape[0]), dtype=accumulate_dtype(q, k, v))
    return q.new_empty((*q.shape[:2], v.shape[2])), log_sum


@torch.library.register_fake("rmcore::tiled_attention_backward", lib=LIBRARY)
def _(grad_out, q, k, v, out, log_sum, *others):  # type: ignore[no-untyped-def]
    return *(x.new_empty(x.shape) for x in (q, k, v)), torch.empty_like(log_sum)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    (*tensors, ctx.scale, ctx.window, ctx.softcap, sinks, slopes) = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:], sinks, slopes)


def _backward(ctx, grad_out: Tensor, _):  # type: ignore[no-untyped-def]
    *tensors, sinks, slopes = ctx.saved_tensors
    terms = ctx.scale, ctx.window, ctx.softcap, slopes
    *grads, delta_HN = torch.ops.rmcore.tiled_attention_backward(grad_out, *tensors, *terms)
    grad_sinks = None
    if sinks is not None and ctx.needs_input_grad[10]:
        log_sum_HN = tensors[4]  # the sink's P * (dP - delta), whose dP is 0
        grad_sinks = -((sinks.to(log_sum_HN.dtype)[:, None] - log_sum_HN).exp() * delta_HN).sum(1).to(sinks.dtype)
    return (*grads, *[None] * 7, grad_sinks, None)


torch.library.register_autograd("rmcore::tiled_attention", _backward, setup_context=_setup_context, lib=LIBRARY)
differentiable_once("tiled_attention_backward")
