"""`rmcore::rotate_gather` and its backward in Triton, for CUDA. The contract is rotate_gather.py.

Input and output: as in the contract. In the forward, one program computes one row and stores its key and value to all
of their copies. In the backward, one program computes BLOCK elements of the heads for PART rows, one row after the
other, and adds up what it stores for the gradient of the bias. Reruns are bitwise equal.
Example: 26,000 rows of 16 heads of size 128: 26,000 programs forward, and 407 times 4 backward.

With TRITON_INTERPRET=1 set before triton is imported, the kernels run on CPU tensors too, as in the tests.
"""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from rmcore.ops.rotate_gather import PART, reference_backward, reference_forward

FORWARD_BLOCK, BACKWARD_BYTES = 1024, 1024


@triton.jit
def _rotate(
    qkv,
    qkv_t,
    cos,
    sin,
    copy_offset,
    copies,
    out_q,
    out_k,
    out_v,
    SIZE,
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row t of queries, and of keys and values at each of the copies of t. SIZE = H * K."""
    t = tl.program_id(0).to(tl.int64)
    first, last = tl.load(copy_offset + t), tl.load(copy_offset + t + 1)
    for start in range(0, SIZE, BLOCK):
        i = start + tl.arange(0, BLOCK)
        g, d = i // K, i % K
        mask = i < SIZE
        turned = mask & (d < R)
        low = d < R // 2
        c = tl.load(cos + t * R + d, mask=turned, other=1.0).to(tl.float32)
        s = tl.load(sin + t * R + d, mask=turned, other=0.0).to(tl.float32)
        s = tl.where(low, -s, s)
        place = qkv + t * qkv_t + g * (3 * K) + d
        partner = place + tl.where(low, R // 2, -(R // 2))
        q = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        q = q * c + tl.load(partner, mask=turned, other=0.0).to(tl.float32) * s
        tl.store(out_q + t * SIZE + i, q.to(out_q.dtype.element_ty), mask=mask)
        k = tl.load(place + K, mask=mask, other=0.0).to(tl.float32)
        k = k * c + tl.load(partner + K, mask=turned, other=0.0).to(tl.float32) * s
        key = k.to(out_k.dtype.element_ty)
        value = tl.load(place + 2 * K, mask=mask, other=0.0)
        for n in range(first, last):
            m = tl.load(copies + n)
            tl.store(out_k + m * SIZE + i, key, mask=mask)
            tl.store(out_v + m * SIZE + i, value, mask=mask)


@triton.jit(do_not_specialize=["T"])
def _rotate_back(
    grad_q,
    grad_k,
    grad_v,
    cos,
    sin,
    copy_offset,
    copies,
    out,
    sums,
    T,
    SIZE,
    K: tl.constexpr,
    R: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Elements i of PART rows of the joined gradient, and their sums over these rows."""
    part = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g, d = i // K, i % K
    mask = i < SIZE
    turned = mask & (d < R)
    low = d < R // 2
    away = tl.where(low, R // 2, -(R // 2))
    place = g * (3 * K) + d
    sum_q = tl.zeros([BLOCK], tl.float32)
    sum_k = tl.zeros([BLOCK], tl.float32)
    sum_v = tl.zeros([BLOCK], tl.float32)
    for t in range(part * PART, tl.minimum(part * PART + PART, T)):
        c = tl.load(cos + t * R + d, mask=turned, other=1.0).to(tl.float32)
        s = tl.load(sin + t * R + d + away, mask=turned, other=0.0).to(tl.float32)
        s = tl.where(low, s, -s)
        q = tl.load(grad_q + t * SIZE + i, mask=mask, other=0.0).to(tl.float32)
        q = q * c + tl.load(grad_q + t * SIZE + i + away, mask=turned, other=0.0).to(tl.float32) * s
        k = tl.zeros([BLOCK], tl.float32)
        partner = tl.zeros([BLOCK], tl.float32)
        v = tl.zeros([BLOCK], tl.float32)
        for n in range(tl.load(copy_offset + t), tl.load(copy_offset + t + 1)):
            m = tl.load(copies + n)
            k += tl.load(grad_k + m * SIZE + i, mask=mask, other=0.0).to(tl.float32)
            partner += tl.load(grad_k + m * SIZE + i + away, mask=turned, other=0.0).to(tl.float32)
            v += tl.load(grad_v + m * SIZE + i, mask=mask, other=0.0).to(tl.float32)
        k = k * c + partner * s
        row = out + t * (3 * SIZE) + place
        tl.store(row, q.to(out.dtype.element_ty), mask=mask)
        tl.store(row + K, k.to(out.dtype.element_ty), mask=mask)
        tl.store(row + 2 * K, v.to(out.dtype.element_ty), mask=mask)
        if SUMS:
            sum_q += q
            sum_k += k
            sum_v += v
    if SUMS:
        row = sums + part * (3 * SIZE) + place
        tl.store(row, sum_q, mask=mask)
        tl.store(row + K, sum_k, mask=mask)
        tl.store(row + 2 * K, sum_v, mask=mask)


def _block(size: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(size)))


def forward(
    qkv: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, copy_offset: Tensor, copies: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `rotate_gather.reference_forward`."""
    if qkv.dtype == torch.float64:
        return reference_forward(qkv, bias, cos, sin, copy_offset, copies, heads)
    tokens, size = qkv.shape[0], qkv.shape[1] // (3 * heads)
    query = qkv.new_empty(tokens, heads, size)
    key, value = (qkv.new_empty(copies.shape[0], heads, size) for _ in range(2))
    if tokens and query.numel():
        qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
        plan, turns = (copy_offset.contiguous(), copies.contiguous()), (cos.contiguous(), sin.contiguous())
        width, turned = heads * size, cos.shape[1]
        _rotate[(tokens,)](
            qkv,
            qkv.stride(0),
            *turns,
            *plan,
            query,
            key,
            value,
            width,
            size,
            turned,
            BLOCK=_block(width, FORWARD_BLOCK),
        )
    return query, key, value


def backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    copy_offset: Tensor,
    copies: Tensor,
    sums: bool,
) -> tuple[Tensor, Tensor]:
    """See `rotate_gather.reference_backward`."""
    if grad_q.dtype == torch.float64:
        return reference_backward(grad_q, grad_k, grad_v, cos, sin, copy_offset, copies, sums)
    tokens, heads, size = grad_q.shape
    parts, width = triton.cdiv(tokens, PART), heads * size
    joined = grad_q.new_empty(tokens, 3 * width)
    summed = grad_q.new_empty((parts if sums else 0, 3 * width), dtype=torch.float32)
    if tokens and width:
        grads = (x.contiguous() for x in (grad_q, grad_k, grad_v))
        plan, turns = (copy_offset.contiguous(), copies.contiguous()), (cos.contiguous(), sin.contiguous())
        block = _block(width, BACKWARD_BYTES // grad_q.element_size())  # more fp32 would need more registers
        grid = parts, triton.cdiv(width, block)
        _rotate_back[grid](
            *grads, *turns, *plan, joined, summed, tokens, width, size, cos.shape[1], PART=PART, BLOCK=block, SUMS=sums
        )
    return joined, summed
