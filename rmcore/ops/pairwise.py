"""The score head and the pairwise loss as one op: contract and PyTorch reference.

Input: packed hidden states `hidden_TD`, the score weight `score_weight_D`, the row of each answer's last token
(`last_token_index_A`), and the pairs (`winner_P`, `loser_P`: indices of answers) with their data margin and weight.
Output: the SUM of the pair losses and the reward of every answer, both in fp32 (fp64 for fp64 input):

    r_a  = <hidden[last_token_index_a], score_weight>
    d_p  = r_winner - r_loser - margin_p
    loss = sum_p weight_p * (-(1 - eps) * logsigmoid(d_p) - eps * logsigmoid(-d_p)
                             + centering * (r_winner + r_loser)^2)

Example: hidden = [[1, 0], [0, 2], [3, 1]], score_weight = [1, 0.5], last tokens at rows 2 and 1, one pair (0, 1) of
margin 0 and weight 1: rewards = [3.5, 1.0], d = 2.5, loss_sum = -logsigmoid(2.5) = 0.0789.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rmcore.ops.contract import LIBRARY, accumulate_dtype, add_at, differentiable_once

LIBRARY.define(
    "pairwise_forward(Tensor hidden, Tensor score_weight, Tensor last_token_index, Tensor winner, Tensor loser, "
    "Tensor margin, Tensor weight, float label_smoothing, float centering) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "pairwise_backward(Tensor grad_reward, Tensor scored, Tensor score_weight, Tensor last_token_index, SymInt tokens)"
    " -> (Tensor, Tensor)"
)


def pairwise_loss(
    hidden_TD: Tensor,
    score_weight_D: Tensor,
    last_token_index_A: Tensor,
    winner_P: Tensor,
    loser_P: Tensor,
    margin_P: Tensor,
    weight_P: Tensor,
    *,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Score each answer at its last token and sum the Bradley-Terry losses of the pairs.

    Args:
        hidden_TD: fp32, bf16, fp16 or fp64; any strides.
        score_weight_D: any floating dtype.
        last_token_index_A: int64 rows of hidden, in any order; repeats are allowed.
        winner_P, loser_P: int64 indices of answers; repeats are allowed (several pairs per comparison).
        margin_P, weight_P: fp32.
        label_smoothing: eps in [0, 0.5), the probability that a label is flipped.
        centering: weight of (r_w + r_l)^2 (Eisenstein et al., arXiv 2312.09244).
        T is at least 1. A and P may be 0; the loss and the gradients are then 0.
    Returns:
        (loss_sum: scalar, rewards_A), fp32 (fp64 if hidden is fp64). Both are differentiable once, with respect to
        hidden_TD and score_weight_D. If the reward of a paired answer is NaN or Inf, the loss is NaN.
    Raises:
        ValueError: shapes, dtypes or devices outside this contract.
        IndexError: an index outside its range. On CUDA, where a check would make the host wait, the reward of such an
            answer is NaN instead.
    """
    _check(hidden_TD, score_weight_D, last_token_index_A, winner_P, loser_P, margin_P, weight_P, label_smoothing)
    loss_sum, rewards_A, _ = torch.ops.rmcore.pairwise_forward.default(
        hidden_TD, score_weight_D, last_token_index_A, winner_P, loser_P, margin_P, weight_P, label_smoothing, centering
    )
    return loss_sum, rewards_A


def _check(
    hidden: Tensor,
    score_weight: Tensor,
    index: Tensor,
    winner: Tensor,
    loser: Tensor,
    margin: Tensor,
    weight: Tensor,
    label_smoothing: float,
) -> None:
    if hidden.dim() != 2 or score_weight.dim() != 1 or hidden.shape[1] != score_weight.shape[0]:
        shapes = f"{list(hidden.shape)} and {list(score_weight.shape)}"
        raise ValueError(f"pairwise_loss: expected hidden [T, D] and score_weight [D], got {shapes}")
    if hidden.shape[0] == 0 and index.numel() > 0:
        raise IndexError("pairwise_loss: hidden has no rows")
    if not (hidden.is_floating_point() and score_weight.is_floating_point()):
        dtypes = f"{hidden.dtype} and {score_weight.dtype}"
        raise ValueError(f"pairwise_loss: expected floating hidden and score_weight, got {dtypes}")
    for name, tensor in (("last_token_index", index), ("winner", winner), ("loser", loser)):
        if tensor.dim() != 1 or tensor.dtype != torch.int64:
            raise ValueError(f"pairwise_loss: {name} must be one int64 row, got {tensor.dtype} {list(tensor.shape)}")
    for name, tensor in (("margin", margin), ("weight", weight)):
        if tensor.shape != winner.shape or tensor.dtype not in (torch.float32, torch.float64):
            got = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"pairwise_loss: {name} must be fp32 with one number per pair, got {got}")
    if loser.shape != winner.shape:
        raise ValueError(f"pairwise_loss: {winner.shape[0]} winners but {loser.shape[0]} losers")
    others = (score_weight, index, winner, loser, margin, weight)
    if any(t.device != hidden.device for t in others):
        devices = sorted({str(t.device) for t in (hidden, *others)})
        raise ValueError(f"pairwise_loss: all inputs must be on one device, got {devices}")
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"pairwise_loss: label_smoothing must be in [0, 0.5), got {label_smoothing}")


