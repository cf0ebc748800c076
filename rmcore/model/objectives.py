"""The objectives: each turns the rewards of a batch and the labels of its answers into one summed loss.

Input: the reward of every answer of a batch (`rewards_A`) and a `Judged` (pairs, ties, scores).
Output: a SUM over what the objective counts: pairs by their weights, whole lists, or scored answers. The training loop
divides it by the count of the whole step, so that the cut into ranks and micro batches does not change the mean.
Example: rewards [2.0, 0.5, 1.0], pairs (0, 1) and (0, 2) of weight 1/2 each. bradley_terry gives
(softplus(-1.5) + softplus(-1)) / 2 = 0.2574 for a count of 1; plackett_luce gives log(1 + e^-1.5 + e^-1) = 0.4644 for
one list.

The fused op (rmcore.ops.pairwise) computes Bradley-Terry in `RewardModel.forward`. For the others the op only gathers
the rewards, and the functions below compute the loss in fp32 (fp64 for fp64 rewards). rmcore/model/README.md shows how
to add one.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rmcore.config.loss import TRAITS, LossConfig
from rmcore.data.batches.batch import Judged, RaggedBatch
from rmcore.host.imports import imported
from rmcore.ops.contract import add_at


class Objective(NamedTuple):
    """The keys of the config's section `loss` that the loss itself reads."""

    name: str = "bradley_terry"
    label_smoothing: float = 0.0
    centering: float = 0.0
    tie_rate: float = 0.25
    router_aux: float = 0.0  # RewardModel adds this term, see rmcore.model.router_balance

    @classmethod
    def of(cls, config: LossConfig) -> "Objective":
        return cls(config.name, config.label_smoothing, config.centering, config.tie_rate, config.router_aux)

    @property
    def fused(self) -> bool:
        """Whether rmcore.ops.pairwise computes this objective."""
        return self.name == "bradley_terry"

    def loss_sum(self, rewards_A: Tensor, data: Judged) -> Tensor:
        """The summed loss, a scalar, differentiable with respect to rewards_A; NaN where a reward is NaN or Inf."""
        with torch.autocast(rewards_A.device.type, enabled=False):
            # This factor is 1, and NaN if a reward is not finite: an objective that is flat there would hide the fault.
            watch = 1.0 + (0.0 * rewards_A.detach()).sum()
            return OBJECTIVES[self.name](rewards_A, data, self) * watch

    def counted(self, data: Judged) -> Tensor:
        """This batch's part of the count that the sum is divided by, an fp64 scalar; see `Traits.counts`."""
        counts = TRAITS[self.name].counts
        if counts == "lists":
            return torch.full((), float(data.lists), dtype=torch.float64, device=data.score_A.device)
        if counts == "answers":
            return torch.isfinite(data.score_A).sum(dtype=torch.float64)
        return data.weight_P.sum(dtype=torch.float64) + data.tie_weight_Q.sum(dtype=torch.float64)

    def counted_A(self, data: RaggedBatch) -> Tensor:
        """`counted`, split over the answers: a pair counts half for each of its answers, a list in equal parts for all
        of its answers. fp32 [A].
        """
        counts = TRAITS[self.name].counts
        if counts == "lists":
            shares = np.repeat(1.0 / data.answers_C, data.answers_C).astype(np.float32)
            return torch.from_numpy(shares).to(data.score_A.device)
        if counts == "answers":
            return torch.isfinite(data.score_A).float()
        counted = torch.zeros_like(data.score_A)
        for answers, weight in (
            (data.winner_P, data.weight_P),
            (data.loser_P, data.weight_P),
            (data.tie_a_Q, data.tie_weight_Q),
            (data.tie_b_Q, data.tie_weight_Q),
        ):
            counted = add_at(counted, answers, weight / 2)
        return counted


def bradley_terry(rewards_A: Tensor, data: Judged, objective: Objective) -> Tensor:
    """-log P(winner > loser), P = sigmoid(d), d = r_winner - r_loser - margin.

    Bradley and Terry 1952, Biometrika 39, p. 324-345. With K answers, all their pairs: Ouyang et al., arXiv
    2203.02155, eq. 1 (weights 1 / C(K, 2)). Margin: Touvron et al., arXiv 2307.09288, eq. 2. Centering: Eisenstein et
    al., arXiv 2312.09244. Label smoothing: Szegedy et al., arXiv 1512.00567, section 7; soft labels are both
    directions of a pair, weighted.
    """
    return _pairwise(rewards_A, data, objective, lambda d: -F.logsigmoid(d))


def hinge(rewards_A: Tensor, data: Judged, objective: Objective) -> Tensor:
    """max(0, 1 - d), d = r_winner - r_loser - margin: pairs with d of at least 1 give no gradient.

    Herbrich, Graepel and Obermayer 2000, "Large margin rank boundaries for ordinal regression"; on preferences of
    texts Zhao et al., arXiv 2305.10425.
    """
    return _pairwise(rewards_A, data, objective, lambda d: F.relu(1.0 - d))


