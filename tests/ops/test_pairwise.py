"""The pairwise op: the specification equals PyTorch's own autograd, and C++ and Triton are as exact as PyTorch.

Triton runs interpreted (on CPU tensors) on machines without a GPU. Tolerances: the error of an implementation against
fp64 is at most twice that of the same arithmetic in PyTorch at that precision, plus one rounding of the result.
"""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import rmcore.ops as ops
from rmcore.ops import pairwise
from rmcore.ops.pairwise import pairwise_loss
from tests.harness.triton_interpreter import triton_kernel

Inputs = tuple[torch.Tensor, ...]
SMOOTHING, CENTERING = 0.1, 0.01


@functools.cache
def kernels(name):
    """(forward, backward) of an implementation, with the arguments of the dispatcher."""
    if name == "reference":
        return pairwise.reference_forward, pairwise.reference_backward
    if name == "C++":
        if "C++" not in ops.describe():
            pytest.skip(f"the C++ kernels are not in use ({ops.describe()})")
        return torch.ops.rmcore.pairwise_forward, torch.ops.rmcore.pairwise_backward
    return tuple(triton_kernel("rmcore.ops.pairwise_triton", function) for function in ("forward", "backward"))


every_implementation = pytest.mark.parametrize("name", ["reference", "C++", "triton"])


def random_inputs(T, D, A, P, dtype=torch.float32, seed=0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=generator).to(dtype)
    weight = (torch.randn(D, generator=generator) / (D + 1) ** 0.5).to(dtype)
    index = torch.randint(0, max(T, 1), (A,), generator=generator)
    winner, loser = (torch.randint(0, max(A, 1), (P,), generator=generator) for _ in range(2))
    margin, pair_weight = torch.rand(P, generator=generator), torch.rand(P, generator=generator) + 0.5
    return hidden, weight, index, winner, loser, margin, pair_weight


def plain(inputs: Inputs, smoothing=SMOOTHING, centering=CENTERING):
    """The formula of the docstring, one PyTorch operation at a time, differentiated by autograd: the oracle."""
    hidden, weight, index, winner, loser, margin, pair_weight = inputs
    rewards = hidden[index] @ weight
    d = rewards[winner] - rewards[loser] - margin.to(rewards.dtype)
    nll = -(1 - smoothing) * F.logsigmoid(d) - smoothing * F.logsigmoid(-d)
    total = rewards[winner] + rewards[loser]
    return (pair_weight.to(rewards.dtype) * (nll + centering * total**2)).sum(), rewards


def results(forward, backward, inputs: Inputs, grad_rewards: torch.Tensor):
    """(loss, rewards, d hidden, d weight) of an implementation, for upstream gradients 1 and grad_rewards."""
    hidden, weight, index = inputs[:3]
    loss, rewards, reward_grad = forward(*inputs, SMOOTHING, CENTERING)
    grad = reward_grad + grad_rewards.to(reward_grad.dtype)
    return loss, rewards, *backward(grad, hidden.index_select(0, index), weight, index, hidden.shape[0])


def oracle(inputs: Inputs, grad_rewards: torch.Tensor):
    """The same four, in fp64, by autograd."""
    leaves = [t.double().requires_grad_() for t in inputs[:2]]
    loss, rewards = plain((*leaves, *inputs[2:]))
    grads = torch.autograd.grad(loss + (rewards * grad_rewards.double()).sum(), leaves)
    return loss.detach(), rewards.detach(), *grads


def same_precision(inputs: Inputs, grad_rewards: torch.Tensor):
    """The same four by PyTorch operations in fp32 on the given numbers, results stored in the inputs' dtype."""
    leaves = [t.float().requires_grad_() for t in inputs[:2]]
    loss, rewards = plain((*leaves, *inputs[2:]))
    grads = torch.autograd.grad(loss + (rewards * grad_rewards).sum(), leaves)
    return loss.detach(), rewards.detach(), *(g.to(t.dtype) for g, t in zip(grads, inputs[:2], strict=True))


def sizes_of_terms(inputs: Inputs, grad_rewards: torch.Tensor):
    """For each of the four results, the sum of its absolute terms, which its rounding error is proportional to."""
    hidden, weight, index, winner, loser, margin, pair_weight = (t.abs().double() for t in inputs)
    index, winner, loser = (t.long() for t in (index, winner, loser))
    rewards = hidden[index] @ weight
    both = rewards[winner] + rewards[loser] + margin
    # |softplus| and its slope are at most |d| + log 2 and 1.
    loss = (pair_weight * (both + 0.7 + CENTERING * both**2)).sum()
    pull = pair_weight * (1 + 2 * CENTERING * both)
    grad = grad_rewards.abs().double().index_add(0, winner, pull).index_add(0, loser, pull)
    grad_rows = torch.zeros(hidden.shape[0], dtype=torch.float64).index_add(0, index, grad)
    return loss, rewards, grad_rows[:, None] * weight, grad @ hidden[index]


