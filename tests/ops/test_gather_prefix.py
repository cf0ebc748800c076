"""The gather of shared keys and values equals indexing and autograd, in PyTorch and in Triton (interpreted)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from rmcore.ops import gather_prefix
from rmcore.ops.gather_prefix import gather_plan, gather_prefix_kv, scored_plan
from tests.harness.segments import comparisons_strategy, segments_of
from tests.harness.triton_interpreter import triton_kernel

COMPARISONS = [(5, [3, 2, 4]), (0, [2, 3]), (3, [0, 4]), (2, [4, 0])]
TOKENS = sum(prefix + sum(tails) for prefix, tails in COMPARISONS)


def kernels(name):
    if name == "reference":
        return gather_prefix.reference_forward, gather_prefix.reference_backward
    return tuple(triton_kernel("rmcore.ops.gather_prefix_triton", function) for function in ("forward", "backward"))


every_implementation = pytest.mark.parametrize("name", ["reference", "triton"])


def test_the_plan_of_the_docstring():
    plan = gather_plan(torch.tensor([[0, 4, 0, 0], [4, 5, 0, 2]], dtype=torch.int32))
    assert plan.key_index.tolist() == [0, 1, 2, 3, 0, 1, 4]
    assert plan.cu_q.tolist() == [0, 4, 5] and plan.cu_k.tolist() == [0, 4, 7]
    assert (plan.max_q, plan.max_k) == (4, 4)
    assert plan.copies[plan.copy_offset[0] : plan.copy_offset[1]].tolist() == [0, 4]


def test_the_plan_of_scored_rows():
    """The end of each answer, and one that ends within the prompt of the others (row 1)."""
    plan = scored_plan(torch.tensor([[0, 4, 0, 0], [4, 5, 0, 2]], dtype=torch.int32), np.array([3, 4, 1]))
    assert plan.key_index.tolist() == [0, 1, 2, 3, 0, 1, 4, 0, 1]
    assert plan.cu_q.tolist() == [0, 1, 2, 3] and plan.cu_k.tolist() == [0, 4, 7, 9]
    assert (plan.max_q, plan.max_k) == (1, 4)
    assert plan.copies[plan.copy_offset[1] : plan.copy_offset[2]].tolist() == [1, 5, 8]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(comparisons=comparisons_strategy)
def test_any_plan_holds_each_segments_keys_and_inverts_itself(comparisons):
    segments = segments_of(comparisons)
    tokens = sum(prefix + sum(tails) for prefix, tails in comparisons)
    plan = gather_plan(segments)
    for i, (q0, q1, p0, p1) in enumerate(segments.tolist()):
        keys = plan.key_index[plan.cu_k[i] : plan.cu_k[i + 1]].tolist()
        assert keys == ([*range(p0, p1), *range(q0, q1)] if q1 > q0 else [])
        assert plan.cu_q[i + 1] - plan.cu_q[i] == q1 - q0
    for row in range(tokens):
        copies = plan.copies[plan.copy_offset[row] : plan.copy_offset[row + 1]].tolist()
        assert copies == [m for m, source in enumerate(plan.key_index.tolist()) if source == row]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@every_implementation
def test_forward_copies_and_backward_adds(name, dtype):
    forward, backward = kernels(name)
    plan = gather_plan(segments_of(COMPARISONS))
    k, v = torch.randn(TOKENS, 3, 24).to(dtype).chunk(2, -1)  # strided, as models give them
    out_k, out_v = forward(k, v, *plan[:3])
    assert torch.equal(out_k, k[plan.key_index]) and torch.equal(out_v, v[plan.key_index])

    grads = [torch.randn(len(plan.key_index), 12, 3).to(dtype).transpose(1, 2) for _ in range(2)]
    ours = backward(*grads, *plan[1:3])
    again = backward(*grads, *plan[1:3])
    for mine, rerun, grad in zip(ours, again, grads, strict=True):
        exact = torch.zeros(k.shape, dtype=torch.float64).index_add(0, plan.key_index, grad.double())
        # At most 3 copies add up in fp32; then one rounding to dtype (a whole unit by Triton's interpreter).
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        unit = torch.finfo(dtype).eps * (1.0 if name == "triton" else 0.5) + 3 * torch.finfo(wide).eps
        assert (mine.double() - exact).abs().max() <= unit * 4 * grad.abs().max()
        assert torch.equal(mine, rerun)


def test_gradcheck_and_opcheck():
    plan = gather_plan(segments_of([(2, [1, 2, 1])]))
    leaves = [torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda k, v: gather_prefix_kv(k, v, plan), leaves)
    torch.library.opcheck(torch.ops.rmcore.gather_prefix.default, (*leaves, *plan[:3]))
    grads = [torch.randn(len(plan.key_index), 2, 3) for _ in range(2)]
    torch.library.opcheck(torch.ops.rmcore.gather_prefix_backward.default, (*grads, *plan[1:3]))


def test_triton_reads_nothing_outside():
    k = torch.ones(2, 1, 4)
    offset = torch.tensor([0, 1, 2])
    out, _ = kernels("triton")[0](k, k, torch.tensor([0, 2, -1, 1]), offset, torch.tensor([0, 3]))
    assert out.isnan().any(-1).flatten().tolist() == [False, True, True, False]


def test_wrong_inputs_are_refused():
    plan = gather_plan(segments_of(COMPARISONS))
    k = torch.randn(TOKENS, 2, 4)
    for changed in (
        (k[1:], k[1:], plan),
        (k, k[..., :2], plan),
        (k, k.double(), plan),
        (k.to("meta"), k.to("meta"), plan),
    ):
        with pytest.raises(ValueError, match="gather_prefix_kv"):
            gather_prefix_kv(*changed)
