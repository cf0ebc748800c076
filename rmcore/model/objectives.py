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

OBJECTIVES is a plain dict from loss.name to a function of one signature:

    objective(rewards: Tensor, data: Judged, settings: Objective) -> Tensor

`rewards` is fp32 (fp64 for fp64 models): [A], the output of the score head that loss.output states, or [A, K] where it
lists K outputs. The function returns a sum over what `Traits.counts` of the objective counts, as a scalar tensor that
is differentiable with respect to `rewards`, and never divides by a count.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rmcore.config import Config
from rmcore.config.loss import TRAITS, LossConfig
from rmcore.data.batches.batch import Judged, RaggedBatch, sent
from rmcore.host.imports import imported
from rmcore.model.outputs import Outputs, pick
from rmcore.ops.contract import add_at

ONE = Outputs()
BOUND = 5.0  # of the log barrier


class Objective(NamedTuple):
    """The keys of the config's section `loss` that the loss itself reads.

    `outputs`: the places of the outputs that it trains, None: the reward. `several`: they were given as a list.
    `attributes`: the columns of the data's attributes that it reads.
    """

    name: str = "bradley_terry"
    label_smoothing: float = 0.0
    centering: float = 0.0
    tie_rate: float = 0.25
    weight: float = 1.0
    log_barrier: float = 0.0
    gamma: float = 2.0
    brier: float = 0.0
    rps: float = 0.0
    router_aux: float = 0.0  # RewardModel adds this term, see rmcore.model.router_balance
    outputs: tuple[int, ...] | None = None
    several: bool = False
    attributes: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: LossConfig, outputs: Outputs = ONE, attributes: tuple[str, ...] = ()) -> "Objective":
        """`attributes`: all that the run reads. Raises UserError for an output that the model does not have."""
        return cls(
            **{name: getattr(config, name) for name in OF_CONFIG},
            outputs=outputs.places(config.outputs) if config.output is not None else None,
            several=isinstance(config.output, list),
            attributes=tuple(map(attributes.index, config.attributes)),
        )

    @property
    def fused(self) -> bool:
        """Whether rmcore.ops.pairwise computes this objective, for a head of one output."""
        return self.name == "bradley_terry" and self.weight == 1.0 and not self.log_barrier

    @property
    def reads_margins(self) -> bool:
        """Whether the loss is 0 without margins in the data."""
        return TRAITS[self.name].margins

    def loss_sum(self, rewards_A: Tensor, data: Judged, outputs_AK: Tensor | None = None) -> Tensor:
        """The summed loss, a scalar, differentiable with respect to the rewards or outputs; NaN where one that it reads
        is NaN or Inf.

        `outputs_AK`: of the whole head; None: every output is the reward.
        """
        read = rewards_A
        if self.outputs is not None and outputs_AK is not None:
            read = _columns(outputs_AK, self.outputs) if self.several else outputs_AK[:, self.outputs[0]]
        elif self.several and self.outputs is not None:
            read = rewards_A.unsqueeze(1).expand(-1, len(self.outputs))
        with torch.autocast(read.device.type, enabled=False):
            # This factor is 1, and NaN if a reward is not finite: an objective that is flat there would hide the fault.
            watch = 1.0 + (0.0 * read.detach()).sum()
            loss = OBJECTIVES[self.name](read, data, self) * watch
            return loss if self.weight == 1.0 else self.weight * loss

    def counted(self, data: Judged) -> Tensor:
        """This batch's part of the count that the sum is divided by, an fp64 scalar; see `Traits.counts`."""
        counts = "cells" if self.attributes else TRAITS[self.name].counts
        if counts == "lists":
            return torch.full((), float(data.lists), dtype=torch.float64, device=data.score_A.device)
        if counts == "answers":
            return torch.isfinite(data.score_A).sum(dtype=torch.float64)
        if counts == "cells":
            return torch.isfinite(_columns(data.attribute_A, self.attributes)).sum(dtype=torch.float64)
        if counts == "targets":
            known = torch.isfinite(data.score_A).double()
            return known.new_zeros(len(known) + 1).scatter_reduce(0, data.list_A, known, "amax").sum()
        return data.weight_P.sum(dtype=torch.float64) + data.tie_weight_Q.sum(dtype=torch.float64)

    @property
    def shares_balance(self) -> bool:
        """Whether a text counts for loss.router_aux as its comparison counts in the loss (`counted_A`)."""
        return TRAITS[self.name].counts in ("pairs", "lists", "answers") and not self.attributes

    def counted_A(self, data: RaggedBatch) -> Tensor:
        """`counted`, split over the answers: a pair counts half for each of its answers, a list in equal parts for all
        of its answers. fp32 [A].
        """
        counts = TRAITS[self.name].counts
        if counts == "lists":
            shares = np.repeat(1.0 / data.answers_C, data.answers_C).astype(np.float32)
            return sent(torch.from_numpy(shares), data.score_A.device)
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


