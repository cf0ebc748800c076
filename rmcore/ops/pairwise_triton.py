"""`rmcore::pairwise_forward` and `rmcore::pairwise_backward` in Triton, for CUDA. The contract is pairwise.py.

Input and output: as in the contract. Sums run in fp32; fp64 input goes to the reference. The host never waits for the
device: an index outside its range reads nothing and gives NaN, which reaches the loss.
Example: for 8 answers and D = 4096, 8 programs compute the rewards; then one program (a block of up to 16 answers)
compares them with blocks of 256 pairs.

Every sum has a fixed order, so reruns are bitwise equal: a reward is the dot product of one program, the gradient of a
reward is summed by one program over all pairs, and d weight is a sum of fixed parts.

With TRITON_INTERPRET=1 set before triton is imported, the kernels run on CPU tensors too, as in the tests.
"""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from rmcore.ops.pairwise import reference_backward, reference_forward

ANSWERS, PAIRS = 16, 256  # answers per program, and pairs per iteration of its loop
PART, ROWS = 64, 16  # answers that one program sums for d weight, and that it reads at a time


@triton.jit(do_not_specialize=["T"])
def _score(hidden, stride_t, stride_d, weight, index, rewards, T, D, BLOCK: tl.constexpr):
    """rewards[a] = <hidden[index[a]], weight>; one program per answer."""
    a = tl.program_id(0).to(tl.int64)
    row = tl.load(index + a)
    inside = (row >= 0) & (row < T)
    readable = tl.where(inside, D, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK).to(tl.int64)
        h = tl.load(hidden + row * stride_t + d * stride_d, mask=d < readable, other=0.0).to(tl.float32)
        w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
        total += h * w
    tl.store(rewards + a, tl.where(inside, tl.sum(total, 0), float("nan")))