def assert_no_worse(inputs: Inputs, name: str) -> None:
    grad_rewards = torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(1))
    names = ("loss", "rewards", "d hidden", "d weight")
    ours = results(*kernels(name), inputs, grad_rewards)
    theirs, exact = same_precision(inputs, grad_rewards), oracle(inputs, grad_rewards)
    terms = sizes_of_terms(inputs, grad_rewards)
    for i, what in enumerate(names):
        assert ours[i].shape == exact[i].shape
        if ours[i].numel() == 0:
            continue
        # Slack where PyTorch happens to be exact: a rounding of the fp32 sum, and one of the result as it is stored
        # (bf16 is cut off, a whole unit, by the interpreter of Triton).
        stored = torch.finfo(ours[i].dtype).eps * exact[i].abs().max().item() * (1.0 if name == "triton" else 0.5)
        slack = torch.finfo(torch.float32).eps * terms[i].max().item() + stored
        error = (ours[i].double() - exact[i]).abs().max().item()
        assert error <= 2 * (theirs[i].double() - exact[i]).abs().max().item() + slack, what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(40, 64, 8, 4), (300, 515, 21, 60), (3, 1, 2, 1), (7, 33, 5, 0), (5, 8, 0, 0)])
@every_implementation
def test_error_against_fp64(name, sizes, dtype):
    assert_no_worse(random_inputs(*sizes, dtype=dtype), name)