def reference_forward(
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
    """The specification: (loss_sum, rewards [A], d loss_sum / d rewards [A]); arguments as in `pairwise_loss`."""
    dtype = accumulate_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        rewards = (hidden.index_select(0, last_token_index).to(dtype) * score_weight.to(dtype)).sum(-1)
        winner_reward, loser_reward = rewards.index_select(0, winner), rewards.index_select(0, loser)
        margin, weight = margin.to(dtype), weight.to(dtype)
        d = winner_reward - loser_reward - margin
        total = winner_reward + loser_reward
        # -logsigmoid(inf) is 0 and would hide an infinite reward. This term is 0 for finite d and NaN otherwise.
        nan_unless_finite = 0.0 * d
        nll = -(1.0 - label_smoothing) * F.logsigmoid(d) - label_smoothing * F.logsigmoid(-d)
        loss_sum = (weight * (nll + centering * total * total) + nan_unless_finite).sum()
        # d enters the loss of a pair through r_winner - r_loser, `total` through r_winner + r_loser.
        slope = label_smoothing * torch.sigmoid(d) - (1.0 - label_smoothing) * torch.sigmoid(-d)
        difference_grad = weight * slope + nan_unless_finite
        total_grad = weight * (2.0 * centering) * total
        reward_grad = torch.zeros_like(rewards)
        add_at(reward_grad, winner, total_grad + difference_grad)
        add_at(reward_grad, loser, total_grad - difference_grad)
    return loss_sum, rewards, reward_grad


def reference_backward(
    grad_reward: Tensor, scored: Tensor, score_weight: Tensor, last_token_index: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    """(d hidden [tokens, D] in scored's dtype, d score_weight [D]) from d rewards [A] and the scored rows [A, D]."""
    dtype = accumulate_dtype(scored)
    with torch.autocast(scored.device.type, enabled=False):
        grad_reward = grad_reward.to(dtype)
        grad_weight = (grad_reward[:, None] * scored.to(dtype)).sum(0).to(score_weight.dtype)
        row_grad = add_at(grad_reward.new_zeros(tokens), last_token_index, grad_reward)
        rows = row_grad.index_select(0, last_token_index)[:, None] * score_weight.to(dtype)
        grad_hidden = scored.new_zeros(tokens, scored.shape[1])
        # Answers that share a row write the same sum to it, so their order does not matter.
        grad_hidden[last_token_index] = rows.to(scored.dtype)
    return grad_hidden, grad_weight


LIBRARY.impl("pairwise_forward", reference_forward, "CompositeExplicitAutograd")
LIBRARY.impl("pairwise_backward", reference_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("rmcore::pairwise_forward", lib=LIBRARY)
def _(hidden, score_weight, last_token_index, winner, loser, margin, weight, label_smoothing, centering):  # type: ignore[no-untyped-def]
    rewards = hidden.new_empty(last_token_index.shape[0], dtype=accumulate_dtype(hidden))
    return rewards.new_empty(()), rewards, torch.empty_like(rewards)


@torch.library.register_fake("rmcore::pairwise_backward", lib=LIBRARY)
def _(grad_reward, scored, score_weight, last_token_index, tokens):  # type: ignore[no-untyped-def]
    return scored.new_empty(tokens, scored.shape[1]), torch.empty_like(score_weight)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, score_weight, last_token_index = inputs[:3]
    reward_grad = output[2]
    ctx.mark_non_differentiable(reward_grad)
    ctx.tokens = hidden.shape[0]
    # Only the scored rows are saved, so that the [T, D] hidden states can be freed before the backward.
    ctx.save_for_backward(hidden.index_select(0, last_token_index), score_weight, last_token_index, reward_grad)


def _backward(ctx, grad_loss: Tensor, grad_rewards: Tensor, _):  # type: ignore[no-untyped-def]
    scored, score_weight, last_token_index, reward_grad = ctx.saved_tensors
    grad_reward = grad_loss * reward_grad + grad_rewards
    grad_hidden, grad_weight = torch.ops.rmcore.pairwise_backward(
        grad_reward, scored, score_weight, last_token_index, ctx.tokens
    )
    return grad_hidden, grad_weight, None, None, None, None, None, None, None


torch.library.register_autograd("rmcore::pairwise_forward", _backward, setup_context=_setup_context, lib=LIBRARY)
differentiable_once("pairwise_backward")
