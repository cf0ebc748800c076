"""Rotates joined queries and keys by their positions, and gathers keys and values for variable-length attention.

Input: qkv [T, 3 H K], in which each head holds its query, key and value side by side (GPT-NeoX); cos and sin [T, R] of
the rotary embedding (Su et al., arXiv 2104.09864) of the first R elements of a head; a `GatherPlan`.
Output: queries [T, H, K]; keys and values [M, H, K], as gather_prefix.py gathers them. In the backward, the gradient of
qkv, and that of the bias which was added to it: the sum of its rows.
Example: one head of size 4 with R = 2 and the query [1 2 3 4] at cos = [c c], sin = [s s]: [c - 2s, 2c + s, 3, 4].

One pass reads each number once. Apart, a GPU reads and writes queries and keys for the rotation, keys and values for
the gather, all three for their joined gradient, and reads that again for the gradient of the bias. For pairs whose
prompt is twice as long as both answers together, these are 28 tensors of the size of T H K in both directions, in place
of 15. Sums run in fp32 (fp64 for fp64 input) and in a fixed order.
"""

import torch
from torch import Tensor

from rmcore.ops.contract import LIBRARY, accumulate_dtype, add_at, differentiable_once
from rmcore.ops.gather_prefix import GatherPlan

LIBRARY.define(
    "rotate_gather(Tensor qkv, Tensor? bias, Tensor cos, Tensor sin, Tensor copy_offset, Tensor copies, int heads)"
    " -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "rotate_gather_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor cos, Tensor sin, Tensor copy_offset,"
    " Tensor copies, bool sums) -> (Tensor, Tensor)"
)
PART = 64  # rows that one sum of the backward adds up


def rotate_gather(
    qkv: Tensor, bias: Tensor | None, cos_TR: Tensor, sin_TR: Tensor, plan: GatherPlan, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, H, K], and keys and values [M, H, K] of the plan, contiguous, in the dtype of qkv [T, 3 H K].

    Args:
        bias: what was added to qkv, [3 H K]; it is not added here, but gets its gradient. None: there is none.
        cos_TR, sin_TR: fp32 or the dtype of qkv, R <= K even; the half of R at which an element's partner lies is that
            of Hugging Face's `rotate_half`. They get no gradient.

    Differentiable once, bitwise repeatable. Raises ValueError for shapes outside this contract.
    """
    tokens, size = qkv.shape[0], qkv.shape[-1] // (3 * heads)
    turned = cos_TR.shape[-1]
    if qkv.dim() != 2 or qkv.shape[1] != 3 * heads * size or (bias is not None and bias.shape != qkv.shape[1:]):
        raise ValueError(
            f"rotate_gather: expected qkv [T, 3 H K] and its bias for {heads} heads, got {list(qkv.shape)}"
        )
    if cos_TR.shape != sin_TR.shape or cos_TR.shape[0] != tokens or turned > size or turned % 2:
        raise ValueError(f"rotate_gather: expected cos and sin [{tokens}, R <= {size}], got {list(cos_TR.shape)}")
    if plan.copy_offset.shape[0] != tokens + 1:
        raise ValueError(f"rotate_gather: the plan is for {plan.copy_offset.shape[0] - 1} rows, qkv has {tokens}")
    return torch.ops.rmcore.rotate_gather(qkv, bias, cos_TR, sin_TR, plan.copy_offset, plan.copies, heads)


def _rows(copy_offset: Tensor, copies: Tensor) -> Tensor:
    """The row of each of `copies`."""
    return torch.repeat_interleave(copy_offset.diff(), output_size=copies.shape[0])


def _turned(x_THK: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """x rotated, or a gradient rotated back, in the dtype of sums."""
    wide, turned = accumulate_dtype(x_THK), cos.shape[-1]
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]
    x = x_THK.to(wide)
    rotated = x[..., :turned]
    if back:
        first, second = (rotated * sin).chunk(2, -1)
        partner = torch.cat([second, -first], -1)
    else:
        first, second = rotated.chunk(2, -1)
        partner = torch.cat([-second, first], -1) * sin
    return torch.cat([rotated * cos + partner, x[..., turned:]], -1)


def reference_forward(
    qkv: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, copy_offset: Tensor, copies: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification."""
    q, k, v = qkv.view(qkv.shape[0], heads, 3, -1).unbind(2)
    row = torch.empty_like(copies)
    row[copies] = _rows(copy_offset, copies)
    query, key = (_turned(x, cos, sin, back=False).to(qkv.dtype) for x in (q, k))
    return query, key.index_select(0, row), v.index_select(0, row)


def reference_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    copy_offset: Tensor,
    copies: Tensor,
    sums: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of qkv [T, 3 H K], and of its rows the sums of each PART, in fp32; no sums unless `sums`."""
    tokens, heads, size = grad_q.shape
    wide, row = accumulate_dtype(grad_q), _rows(copy_offset, copies)
    key, value = (
        add_at(x.new_zeros(grad_q.shape, dtype=wide), row, x.index_select(0, copies).to(wide)) for x in (grad_k, grad_v)
    )
    query, key = (_turned(x, cos, sin, back=True) for x in (grad_q, key))
    joined = torch.stack([query, key, value], 2).view(tokens, 3 * heads * size)
    parts = joined.new_zeros((-(-tokens // PART) if sums else 0, joined.shape[1]))
    if sums:
        add_at(parts, torch.arange(tokens, device=joined.device) // PART, joined)
    return joined.to(grad_q.dtype), parts


LIBRARY.impl("rotate_gather", reference_forward, "CompositeExplicitAutograd")
LIBRARY.impl("rotate_gather_backward", reference_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("rmcore::rotate_gather", lib=LIBRARY)
def _(qkv, bias, cos, sin, copy_offset, copies, heads):  # type: ignore[no-untyped-def]
    size = qkv.shape[1] // (3 * heads)
    shapes = (qkv.shape[0], heads, size), (copies.shape[0], heads, size), (copies.shape[0], heads, size)
    return tuple(qkv.new_empty(shape) for shape in shapes)


@torch.library.register_fake("rmcore::rotate_gather_backward", lib=LIBRARY)
def _(grad_q, grad_k, grad_v, cos, sin, copy_offset, copies, sums):  # type: ignore[no-untyped-def]
    tokens, heads, size = grad_q.shape
    parts = (tokens + PART - 1) // PART if sums else 0
    joined = grad_q.new_empty((tokens, 3 * heads * size))
    return joined, grad_q.new_empty((parts, 3 * heads * size), dtype=accumulate_dtype(grad_q))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    bias = inputs[1]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*inputs[2:6])


def _backward(ctx, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor):  # type: ignore[no-untyped-def]
    sums = ctx.bias_dtype is not None and ctx.needs_input_grad[1]
    joined, parts = torch.ops.rmcore.rotate_gather_backward(grad_q, grad_k, grad_v, *ctx.saved_tensors, sums)
    bias = parts.sum(0).to(ctx.bias_dtype) if sums else None
    return joined, bias, None, None, None, None, None


torch.library.register_autograd("rmcore::rotate_gather", _backward, setup_context=_setup_context, lib=LIBRARY)
differentiable_once("rotate_gather_backward")