def rao_kupper(rewards_A: Tensor, data: Judged, objective: Objective) -> Tensor:
    """Bradley-Terry with a threshold below which a judge sees no difference, which gives ties a likelihood.

    P(winner) = sigmoid(d - eta), P(tie) = (theta^2 - 1) sigmoid(d - eta) sigmoid(-d - eta), eta = log theta, theta =
    (1 + t) / (1 - t), where t = loss.tie_rate is P(tie) of two equal answers.
    Rao and Kupper 1967, JASA 62, p. 194-204; for reward models Liu et al., arXiv 2410.05328.
    """
    t = objective.tie_rate
    theta = (1.0 + t) / (1.0 - t)
    eta, constant = math.log(theta), math.log(theta * theta - 1.0)
    won = _pairwise(rewards_A, data, objective, lambda d: -F.logsigmoid(d - eta))
    return won + _tied(rewards_A, data, objective, lambda d: -F.logsigmoid(d - eta) - F.logsigmoid(-d - eta) - constant)


def davidson(rewards_A: Tensor, data: Judged, objective: Objective) -> Tensor:
    """Bradley-Terry with ties in proportion to the geometric mean of the two strengths.

    P(winner) = e^(d/2) / Z, P(tie) = nu / Z, Z = e^(d/2) + e^(-d/2) + nu, nu = 2 t / (1 - t), t = loss.tie_rate as in
    `rao_kupper`. Davidson 1970, JASA 65, p. 317-328.
    """
    log_nu = math.log(2.0 * objective.tie_rate / (1.0 - objective.tie_rate))

    def log_z(d: Tensor) -> Tensor:
        return torch.stack([d / 2, -d / 2, torch.full_like(d, log_nu)]).logsumexp(0)

    won = _pairwise(rewards_A, data, objective, lambda d: log_z(d) - d / 2)
    return won + _tied(rewards_A, data, objective, lambda d: log_z(d) - log_nu)


def plackett_luce(rewards_A: Tensor, data: Judged, objective: Objective) -> Tensor:
    """-log of the probability of a whole ranking: each answer is the first among itself and those that it beats.

    sum over answers a of log(e^r_a + sum over b beaten by a of e^r_b) - r_a. Answers that tie do not enter each other's
    terms. With two answers it is Bradley-Terry. Pair weights are not read: a list counts once.
    Plackett 1975, Applied Statistics 24, p. 193-202; Luce 1959; for reward models Zhu et al., arXiv 2301.11270.
    """
    winner, beaten_P = data.winner_P, _pick(rewards_A, data.loser_P)
    # The largest reward of each choice is taken out of the exponentials, so that none overflows.
    top_A = rewards_A.detach().scatter_reduce(0, winner, beaten_P.detach(), "amax")
    others_A = add_at(torch.zeros_like(rewards_A), winner, torch.exp(beaten_P - top_A.index_select(0, winner)))
    return (top_A + torch.log(torch.exp(rewards_A - top_A) + others_A) - rewards_A).sum()


def regression(rewards_A: Tensor, data: Judged, objective: Objective) -> Tensor:
    """(r - score)^2 for every answer that has a score. HelpSteer2: Wang et al., arXiv 2406.08673."""
    known = torch.isfinite(data.score_A)
    error_A = rewards_A - data.score_A.to(rewards_A.dtype).where(known, 0.0)
    return (error_A * error_A).where(known, 0.0).sum()


OBJECTIVES: dict[str, Callable[[Tensor, Judged, Objective], Tensor]] = {
    "bradley_terry": bradley_terry,
    "hinge": hinge,
    "rao_kupper": rao_kupper,
    "davidson": davidson,
    "plackett_luce": plackett_luce,
    "regression": regression,
}


class _WithOwn(dict[str, Callable[[Tensor, Judged, Objective], Tensor]]):
    """A name with a colon is a function of the user, see rmcore/README.md."""

    def __missing__(self, name: str) -> Callable[[Tensor, Judged, Objective], Tensor]:
        return imported(name, "loss.name")


OBJECTIVES = _WithOwn(OBJECTIVES)


def _pairwise(rewards_A: Tensor, data: Judged, objective: Objective, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The weighted sum of loss(d) over the pairs, with label smoothing and centering."""
    winner_P, loser_P = _pick(rewards_A, data.winner_P), _pick(rewards_A, data.loser_P)
    d, total = winner_P - loser_P - data.margin_P.to(rewards_A.dtype), winner_P + loser_P
    each = loss(d)
    if smoothing := objective.label_smoothing:
        each = (1.0 - smoothing) * each + smoothing * loss(-d)
    return (data.weight_P.to(rewards_A.dtype) * (each + objective.centering * total * total)).sum()


def _tied(rewards_A: Tensor, data: Judged, objective: Objective, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The weighted sum of loss(d) over the ties, with centering. Ties have neither a margin nor label smoothing."""
    a_Q, b_Q = _pick(rewards_A, data.tie_a_Q), _pick(rewards_A, data.tie_b_Q)
    total = a_Q + b_Q
    return (data.tie_weight_Q.to(rewards_A.dtype) * (loss(a_Q - b_Q) + objective.centering * total * total)).sum()


class _Pick(torch.autograd.Function):
    """index_select whose backward adds up in a fixed order on every device."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.length = values.shape[0]
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return add_at(grads[0].new_zeros(ctx.length), index, grads[0]), None


def _pick(values_A: Tensor, index: Tensor) -> Tensor:
    return _Pick.apply(values_A, index)
