"""Figures of an evaluation, in plain numpy, from the complete arrays of rewards in the order of the data.

In: the rewards of the winner and the loser of each of P pairs, the pairs' weights, lengths and sources. Out: a dict of
figures. The same arrays give the same figures, so every rank and every world size reports the same numbers.

Every mean is weighted by the pairs' weights. A soft label p comes as two pairs, one in each direction, weighted p and
1 - p, and K ranked answers as pairs of 1 / C(K, 2), so that a comparison counts once. For plain pairs, all of weight 1,
it is the plain mean.

Example: rewards chosen [2, 0, 1], rejected [1, 1, 1] -> accuracy 1/3 (a tie is no success), reward margins [1, -1, 0],
loss (0.3133 + 1.3133 + 0.6931) / 3 = 0.7732.

Shape legend: P pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rmcore.evaluation.answer_metrics import AnswerArrays, best_of_k, pair_numbers, reward_figures
from rmcore.evaluation.calibration import calibration

MATCHED = 0.1  # of the longer answer: lengths that differ by no more count as matched


@dataclass(frozen=True)
class PairArrays:
    """What is known of each pair, each array [P]: fp64 rewards and weights, tokens behind the prompt, the numbers of
    its comparison and of its two answers in the data, index into `sources`."""

    chosen_P: np.ndarray
    rejected_P: np.ndarray
    weight_P: np.ndarray
    chosen_length_P: np.ndarray
    rejected_length_P: np.ndarray
    comparison_P: np.ndarray
    winner_P: np.ndarray
    loser_P: np.ndarray
    source_P: np.ndarray
    sources: tuple[str, ...]


@np.errstate(invalid="ignore", over="ignore")  # a reward that is not a number makes figures that are none
def pair_figures(pairs: PairArrays, answers: AnswerArrays | None = None) -> dict[str, Any]:
    """Figures over all pairs, and under `sources` the same for each source that has pairs.

    accuracy (reward margin > 0) with its 95 % interval (accuracy_low, accuracy_high; see `accuracy_interval`); loss:
    the mean of -logsigmoid(reward margin), without the data's margins and without the objective's extras, so that runs
    compare; chosen_rewards, rejected_rewards, reward_margin: means; length_accuracy: the accuracy of always preferring
    the longer answer (an equal length counts half); accuracy_chosen_longer, accuracy_chosen_shorter: where the winner
    is the longer or the shorter answer; length_matched_accuracy, length_matched_count: where the lengths differ by
    at most a tenth of the longer; ece, brier, reliability (overall alone): see rmcore.evaluation.calibration; count
    of pairs. With
    `answers` also the figures of rmcore.evaluation.answer_metrics.
    Without pairs (or with weights of 0 alone) there is only `count`; a figure over no pairs is left out.
    """
    everything = _figures(pairs, np.arange(len(pairs.chosen_P)))
    if answers is not None and len(pairs.chosen_P):
        everything |= _answer_figures(pairs, answers, np.arange(len(answers.reward_A)))
    by_source = {}
    for index, name in enumerate(pairs.sources):
        members = np.flatnonzero(pairs.source_P == index)
        if not len(members):
            continue
        figures = _figures(pairs, members)
        figures.pop("reliability", None)  # a table a source would fill run_status.json
        if answers is not None:
            figures |= _answer_figures(pairs, answers, np.flatnonzero(answers.source_A == index))
        by_source[name] = figures
    return {**everything, "sources": by_source}


def _answer_figures(pairs: PairArrays, answers: AnswerArrays, members: np.ndarray) -> dict[str, Any]:
    best = best_of_k(answers, pairs.winner_P, pairs.loser_P, pairs.weight_P, members)
    return {**reward_figures(answers, members), **best}


def _figures(pairs: PairArrays, members: np.ndarray) -> dict[str, Any]:
    count = len(members)
    weight = pairs.weight_P[members].astype(np.float64)
    total = float(weight.sum())
    if not total > 0:
        return {"count": count}
    chosen, rejected = pairs.chosen_P[members], pairs.rejected_P[members]
    margin = chosen - rejected
    lengths = [column[members].astype(np.int64) for column in (pairs.chosen_length_P, pairs.rejected_length_P)]
    longer = np.sign(lengths[0] - lengths[1])
    matched = np.abs(lengths[0] - lengths[1]) <= MATCHED * np.maximum(*lengths)

    def mean(values: np.ndarray) -> float:
        return float((values * weight).sum() / total)

    def accuracy_where(which: np.ndarray) -> float:
        return float((weight * (margin > 0))[which].sum() / weight[which].sum())

    parts = {"accuracy_chosen_longer": longer > 0, "accuracy_chosen_shorter": longer < 0,
             "length_matched_accuracy": matched}  # fmt: skip
    judgements = len(np.unique(pair_numbers(pairs.winner_P[members], pairs.loser_P[members])))
    low, high = accuracy_interval(margin > 0, weight, pairs.comparison_P[members], judgements)
    return {
        "accuracy": mean(margin > 0),
        "accuracy_low": low,
        "accuracy_high": high,
        "loss": mean(np.logaddexp(0.0, -margin)),
        "chosen_rewards": mean(chosen),
        "rejected_rewards": mean(rejected),
        "reward_margin": mean(margin),
        "length_accuracy": mean(longer + 1) / 2,
        **{name: accuracy_where(which) for name, which in parts.items() if weight[which].sum() > 0},
        "length_matched_count": int(matched.sum()),
        **calibration(margin, weight),
        "count": count,
    }


def accuracy_interval(
    correct_P: np.ndarray, weight_P: np.ndarray, comparison_P: np.ndarray, judgements: int
) -> tuple[float, float]:
    """The 95 % interval of a weighted accuracy: Wilson's, for as many trials as the pairs are worth.

    Plain pairs are a trial each. Pairs of one comparison (K answers, the two directions of a soft label) stand or fall
    together: their trials are a (1 - a) / V, where V is the variance of the ratio sum(w correct) / sum(w) between
    comparisons (without any variance: a trial a comparison). They are never more than the `judgements`: the two
    directions of one pair of answers are one.
    Source: Korn and Graubard 1998, "Confidence intervals for proportions with small expected number of positive counts
    estimated from survey data", Survey Methodology 24, p. 193-201 (the effective sample size; Wilson's for theirs).
    """
    _, group_P = np.unique(comparison_P, return_inverse=True)
    weight_C = np.bincount(group_P, weights=weight_P)
    total = weight_C.sum()
    accuracy = float((weight_P * correct_P).sum() / total)
    if len(weight_C) == len(weight_P) and (weight_P == weight_P[0]).all():
        return wilson_interval(accuracy, len(weight_P))
    residual_C = np.bincount(group_P, weights=weight_P * correct_P) - accuracy * weight_C
    variance, spread = float((residual_C**2).sum() / total**2), accuracy * (1 - accuracy)
    trials = min(judgements, spread / variance) if variance > 0 and spread > 0 else len(weight_C)
    return wilson_interval(accuracy, trials)


def wilson_interval(share: float, count: float, z: float = 1.959963984540054) -> tuple[float, float]:
    """The score interval of a share of `count` trials; the default z gives 95 %.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22, p. 209-212.
    """
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    center, scale = share + z * z / (2 * count), 1 + z * z / count
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)
