"""GELU's backward with the gradient of the bias equals autograd in fp64, in PyTorch and in Triton (interpreted)."""

import pytest
import torch
import torch.nn.functional as F

from rmcore.ops.biased_gelu import PART, biased_gelu, reference_backward
from tests.harness.triton_interpreter import triton_kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["reference", "triton"])
def test_one_pass_equals_autograd(name, dtype):
    backward = reference_backward if name == "reference" else triton_kernel("rmcore.ops.biased_gelu_triton", "backward")
    pre, grad = (x.to(dtype) for x in torch.randn(2, 150, 40, generator=torch.Generator().manual_seed(0)) * 3)
    leaf = pre.double().requires_grad_()
    (exact,) = torch.autograd.grad(F.gelu(leaf), leaf, grad.double())
    ours, parts = backward(grad, pre)
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    most = 1.13 * grad.double().abs()  # the slope of GELU is at most 1.129
    assert ours.dtype == dtype
    assert ((ours.double() - exact).abs() <= (torch.finfo(dtype).eps + 16 * wide) * most).all()
    assert parts.shape == (3, 40)  # rows 0 to 63, 64 to 127, 128 to 149
    for part, rows in zip(parts.double(), exact.split(PART), strict=True):
        assert ((part - rows.sum(0)).abs() <= 64 * wide * most.sum(0).max()).all()
    assert all(torch.equal(mine, again) for mine, again in zip((ours, parts), backward(grad, pre), strict=True))


def test_the_bias_gets_its_gradient():
    rows, bias = torch.randn(70, 8, dtype=torch.float64, requires_grad=True), torch.randn(8, dtype=torch.float64)
    bias.requires_grad_()
    upstream = torch.randn(70, 8, dtype=torch.float64)
    ours = torch.autograd.grad(biased_gelu(rows + bias.detach(), bias), (rows, bias), upstream)
    for mine, exact in zip(ours, torch.autograd.grad(F.gelu(rows + bias), (rows, bias), upstream), strict=True):
        assert (mine - exact).abs().max() < 1e-12
    torch.library.opcheck(torch.ops.rmcore.biased_gelu.default, (rows, bias))
    torch.library.opcheck(torch.ops.rmcore.biased_gelu_backward.default, (upstream, rows.detach()))
    with pytest.raises(ValueError, match="biased_gelu"):
        biased_gelu(rows, bias[1:])