@every_implementation
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_sizes_and_index_patterns(name, data):
    T, D = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 70))
    rows = data.draw(st.lists(st.sampled_from([0, T // 2, T - 1]) | st.integers(0, T - 1), min_size=1, max_size=9))
    answer = st.integers(0, len(rows) - 1)
    k_wise = list(itertools.combinations(range(len(rows)), 2))
    pairs = data.draw(st.just(k_wise) | st.lists(st.tuples(answer, answer), max_size=20))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    hidden, weight, _, _, _, margin, pair_weight = random_inputs(T, D, 1, len(pairs), dtype, seed=T * 100 + D)
    winner, loser = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    assert_no_worse((hidden, weight, torch.tensor(rows), winner, loser, margin, pair_weight), name)


@every_implementation
def test_reruns_are_bitwise_equal(name):
    inputs = random_inputs(64, 257, 30, 200, torch.bfloat16)
    grad = torch.randn(30)
    first = results(*kernels(name), inputs, grad)
    for _ in range(3):
        again = results(*kernels(name), inputs, grad)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_threads_do_not_change_a_bit():
    inputs, grad = random_inputs(200, 2048, 64, 64), torch.randn(64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(*kernels("C++"), inputs, grad)
        torch.set_num_threads(2)
        two = results(*kernels("C++"), inputs, grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("trouble", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("role", ["winner", "loser"])
@every_implementation
def test_a_row_that_is_not_finite_reaches_the_loss(name, role, trouble):
    hidden, weight, *_ = random_inputs(4, 8, 1, 1)
    hidden[2, 3] = trouble
    pair = (torch.tensor([0]), torch.tensor([1])) if role == "winner" else (torch.tensor([1]), torch.tensor([0]))
    inputs = (hidden, weight, torch.tensor([2, 0]), *pair, torch.zeros(1), torch.ones(1))
    loss, rewards, reward_grad = kernels(name)[0](*inputs, 0.0, 0.0)
    assert not loss.isfinite()
    assert not rewards[0].isfinite() and rewards[1].isfinite()
    assert not reward_grad.isfinite().any()


@every_implementation
def test_large_differences_neither_overflow_nor_vanish(name):
    # -logsigmoid(200) = e^-200 is 0 in fp32, -logsigmoid(-200) = 200; at 20 it is 2.0612e-9, which 1 + e would lose.
    hidden = torch.tensor([[200.0], [0.0], [20.0]])
    pairs = (torch.tensor([0, 1, 2]), torch.tensor([1, 0, 1]))
    weight = torch.tensor([1.0, 0.0, 0.0])
    for which, expected in enumerate((0.0, 200.0, 2.0611536e-9)):
        inputs = (hidden, torch.ones(1), torch.arange(3), *pairs, torch.zeros(3), weight.roll(which))
        loss, _, grad = kernels(name)[0](*inputs, 0.0, 0.0)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        assert grad.isfinite().all()


@pytest.mark.parametrize("mode", ops.MODES)
def test_gradcheck(mode):
    try:
        ops.use(mode)
        hidden, weight, *rest = random_inputs(9, 5, 6, 8)
        leaves = (hidden.double().requires_grad_(), weight.double().requires_grad_())

        def losses(h, w):
            return pairwise_loss(h, w, *rest, label_smoothing=SMOOTHING, centering=CENTERING)

        assert torch.autograd.gradcheck(losses, leaves)
    finally:
        ops.use("fused")


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("sizes", [(12, 16, 6, 9), (3, 4, 0, 0)])
def test_opcheck(mode, sizes):
    try:
        ops.use(mode)
        hidden, weight, *rest = random_inputs(*sizes)
        inputs = (hidden.requires_grad_(), weight.requires_grad_(), *rest, SMOOTHING, CENTERING)
        torch.library.opcheck(torch.ops.rmcore.pairwise_forward.default, inputs)
        scored = hidden.detach()[rest[0]]
        torch.library.opcheck(
            torch.ops.rmcore.pairwise_backward.default,
            (torch.randn(sizes[2]), scored, weight.detach(), rest[0], sizes[0]),
        )
    finally:
        ops.use("fused")


@pytest.mark.parametrize("mode", ops.MODES)
def test_compile_autocast_and_inference_give_the_eager_numbers(mode):
    try:
        ops.use(mode)
        inputs = random_inputs(12, 16, 6, 9)
        expected = pairwise_loss(*inputs)
        compiled = torch.compile(pairwise_loss, fullgraph=True, backend="aot_eager")(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = pairwise_loss(*inputs)
        with torch.inference_mode():
            inference = pairwise_loss(*inputs)
        for other in (compiled, autocast, inference):
            assert all(torch.equal(a, b) for a, b in zip(expected, other, strict=True))
    finally:
        ops.use("fused")


@pytest.mark.parametrize("mode", ops.MODES)
def test_strides_and_mixed_dtypes(mode):
    """A transposed hidden state, a strided weight and a weight of another precision give the same numbers."""
    try:
        ops.use(mode)
        hidden, weight, *rest = random_inputs(12, 16, 6, 9)
        expected = pairwise_loss(hidden, weight, *rest)
        odd = (hidden.t().contiguous().t(), weight.repeat_interleave(2)[::2], *rest)
        assert all(torch.equal(a, b) for a, b in zip(expected, pairwise_loss(*odd), strict=True))
        mixed = pairwise_loss(hidden.bfloat16(), weight, *rest)
        exact = pairwise_loss(hidden.bfloat16().double(), weight.double(), *rest)
        torch.testing.assert_close(mixed[1], exact[1].float())  # fp32 sums of 16 products: assert_close's fp32 rule
        assert mixed[0].dtype == mixed[1].dtype == torch.float32
    finally:
        ops.use("fused")


def bad(**changes):
    names = ("hidden", "weight", "index", "winner", "loser", "margin", "pair_weight")
    inputs = dict(zip(names, random_inputs(6, 4, 3, 2), strict=True))
    return tuple((inputs | changes).values())


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize(
    ("inputs", "error"),
    [
        (bad(index=torch.tensor([0, 6, 1])), IndexError),
        (bad(index=torch.tensor([0, -1, 1])), IndexError),
        (bad(winner=torch.tensor([0, 3])), IndexError),
        (bad(loser=torch.tensor([-1, 0])), IndexError),
        (bad(hidden=torch.zeros(0, 4)), IndexError),
        (bad(index=torch.tensor([0, 1, 2], dtype=torch.int32)), ValueError),
        (bad(weight=torch.ones(5)), ValueError),
        (bad(hidden=torch.ones(6, 4, dtype=torch.int64)), ValueError),
        (bad(margin=torch.ones(3)), ValueError),
        (bad(pair_weight=torch.ones(2, dtype=torch.int64)), ValueError),
        (bad(loser=torch.tensor([0])), ValueError),
        (bad(weight=torch.ones(4, device="meta")), ValueError),
    ],
)
def test_wrong_inputs_are_refused(mode, inputs, error):
    try:
        ops.use(mode)
        with pytest.raises(error, match=r"pairwise_loss|index|out of range"):
            pairwise_loss(*inputs)
    finally:
        ops.use("fused")


def test_triton_reads_nothing_outside_and_gives_nan():
    hidden, weight, _, winner, loser, margin, pair_weight = random_inputs(6, 4, 3, 2)
    forward, backward = kernels("triton")
    index = torch.tensor([0, 6, -1])
    loss, rewards, _ = forward(hidden, weight, index, winner, loser, margin, pair_weight, 0.0, 0.0)
    assert rewards.isnan().tolist() == [False, True, True]
    grad_hidden, _ = backward(torch.ones(3), hidden[:3], weight, index, 6)
    assert torch.equal(grad_hidden[0], weight) and not grad_hidden[1:].any()
    loss, _, _ = forward(hidden, weight, torch.arange(3), torch.tensor([0, 3]), loser, margin, pair_weight, 0.0, 0.0)
    assert loss.isnan()


def test_a_second_derivative_is_refused():
    hidden, weight, *rest = random_inputs(6, 4, 3, 2)
    hidden.requires_grad_()
    weight.requires_grad_()
    (grad,) = torch.autograd.grad(pairwise_loss(hidden, weight, *rest)[0], hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()
