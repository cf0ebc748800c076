"""The rotation, gather and joined gradient of one pass equal transformers' rotation and autograd, also in Triton."""

import pytest
import torch
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from rmcore.ops import rotate_gather as op
from rmcore.ops.gather_prefix import gather_plan
from tests.harness.segments import segments_of
from tests.harness.triton_interpreter import triton_kernel

COMPARISONS = [(20, [13, 12, 4]), (0, [2, 3]), (3, [0, 12]), (2, [4, 0])]  # more rows than PART
PLAN = gather_plan(segments_of(COMPARISONS))
TOKENS = len(PLAN.copy_offset) - 1


def kernels(name):
    if name == "reference":
        return op.reference_forward, op.reference_backward
    return tuple(triton_kernel("rmcore.ops.rotate_gather_triton", function) for function in ("forward", "backward"))


def inputs(heads, size, turned, dtype):
    """qkv, and the angles as bf16 models get them, doubled as transformers does."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(TOKENS, 3 * heads * size, generator=generator).to(dtype)
    angle = torch.rand(TOKENS, turned // 2, generator=generator) * 6
    cos, sin = (torch.cat([x, x], -1).to(dtype) for x in (angle.cos(), angle.sin()))
    return qkv, cos, sin


def oracle(qkv, cos, sin, heads, grads=None):
    """In fp64, by transformers' own function, indexing and autograd."""
    qkv = qkv.double().requires_grad_()
    q, k, v = qkv.view(1, TOKENS, heads, -1).transpose(1, 2).chunk(3, -1)
    q, k = apply_rotary_pos_emb(q, k, cos.double()[None], sin.double()[None])
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    out = q, k[PLAN.key_index], v[PLAN.key_index]
    if grads is None:
        return [x.detach() for x in out]
    return torch.autograd.grad(out, qkv, [g.double() for g in grads])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "name, heads, size, turned",
    [
        ("reference", 3, 24, 6),
        ("reference", 2, 16, 16),
        ("triton", 3, 24, 6),
        pytest.param("triton", 2, 16, 16, marks=pytest.mark.slow),
    ],
)
def test_one_pass_equals_transformers_and_autograd(name, heads, size, turned, dtype):
    forward, backward = kernels(name)
    qkv, cos, sin = inputs(heads, size, turned, dtype)
    plan = PLAN.copy_offset, PLAN.copies
    out = forward(qkv, None, cos, sin, *plan, heads)
    # A sum of two products, rounded once (a whole unit by Triton's interpreter).
    unit = torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32 if dtype != torch.float64 else dtype).eps
    for ours, exact in zip(out, oracle(qkv, cos, sin, heads), strict=True):
        assert ours.dtype == dtype and ours.shape == exact.shape
        assert ((ours.double() - exact).abs() <= unit * 2 * qkv.double().abs().max()).all()

    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(dtype) for x in out]
    joined, parts = backward(*grads, cos, sin, *plan, True)
    exact = oracle(qkv, cos, sin, heads, grads)
    most = 2 * 3 * max(g.double().abs().max() for g in grads)  # a row has up to 3 copies
    assert ((joined.double() - exact).abs() <= unit * most).all()
    # The sums are taken before the gradient is rounded.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert parts.dtype == wide and len(parts) == -(-TOKENS // op.PART) > 1
    assert ((parts.double().sum(0) - exact.sum(0)).abs() <= 4 * torch.finfo(wide).eps * TOKENS * most).all()
    alone, none = backward(*grads, cos, sin, *plan, False)
    assert torch.equal(alone, joined) and none.shape == (0, parts.shape[1])


def test_the_example_of_the_docstring():
    c, s = 0.5, 0.25
    plan = gather_plan(torch.tensor([[0, 1, 0, 0]], dtype=torch.int32))
    qkv = torch.tensor([[1.0, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0]])
    query, _, _ = op.rotate_gather(qkv, None, torch.full((1, 2), c), torch.full((1, 2), s), plan, 1)
    assert query.flatten().tolist() == [c - 2 * s, 2 * c + s, 3, 4]


def test_gradcheck_and_opcheck():
    qkv, cos, sin = inputs(2, 4, 2, torch.float64)
    qkv.requires_grad_()
    bias = torch.randn(24, dtype=torch.float64, requires_grad=True)

    def biased(rows, bias):
        return op.rotate_gather(rows + bias.detach(), bias, cos, sin, PLAN, 2)

    upstream = [torch.randn_like(x) for x in biased(qkv, bias)]
    ours = torch.autograd.grad(biased(qkv, bias), (qkv, bias), upstream)
    exact = oracle(qkv.detach() + bias.detach(), cos, sin, 2, upstream)
    assert (ours[0] - exact).abs().max() < 1e-12 and (ours[1] - exact.sum(0)).abs().max() < 1e-12
    plan = PLAN.copy_offset, PLAN.copies
    torch.library.opcheck(torch.ops.rmcore.rotate_gather.default, (qkv, bias, cos, sin, *plan, 2))
    torch.library.opcheck(torch.ops.rmcore.rotate_gather_backward.default, (*upstream, cos, sin, *plan, True))


def test_wrong_inputs_are_refused():
    qkv, cos, sin = inputs(2, 8, 4, torch.float32)
    shorter = gather_plan(torch.tensor([[0, 1, 0, 0]], dtype=torch.int32))
    for changed in (
        (qkv[:, 1:], None, cos, sin, PLAN, 2),
        (qkv, qkv[0, 1:], cos, sin, PLAN, 2),
        (qkv, None, cos[1:], sin[1:], PLAN, 2),
        (qkv, None, cos, sin, shorter, 2),
    ):
        with pytest.raises(ValueError, match="rotate_gather"):
            op.rotate_gather(*changed)