@triton.jit
def _softplus(x):
    """log(1 + e^x) without overflow; log1p(e) = log(u) * e / (u - 1) with u = 1 + e cancels the rounding error of u."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    lost = tl.where(u == 1.0, 1.0, u - 1.0)
    return tl.maximum(x, 0.0) + tl.where(u == 1.0, e, tl.log(u) * (e / lost))


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit(do_not_specialize=["A", "P"])
def _pairs(
    rewards,
    winner,
    loser,
    margin,
    weight,
    smoothing,
    centering,
    loss,
    reward_grad,
    A,
    P,
    BLOCK_A: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """reward_grad of a block of answers, by one pass over all pairs; program 0 sums the loss as well."""
    block = tl.program_id(0)
    a = block * BLOCK_A + tl.arange(0, BLOCK_A).to(tl.int64)
    grad = tl.zeros([BLOCK_A], tl.float32)
    total_loss = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        real = p < P
        w = tl.load(winner + p, mask=real, other=-1)
        ell = tl.load(loser + p, mask=real, other=-1)
        # An index outside the answers gives a NaN reward. Places beyond the last pair get reward 0 and weight 0.
        absent = tl.where(real, float("nan"), 0.0)
        r_w = tl.where((w >= 0) & (w < A), tl.load(rewards + w, mask=(w >= 0) & (w < A), other=0.0), absent)
        r_l = tl.where((ell >= 0) & (ell < A), tl.load(rewards + ell, mask=(ell >= 0) & (ell < A), other=0.0), absent)
        pair_weight = tl.load(weight + p, mask=real, other=0.0).to(tl.float32)
        d = r_w - r_l - tl.load(margin + p, mask=real, other=0.0).to(tl.float32)
        both = r_w + r_l
        trouble = 0.0 * d
        nll = (1.0 - smoothing) * _softplus(-d) + smoothing * _softplus(d)
        total_loss += pair_weight * (nll + centering * both * both) + trouble
        slope = pair_weight * (smoothing * _sigmoid(d) - (1.0 - smoothing) * _sigmoid(-d)) + trouble
        pull = pair_weight * (2.0 * centering) * both
        wins = tl.where(a[:, None] == w[None, :], (pull + slope)[None, :], 0.0)
        losses = tl.where(a[:, None] == ell[None, :], (pull - slope)[None, :], 0.0)
        grad += tl.sum(wins + losses, 1)
    tl.store(reward_grad + a, grad, mask=a < A)
    tl.store(loss, tl.sum(total_loss, 0), mask=block == 0)


@triton.jit(do_not_specialize=["T", "A"])
def _scatter(grad_reward, weight, index, grad_hidden, T, A, D, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr):
    """grad_hidden[index[a]] = (sum of grad_reward over the answers of that row) * weight; one program per answer."""
    a = tl.program_id(0).to(tl.int64)
    row = tl.load(index + a)
    inside = (row >= 0) & (row < T)
    total = tl.zeros([BLOCK_A], tl.float32)
    for start in range(0, A, BLOCK_A):
        other = start + tl.arange(0, BLOCK_A)
        same = tl.load(index + other, mask=other < A, other=-1) == row
        total += tl.load(grad_reward + other, mask=same & (other < A), other=0.0)
    row_grad = tl.sum(total, 0)
    writable = tl.where(inside, D, 0)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
        value = (row_grad * w).to(grad_hidden.dtype.element_ty)
        # Answers that share a row store the same numbers to it, so their order does not matter.
        tl.store(grad_hidden + row * D + d, value, mask=d < writable)


@triton.jit(do_not_specialize=["A"])
def _weight_part(
    grad_reward, scored, stride_a, stride_d, part, A, D, PART: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """part[i] = sum of grad_reward[a] * scored[a] over the i-th block of PART answers, for a block of columns.

    ROWS answers at a time: with one, a program would wait for memory PART times.
    """
    i = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, PART, ROWS):
        a = i * PART + start + tl.arange(0, ROWS)
        grad = tl.load(grad_reward + a, mask=a < A, other=0.0)
        place = scored + a[:, None] * stride_a + d[None, :] * stride_d
        rows = tl.load(place, mask=(a < A)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(grad[:, None] * rows, 0)
    tl.store(part + i * D + d, total, mask=d < D)


def _block(size: int, limit: int) -> int:
    return max(16, min(limit, triton.next_power_of_2(size)))


def forward(
    hidden: Tensor,
    score_weight: Tensor,
    last_token_index: Tensor,
    winner: Tensor,
    loser: Tensor,
    margin: Tensor,
    weight: Tensor,
    label_smoothing: float,
    centering: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_sum, rewards [A], d loss_sum / d rewards [A]); see `pairwise.reference_forward`."""
    if hidden.dtype == torch.float64:
        return reference_forward(
            hidden, score_weight, last_token_index, winner, loser, margin, weight, label_smoothing, centering
        )
    tokens, size = hidden.shape
    answers, pairs = last_token_index.shape[0], winner.shape[0]
    rewards = hidden.new_empty(answers, dtype=torch.float32)
    reward_grad = torch.empty_like(rewards)
    loss = rewards.new_zeros(())
    if answers > 0:
        head, index = score_weight.contiguous(), last_token_index.contiguous()
        block = _block(size, 4096)
        _score[(answers,)](hidden, *hidden.stride(), head, index, rewards, tokens, size, BLOCK=block)
        pair_data = (winner.contiguous(), loser.contiguous(), margin.contiguous(), weight.contiguous())
        results = loss, reward_grad, answers, pairs
        _pairs[(triton.cdiv(answers, ANSWERS),)](
            rewards, *pair_data, label_smoothing, centering, *results, BLOCK_A=ANSWERS, BLOCK_P=PAIRS
        )
    return loss, rewards, reward_grad


def backward(
    grad_reward: Tensor, scored: Tensor, score_weight: Tensor, last_token_index: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    """(d hidden [tokens, D], d score_weight [D]); see `pairwise.reference_backward`."""
    if scored.dtype == torch.float64:
        return reference_backward(grad_reward, scored, score_weight, last_token_index, tokens)
    answers, size = scored.shape
    grad_hidden = scored.new_zeros(tokens, size)
    if answers == 0 or size == 0:
        return grad_hidden, torch.zeros_like(score_weight, memory_format=torch.contiguous_format)
    grad_reward, index = grad_reward.to(torch.float32).contiguous(), last_token_index.contiguous()
    head, blocks = score_weight.contiguous(), {"BLOCK_A": _block(answers, 1024), "BLOCK_D": _block(size, 4096)}
    _scatter[(answers,)](grad_reward, head, index, grad_hidden, tokens, answers, size, **blocks)
    part = grad_reward.new_empty(triton.cdiv(answers, PART), size)
    block = _block(size, 256)
    _weight_part[(part.shape[0], triton.cdiv(size, block))](
        grad_reward, scored, scored.stride(0), scored.stride(1), part, answers, size, PART=PART, ROWS=ROWS, BLOCK=block
    )
    return grad_hidden, part.sum(0).to(score_weight.dtype)
