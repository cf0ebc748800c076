"""Computes the metrics of an evaluation in plain numpy, from the complete arrays of rewards.

Input: the rewards of the winner and the loser of each of P pairs, in the order of the data, with the pairs' weights,
lengths and sources. Output: a dict of metrics (rmcore/evaluation/metrics.py). The same arrays give the same metrics, so
every rank and every world size reports the same numbers.
Example: rewards chosen [2, 0, 1], rejected [1, 1, 1] -> accuracy 1/3 (a tie is an error), reward margins [1, -1, 0],
loss (0.3133 + 1.3133 + 0.6931) / 3 = 0.7732.

Every mean is weighted by the pairs' weights. A soft label p comes as two pairs, one per direction, weighted p and
1 - p. K ranked answers come as pairs weighted 1 / C(K, 2), so that a comparison counts once. If all weights are 1, it
is the plain mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rmcore.evaluation.answer_metrics import AnswerArrays, best_of_k, pair_numbers, reward_metrics
from rmcore.evaluation.calibration import calibration
from rmcore.evaluation.intervals import accuracy_interval
from rmcore.evaluation.length_control import accuracy_at_equal_length

MATCHED = 0.1  # lengths match if they differ by at most this share of the longer one


@dataclass(frozen=True)
class PairArrays:
    """The data and the rewards of all pairs; each array is [P].

    Args:
        chosen_P, rejected_P: rewards of the winner and the loser, fp64.
        weight_P: fp64.
        chosen_length_P, rejected_length_P: tokens behind the prompt.
        comparison_P, winner_P, loser_P: the numbers of the comparison and of the two answers in the data.
        source_P: index into `sources`.
    """

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


@np.errstate(invalid="ignore", over="ignore")  # rewards that are NaN or Inf give metrics that are NaN or Inf
def pair_metrics(pairs: PairArrays, answers: AnswerArrays | None = None) -> dict[str, Any]:
    """The metrics over all pairs, and under `sources` the same metrics for each source that has pairs.

    rmcore/evaluation/metrics.py explains each of them. `reliability` (overall only) is the table of the reliability
    diagram. `answers` adds the metrics of rmcore.evaluation.answer_metrics. Without pairs, or if all weights are 0, the
    only metric is `count`. A metric over no pairs is left out.
    """
    overall = _metrics(pairs, np.arange(len(pairs.chosen_P)))
    if answers is not None and len(pairs.chosen_P):
        overall |= _answer_metrics(pairs, answers, np.arange(len(answers.reward_A)))
    by_source = {}
    for index, name in enumerate(pairs.sources):
        members = np.flatnonzero(pairs.source_P == index)
        if not len(members):
            continue
        metrics = _metrics(pairs, members)
        metrics.pop("reliability", None)  # a table per source would make run_status.json long
        if answers is not None:
            metrics |= _answer_metrics(pairs, answers, np.flatnonzero(answers.source_A == index))
        by_source[name] = metrics
    return {**overall, "sources": by_source}


def _answer_metrics(pairs: PairArrays, answers: AnswerArrays, members: np.ndarray) -> dict[str, Any]:
    best = best_of_k(answers, pairs.winner_P, pairs.loser_P, pairs.weight_P, members)
    return {**reward_metrics(answers, members), **best}


def _metrics(pairs: PairArrays, members: np.ndarray) -> dict[str, Any]:
    """The metrics of the pairs with these numbers."""
    count = len(members)
    weight = pairs.weight_P[members].astype(np.float64)
    total = float(weight.sum())
    if not total > 0:
        return {"count": count}

    def mean(values: np.ndarray) -> float:
        return float((values * weight).sum() / total)

    # A tie has the margin 0 and is an error.
    chosen, rejected = pairs.chosen_P[members], pairs.rejected_P[members]
    margin = chosen - rejected
    correct = margin > 0

    # Two directions of one pair of answers are one judgement, which bounds the number of independent trials.
    judgements = len(np.unique(pair_numbers(pairs.winner_P[members], pairs.loser_P[members])))
    low, high = accuracy_interval(correct, weight, pairs.comparison_P[members], judgements)

    # `longer` is 1, 0 or -1 where the winner is longer than, as long as, or shorter than the loser. Preferring the
    # longer answer is right in the first case and right half the time in the second.
    chosen_length = pairs.chosen_length_P[members].astype(np.int64)
    rejected_length = pairs.rejected_length_P[members].astype(np.int64)
    longer = np.sign(chosen_length - rejected_length)
    controlled = accuracy_at_equal_length(
        correct, chosen_length - rejected_length, weight, pairs.comparison_P[members], judgements
    )
    names = ("length_controlled_accuracy", "length_controlled_low", "length_controlled_high")
    matched = np.abs(chosen_length - rejected_length) <= MATCHED * np.maximum(chosen_length, rejected_length)
    parts = {
        "accuracy_chosen_longer": longer > 0,
        "accuracy_chosen_shorter": longer < 0,
        "length_matched_accuracy": matched,
    }
    by_length = {
        name: float((weight * correct)[part].sum() / weight[part].sum())
        for name, part in parts.items()
        if weight[part].sum() > 0
    }

    return {
        "accuracy": mean(correct),
        "accuracy_low": low,
        "accuracy_high": high,
        "loss": mean(np.logaddexp(0.0, -margin)),  # -log sigmoid(margin)
        "chosen_rewards": mean(chosen),
        "rejected_rewards": mean(rejected),
        "reward_margin": mean(margin),
        "length_accuracy": mean(longer + 1) / 2,
        **(dict(zip(names, controlled, strict=True)) if controlled else {}),
        **by_length,
        "length_matched_count": int(matched.sum()),
        **calibration(margin, weight),
        "count": count,
    }
