"""Causal attention over packed comparisons that share their prompt: contract and PyTorch reference.

Input: q [T, H, K], k [T, G, K] and v [T, G, V] of one packed row (H a multiple of G: grouped-query attention), and
`segments_S4`, an int32 CPU tensor of rows (query_start, query_end, prefix_start, prefix_end), each end exclusive.
Output: out [T, H, V]. A query of a segment sees the rows of the segment's prefix and, causally, the segment's own rows:
its keys are the sequence [prefix, own rows up to itself]; with `window` > 0 only the last `window` keys of it.
Example: a prompt of 2 tokens and answers of 2 and 1 tokens are packed as T = 5 rows [p0 p1 | a0 a1 | b0], segments
[[0, 4, 0, 0], [4, 5, 0, 2]]: a1 (row 3) sees rows 0 1 2 3; b0 (row 4) sees rows 0 1 4; with window 2 b0 sees rows 1 4.

Segments tile the T rows in order, and a prefix lies before its segment. Segments and prefixes may have length 0.
"""

import torch
from torch import Tensor

from rmcore.ops.contract import LIBRARY, accumulate_dtype, differentiable_once

LIBRARY.define(
    "ragged_attention(Tensor q, Tensor k, Tensor v, Tensor segments, float scale, int window, float softcap, "
    "Tensor? sinks, Tensor? slopes) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "ragged_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor log_sum, Tensor segments, "
    "float scale, int window, float softcap, Tensor? slopes) -> (Tensor, Tensor, Tensor)"
)