OF_CONFIG = (
    "name",
    "label_smoothing",
    "centering",
    "tie_rate",
    "weight",
    "log_barrier",
    "gamma",
    "brier",
    "rps",
    "router_aux",
)


@dataclass(frozen=True)
class Joint:
    """Several objectives, each for the comparisons of its own sources. Sums and counts are vectors, one entry each."""

    objectives: tuple[Objective, ...]
    router_aux: float = 0.0
    shares_balance = False

    @property
    def fused(self) -> bool:
        """The op computes a single objective only."""
        return False

    def loss_sum(self, rewards_A: Tensor, batch: RaggedBatch, outputs_AK: Tensor | None = None) -> Tensor:
        """[J]: the summed loss of each objective."""
        parts = enumerate(self.objectives)
        return torch.stack([one.loss_sum(rewards_A, batch.of_objective(j), outputs_AK) for j, one in parts])

    def counted(self, batch: RaggedBatch) -> Tensor:
        """[J]: what each objective counts of the batch, fp64."""
        return torch.stack([one.counted(batch.of_objective(j)) for j, one in enumerate(self.objectives)])


def objective_of(config: Config, outputs: Outputs = ONE) -> Objective | Joint:
    """The objective of a run, or its several ones. Raises UserError for outputs that the model does not have."""
    every = tuple(
        Objective.of(loss, outputs, config.attributes)._replace(router_aux=config.loss.router_aux)
        for loss in config.losses
    )
    return every[0] if len(every) == 1 else Joint(every, config.loss.router_aux)


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
    winner, beaten_P = data.winner_P, pick(rewards_A, data.loser_P)
    # The largest reward of each choice is taken out of the exponentials, so that none overflows.
    top_A = rewards_A.detach().scatter_reduce(0, winner, beaten_P.detach(), "amax")
    others_A = add_at(torch.zeros_like(rewards_A), winner, torch.exp(beaten_P - top_A.index_select(0, winner)))
    return (top_A + torch.log(torch.exp(rewards_A - top_A) + others_A) - rewards_A).sum()


def regression(rewards: Tensor, data: Judged, objective: Objective) -> Tensor:
    """(r - score)^2 for every answer that has a score; with several outputs [A, K] that of every known attribute.

    HelpSteer2: Wang et al., arXiv 2406.08673.
    """
    scores = _columns(data.attribute_A, objective.attributes) if objective.several else data.score_A
    known = torch.isfinite(scores)
    error = rewards - scores.to(rewards.dtype).where(known, 0.0)
    return (error * error).where(known, 0.0).sum()


def quantile_regression(outputs_AK: Tensor, data: Judged, objective: Objective) -> Tensor:
    """The pinball loss of K quantiles of an answer's score, at the levels k / (K + 1), mean over the levels.

    max(t (y - q), (t - 1) (y - q)) is least at the quantile of level t. Koenker and Bassett 1978, Econometrica 46, p.
    33-50; for reward models QRM: Dorka, arXiv 2409.10164.
    """
    count = outputs_AK.shape[1]
    levels_K = torch.arange(1, count + 1, dtype=outputs_AK.dtype, device=outputs_AK.device) / (count + 1)
    known = torch.isfinite(data.score_A)
    above_AK = (data.score_A.to(outputs_AK.dtype).where(known, 0.0).unsqueeze(1) - outputs_AK) * known.unsqueeze(1)
    return torch.maximum(levels_K * above_AK, (levels_K - 1.0) * above_AK).sum() / count


def scaled_bradley_terry(rewards_A: Tensor, data: Judged, objective: Objective) -> Tensor:
    """|m| times -log sigmoid(r_winner - r_loser), where m is the margin of the data.

    The count stays that of the pairs: a step of large margins has a large loss. HelpSteer2-Preference: Wang et al.,
    arXiv 2410.01257.
    """
    plain, size_P = replace(data, margin_P=torch.zeros_like(data.margin_P)), data.margin_P.abs().to(rewards_A.dtype)
    return _pairwise(rewards_A, plain, objective, lambda d: -F.logsigmoid(d) * size_P)


def focal(rewards_A: Tensor, data: Judged, objective: Objective) -> Tensor:
    """-(1 - 2 max(0, P - 1/2))^gamma log P, P = sigmoid(r_winner - r_loser - margin).

    Pairs that are ranked right add the less, the surer they are. Focal ranking loss of InternLM2: Cai et al., arXiv
    2403.17297, with gamma = 2.
    """
    return _pairwise(
        rewards_A,
        data,
        objective,
        # 1 - 2 max(0, P - 1/2) is 2 (1 - P) where P is over 1/2, and 1 - P is sigmoid(-d) without cancellation.
        lambda d: -F.logsigmoid(d) * (2.0 * torch.sigmoid(-d)).clamp(max=1.0).pow(objective.gamma),
    )


