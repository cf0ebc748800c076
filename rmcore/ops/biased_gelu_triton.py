"""The backward of `rmcore::biased_gelu` in Triton, for CUDA. The contract is biased_gelu.py; the forward is PyTorch's.

Input and output: as in the contract. One program computes BLOCK columns of PART rows, one row after the other, and adds
up what it stores. Reruns are bitwise equal.
Example: 26,000 rows of 8,192 columns: 407 times 8 programs.

With TRITON_INTERPRET=1 set before triton is imported, the kernel runs on CPU tensors too, as in the tests.
"""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from rmcore.ops.biased_gelu import PART, reference_backward


@triton.jit(do_not_specialize=["T"])
def _gelu_back(grad, pre, out, sums, T, F, PART: tl.constexpr, BLOCK: tl.constexpr):
    part = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = f < F
    total = tl.zeros([BLOCK], tl.float32)
    for t in range(part * PART, tl.minimum(part * PART + PART, T)):
        x = tl.load(pre + t * F + f, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + t * F + f, mask=mask, other=0.0).to(tl.float32)
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = g * (below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327)
        tl.store(out + t * F + f, value.to(out.dtype.element_ty), mask=mask)
        total += value
    tl.store(sums + part * F + f, total, mask=mask)


def backward(grad: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """See `biased_gelu.reference_backward`."""
    if grad.dtype == torch.float64:
        return reference_backward(grad, pre)
    tokens, features = pre.shape
    out, parts = torch.empty_like(pre, memory_format=torch.contiguous_format), triton.cdiv(tokens, PART)
    sums = pre.new_empty((parts, features), dtype=torch.float32)
    if out.numel():
        block = max(16, min(1024, triton.next_power_of_2(features)))
        grid = parts, triton.cdiv(features, block)
        _gelu_back[grid](grad.contiguous(), pre.contiguous(), out, sums, tokens, features, PART=PART, BLOCK=block)
    return out, sums
