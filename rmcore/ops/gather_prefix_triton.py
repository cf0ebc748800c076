"""`rmcore::gather_prefix` and its backward in Triton, for CUDA. The contract is gather_prefix.py.

Input and output: as in the contract. In the forward, one program copies one key row of k and of v. In the backward,
one program sums the copies of one row, in fp32 and in their order, so that reruns are bitwise equal.
Example: with 8 heads of size 64, a program moves 512 numbers of k and 512 of v.

With TRITON_INTERPRET=1 set before triton is imported, the kernels run on CPU tensors too, as in the tests.
"""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from rmcore.ops.gather_prefix import reference_backward


@triton.jit(do_not_specialize=["T"])
def _gather(k, v, k_t, k_g, k_d, v_t, v_g, v_d, key_index, out_k, out_v, T, SIZE, K, BLOCK: tl.constexpr):
    """Copy row key_index[m] of k and v; SIZE = G * K numbers per row, K per head, k_t .. v_d are strides."""
    m = tl.program_id(0).to(tl.int64)
    row = tl.load(key_index + m)
    # An index outside the rows reads nothing and gives NaN.
    readable = tl.where((row >= 0) & (row < T), SIZE, 0)
    for start in range(0, SIZE, BLOCK):
        i = start + tl.arange(0, BLOCK).to(tl.int64)
        g, d = i // K, i % K
        mask = i < readable
        key = tl.load(k + row * k_t + g * k_g + d * k_d, mask=mask, other=float("nan"))
        value = tl.load(v + row * v_t + g * v_g + d * v_d, mask=mask, other=float("nan"))
        tl.store(out_k + m * SIZE + i, key, mask=i < SIZE)
        tl.store(out_v + m * SIZE + i, value, mask=i < SIZE)


@triton.jit
def _add_copies(
    grad_k, grad_v, k_t, k_g, k_d, v_t, v_g, v_d, copy_offset, copies, out_k, out_v, SIZE, K, BLOCK: tl.constexpr
):
    """Sum the copies of row t, in their order."""
    t = tl.program_id(0).to(tl.int64)
    first, last = tl.load(copy_offset + t), tl.load(copy_offset + t + 1)
    for start in range(0, SIZE, BLOCK):
        i = start + tl.arange(0, BLOCK).to(tl.int64)
        g, d = i // K, i % K
        mask = i < SIZE
        key = tl.zeros([BLOCK], tl.float32)
        value = tl.zeros([BLOCK], tl.float32)
        for c in range(first, last):
            m = tl.load(copies + c)
            key += tl.load(grad_k + m * k_t + g * k_g + d * k_d, mask=mask, other=0.0).to(tl.float32)
            value += tl.load(grad_v + m * v_t + g * v_g + d * v_d, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_k + t * SIZE + i, key.to(out_k.dtype.element_ty), mask=mask)
        tl.store(out_v + t * SIZE + i, value.to(out_v.dtype.element_ty), mask=mask)


def _block(size: int) -> int:
    return max(16, min(2048, triton.next_power_of_2(size)))


def forward(k: Tensor, v: Tensor, key_index: Tensor, copy_offset: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """Rows key_index of k and v; see `gather_prefix.reference_forward`."""
    keys, size = key_index.shape[0], k.shape[1] * k.shape[2]
    out_k, out_v = (t.new_empty(keys, *k.shape[1:]) for t in (k, v))
    if keys > 0 and size > 0:
        tokens, head_size, key_index = k.shape[0], k.shape[2], key_index.contiguous()
        strides = (*k.stride(), *v.stride())
        _gather[(keys,)](k, v, *strides, key_index, out_k, out_v, tokens, size, head_size, BLOCK=_block(size))
    return out_k, out_v


def backward(grad_k: Tensor, grad_v: Tensor, copy_offset: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """The ordered sums of copies; see `gather_prefix.reference_backward`."""
    if grad_k.dtype == torch.float64:
        return reference_backward(grad_k, grad_v, copy_offset, copies)
    tokens, size = copy_offset.shape[0] - 1, grad_k.shape[1] * grad_k.shape[2]
    out_k, out_v = (t.new_empty(tokens, *grad_k.shape[1:]) for t in (grad_k, grad_v))
    if tokens > 0 and size > 0:
        strides, head_size = (*grad_k.stride(), *grad_v.stride()), grad_k.shape[2]
        plan = copy_offset.contiguous(), copies.contiguous()
        _add_copies[(tokens,)](grad_k, grad_v, *strides, *plan, out_k, out_v, size, head_size, BLOCK=_block(size))
    return out_k, out_v