def listwise(rewards_A: Tensor, data: Judged, objective: Objective) -> Tensor:
    """The cross entropy of the softmax over the K options of a comparison with their probabilities, the scores.

    loss.brier adds its weight times sum_k (p_k - y_k)^2 (Brier 1950, Monthly Weather Review 78), loss.rps its weight
    times sum_(k<K) (P_k - Y_k)^2 / (K - 1) of the cumulated probabilities, in the order of the row (Epstein 1969,
    Journal of Applied Meteorology 8). ListNet: Cao et al. 2007, "Learning to rank: from pairwise approach to listwise
    approach", ICML, which takes the softmax of the scores as y.
    """
    # The largest reward of each list is taken out of the exponentials, so that none overflows.
    known, lists = torch.isfinite(data.score_A), len(data.list_A) + 1
    target_A = data.score_A.to(rewards_A.dtype).where(known, 0.0)
    lowest = rewards_A.detach().new_full((lists,), -torch.inf)
    top_A = lowest.scatter_reduce(0, data.list_A, rewards_A.detach(), "amax").index_select(0, data.list_A)
    shifted_A = rewards_A - top_A
    sum_A = pick(
        add_at(torch.zeros(lists, dtype=shifted_A.dtype, device=shifted_A.device), data.list_A, shifted_A.exp()),
        data.list_A,
    )
    log_p_A = shifted_A - sum_A.log()
    loss = -(target_A * log_p_A).sum()
    error_A = (log_p_A.exp() - target_A).where(known, 0.0)
    if objective.brier:
        loss = loss + objective.brier * (error_A * error_A).sum()
    if objective.rps:
        # The sums within each list: those of the whole batch, less that in front of the list. The last one is 0.
        whole_A = error_A.cumsum(0)
        first = data.list_A != torch.cat([data.list_A.new_full((1,), -1), data.list_A])[:-1]
        before_L = add_at(
            torch.zeros(lists, dtype=whole_A.dtype, device=whole_A.device),
            data.list_A,
            (whole_A - error_A).where(first, 0.0),
        )
        size_L = add_at(torch.zeros_like(before_L), data.list_A, torch.ones_like(whole_A))
        within_A = whole_A - pick(before_L, data.list_A)
        loss = (
            loss
            + objective.rps
            * (within_A * within_A / (size_L - 1.0).clamp(min=1.0).index_select(0, data.list_A)).where(known, 0.0).sum()
        )
    return loss


OBJECTIVES: dict[str, Callable[[Tensor, Judged, Objective], Tensor]] = {
    "bradley_terry": bradley_terry,
    "hinge": hinge,
    "rao_kupper": rao_kupper,
    "davidson": davidson,
    "plackett_luce": plackett_luce,
    "regression": regression,
    "scaled_bradley_terry": scaled_bradley_terry,
    "focal": focal,
    "listwise": listwise,
    "quantile_regression": quantile_regression,
}


class _WithOwn(dict[str, Callable[[Tensor, Judged, Objective], Tensor]]):
    """A name with a colon is a function of the user, see rmcore/README.md."""

    def __missing__(self, name: str) -> Callable[[Tensor, Judged, Objective], Tensor]:
        return imported(name, "loss.name")


OBJECTIVES = _WithOwn(OBJECTIVES)


def _columns(values: Tensor, places: tuple[int, ...]) -> Tensor:
    """The columns at `places`, without an index tensor, whose copy to a device the host would wait for."""
    if places == tuple(range(places[0], places[0] + len(places))):
        return values[:, places[0] : places[0] + len(places)]
    return torch.stack([values[:, place] for place in places], dim=1)


def _pairwise(rewards_A: Tensor, data: Judged, objective: Objective, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The weighted sum of loss(d) over the pairs, with label smoothing, centering and the log barrier."""
    winner_P, loser_P = pick(rewards_A, data.winner_P), pick(rewards_A, data.loser_P)
    d, total = winner_P - loser_P - data.margin_P.to(rewards_A.dtype), winner_P + loser_P
    each = loss(d)
    if smoothing := objective.label_smoothing:
        each = (1.0 - smoothing) * each + smoothing * loss(-d)
    each = each + objective.centering * total * total
    if objective.log_barrier:
        each = each + objective.log_barrier * (_barrier(winner_P) + _barrier(loser_P)) / 2.0
    return (data.weight_P.to(rewards_A.dtype) * each).sum()


def _barrier(rewards: Tensor) -> Tensor:
    """-log(5 + r) - log(5 - r) within (-5, 5), else 0. InternLM2: Cai et al., arXiv 2403.17297."""
    inside = rewards.abs() < BOUND
    kept = rewards.where(inside, 0.0)
    return -(torch.log(BOUND + kept) + torch.log(BOUND - kept)).where(inside, 0.0)


def _tied(rewards_A: Tensor, data: Judged, objective: Objective, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The weighted sum of loss(d) over the ties, with centering. Ties have neither a margin nor label smoothing."""
    a_Q, b_Q = pick(rewards_A, data.tie_a_Q), pick(rewards_A, data.tie_b_Q)
    total = a_Q + b_Q
    return (data.tie_weight_Q.to(rewards_A.dtype) * (loss(a_Q - b_Q) + objective.centering * total * total)).sum()