def ragged_attention(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    segments_S4: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
    slopes_H: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v over the rows that `segments_S4` makes visible to each query.

    Args:
        q_THK, k_TGK, v_TGV: each fp32, bf16, fp16 or fp64, with any strides (a tensor whose last dimension is not
            contiguous is copied). Sums and softmax run in fp32 (fp64 if an input is fp64). If v is bf16 and q and k are
            fp32, a kernel may round q and k to bf16, as autocast does before PyTorch's own attention.
        window: the largest number of keys that a query sees, itself included; 0 means no limit.
        softcap: if positive, a score s becomes softcap * tanh(s / softcap) (Gemma 2, arXiv 2408.00118, p. 2).
        sinks_H: scores of one more key per head, whose value is zero (gpt-oss; Xiao et al., arXiv 2309.17453).
        slopes_H: slope * (key - query) of their positions is added to a score (ALiBi, arXiv 2108.12409). No gradient.
    Returns:
        [T, H, V], contiguous, in v's dtype; differentiable once with respect to q, k, v and sinks. The gradients are
        bitwise repeatable on the CPU.
    Raises:
        ValueError: shapes, dtypes, devices or segments outside this contract.
    """
    _check(q_THK, k_TGK, v_TGV, segments_S4, window, softcap, sinks_H, slopes_H)
    return torch.ops.rmcore.ragged_attention(
        q_THK, k_TGK, v_TGV, segments_S4, scale, window, softcap, sinks_H, slopes_H
    )[0]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    slopes: Tensor | None,
) -> None:
    alike = q.dim() == k.dim() == v.dim() == 3 and k.shape[:2] == v.shape[:2] and q.shape[::2] == k.shape[::2]
    if not alike:
        shapes = f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        raise ValueError(f"ragged_attention: expected q [T, H, K], k [T, G, K] and v [T, G, V], got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"ragged_attention: {q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if not (q.is_floating_point() and k.is_floating_point() and v.is_floating_point()):
        raise ValueError(f"ragged_attention: expected floating q, k, v, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"ragged_attention: q, k, v must be on one device, got {q.device}, {k.device}, {v.device}")
    if segments.dim() != 2 or segments.shape[1] != 4 or segments.dtype != torch.int32 or segments.device.type != "cpu":
        got = f"{segments.dtype} {list(segments.shape)} on {segments.device}"
        raise ValueError(f"ragged_attention: segments must be an int32 CPU tensor [S, 4], got {got}")
    if window < 0:
        raise ValueError(f"ragged_attention: window must be 0 (none) or positive, got {window}")
    if not softcap >= 0:
        raise ValueError(f"ragged_attention: softcap must be 0 (none) or positive, got {softcap}")
    for name, heads in (("sinks", sinks), ("slopes", slopes)):
        if heads is not None and (heads.shape != q.shape[1:2] or not heads.is_floating_point()):
            raise ValueError(f"ragged_attention: expected floating {name} [H], got {heads.dtype} {list(heads.shape)}")
        if heads is not None and heads.device != q.device:
            raise ValueError(f"ragged_attention: {name} must be on {q.device} like q, got {heads.device}")


def check_segments(segments: Tensor, tokens: int) -> list[tuple[int, int, int, int]]:
    """The segments as Python integers.

    Raises ValueError unless they tile the rows in order, with each prefix before its segment.
    """
    rows = [(a, b, c, d) for a, b, c, d in segments.tolist()]
    at = 0
    for i, (query_start, query_end, prefix_start, prefix_end) in enumerate(rows):
        if query_start != at or query_end < query_start:
            raise ValueError(f"ragged_attention: segment {i} {rows[i]} must begin at row {at} and end after it")
        if not (0 <= prefix_start <= prefix_end and (prefix_start == prefix_end or prefix_end <= query_start)):
            raise ValueError(f"ragged_attention: the prefix of segment {i} {rows[i]} must lie before the segment")
        at = query_end
    if at != tokens:
        raise ValueError(f"ragged_attention: segments end at row {at}, but there are {tokens} rows")
    return rows


def _keys_and_mask(
    segment: tuple[int, int, int, int], window: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, slice]:
    """Of one segment: its key rows [M]; for its L queries, which of them each may see [L, M], and how far ahead of the
    query each key is [L, M] (0 or less if visible); and the query rows.
    """
    query_start, query_end, prefix_start, prefix_end = segment
    keys = torch.cat([torch.arange(prefix_start, prefix_end), torch.arange(query_start, query_end)]).to(device)
    prefix = prefix_end - prefix_start
    position = torch.arange(prefix, prefix + query_end - query_start, device=device)[:, None]
    column = torch.arange(keys.shape[0], device=device)[None]
    visible = column <= position
    if window > 0:
        visible &= column > position - window
    return keys, visible, column - position, slice(query_start, query_end)


def scores_of(
    queries_HLK: Tensor, keys_HMK: Tensor, ahead_LM: Tensor, scale: float, softcap: float, slopes: Tensor | None
) -> tuple[Tensor, Tensor | float]:
    """The scores [H, L, M] before the softmax, and their derivative with respect to scale * q k^T."""
    scores_HLM = queries_HLK @ keys_HMK.mT * scale
    derivative: Tensor | float = 1.0
    if softcap > 0:
        bent_HLM = torch.tanh(scores_HLM / softcap)
        scores_HLM, derivative = softcap * bent_HLM, 1 - bent_HLM.square()
    if slopes is not None:
        scores_HLM = scores_HLM + slopes.to(scores_HLM.dtype)[:, None, None] * ahead_LM
    return scores_HLM, derivative


def reference_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The specification: (out [T, H, V] in v's dtype, log-sum-exp of the scores, the sinks' included [T, H])."""
    dtype = accumulate_dtype(q, k, v)
    share = q.shape[1] // k.shape[1]
    out = torch.empty((*q.shape[:2], v.shape[2]), dtype=v.dtype, device=q.device)
    log_sum = torch.empty(q.shape[:2], dtype=dtype, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for segment in check_segments(segments, q.shape[0]):
            keys, visible, ahead_LM, rows = _keys_and_mask(segment, window, q.device)
            keys_HMK = k[keys].to(dtype).transpose(0, 1).repeat_interleave(share, 0)
            values_HMV = v[keys].to(dtype).transpose(0, 1).repeat_interleave(share, 0)
            queries_HLK = q[rows].to(dtype).transpose(0, 1)
            scores_HLM = scores_of(queries_HLK, keys_HMK, ahead_LM, scale, softcap, slopes)[0]
            scores_HLM = scores_HLM.masked_fill(~visible, -torch.inf)
            log_sum_HL, p_HLM = scores_HLM.logsumexp(-1), scores_HLM.softmax(-1)
            if sinks is not None:
                log_sum_HL = torch.logaddexp(log_sum_HL, sinks.to(dtype)[:, None])
                p_HLM = (scores_HLM - log_sum_HL[..., None]).exp()
            log_sum[rows] = log_sum_HL.mT
            out[rows] = (p_HLM @ values_HMV).transpose(0, 1).to(v.dtype)
    return out, log_sum


def reference_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_sum: Tensor,
    segments: Tensor,
    scale: float,
    window: int,
    softcap: float,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), each contiguous and in its input's dtype."""
    dtype = log_sum.dtype
    heads, share = k.shape[1], q.shape[1] // k.shape[1]
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grad_k, grad_v = k.new_zeros(k.shape, dtype=dtype), v.new_zeros(v.shape, dtype=dtype)
    with torch.autocast(q.device.type, enabled=False):
        for segment in check_segments(segments, q.shape[0]):
            keys, visible, ahead_LM, rows = _keys_and_mask(segment, window, q.device)
            keys_HMK = k[keys].to(dtype).transpose(0, 1).repeat_interleave(share, 0)
            values_HMV = v[keys].to(dtype).transpose(0, 1).repeat_interleave(share, 0)
            queries_HLK, grad_HLV = q[rows].to(dtype).transpose(0, 1), grad_out[rows].to(dtype).transpose(0, 1)
            # The probabilities P again, from the scores and their saved log-sum-exp.
            scores_HLM, derivative = scores_of(queries_HLK, keys_HMK, ahead_LM, scale, softcap, slopes)
            p_HLM = (scores_HLM.masked_fill(~visible, -torch.inf) - log_sum[rows].mT[..., None]).exp()
            # The gradient of the softmax: dS = P * (dP - sum(P * dP)). A sink adds nothing, because its value is zero.
            grad_p_HLM = grad_HLV @ values_HMV.mT
            grad_scores_HLM = p_HLM * (grad_p_HLM - (p_HLM * grad_p_HLM).sum(-1, keepdim=True)) * scale
            grad_scores_HLM = grad_scores_HLM * derivative
            grad_q[rows] = (grad_scores_HLM @ keys_HMK).transpose(0, 1).to(q.dtype)
            # The rows of a prefix are keys of several segments; their gradients add up in the order of the segments.
            for total, part in ((grad_k, grad_scores_HLM.mT @ queries_HLK), (grad_v, p_HLM.mT @ grad_HLV)):
                total[keys] += part.unflatten(0, (heads, share)).sum(1).transpose(0, 1)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


LIBRARY.impl("ragged_attention", reference_forward, "CompositeExplicitAutograd")
LIBRARY.impl("ragged_attention_backward", reference_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("rmcore::ragged_attention", lib=LIBRARY)
def _(q, k, v, segments, scale, window, softcap, sinks, slopes):  # type: ignore[no-untyped-def]
    out = q.new_empty((*q.shape[:2], v.shape[2]), dtype=v.dtype)
    return out, q.new_empty(q.shape[:2], dtype=accumulate_dtype(q, k, v))


@torch.library.register_fake("rmcore::ragged_attention_backward", lib=LIBRARY)
def _(grad_out, q, k, v, log_sum, segments, scale, window, softcap, slopes):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, segments, ctx.scale, ctx.window, ctx.softcap, sinks, slopes = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, output[1], segments, sinks, slopes, None if sinks is None else output[0])


def _backward(ctx, grad_out: Tensor, _):  # type: ignore[no-untyped-def]
    q, k, v, log_sum, segments, sinks, slopes, out = ctx.saved_tensors
    grads = torch.ops.rmcore.ragged_attention_backward(
        grad_out, q, k, v, log_sum, segments, ctx.scale, ctx.window, ctx.softcap, slopes
    )
    grad_sinks = None
    if sinks is not None and ctx.needs_input_grad[7]:
        # The sink's dP is 0, so its dS is -P * sum(P * dP), and sum(P * dP) = dO . O.
        p_TH = (sinks.to(log_sum.dtype) - log_sum).exp()
        grad_sinks = -(p_TH * (grad_out.to(log_sum.dtype) * out.to(log_sum.dtype)).sum(-1)).sum(0).to(sinks.dtype)
    return (*grads, None, None, None, None, grad_sinks, None)


torch.library.register_autograd("rmcore::ragged_attention", _backward, setup_context=_setup_context, lib=LIBRARY)
differentiable_once("ragged_attention_backward")
