"""Computes metrics of single answers: mean and spread of the rewards, their correlation with length, best of k.

Input: the reward, length and comparison of each of A answers, and which answer beat which. Output: a dict of metrics.
Example: rewards [3, 1, 3] of one comparison whose first answer beats both others -> best_of_k_accuracy 1/2: two answers
share the highest reward, one of them is the best. Lengths [30, 10, 20] -> Pearson correlation 0.866 over all answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

FEWEST = 3  # answers that a comparison needs for best of k; with two answers, best of k would be the accuracy


@dataclass(frozen=True)
class AnswerArrays:
    """The data and the rewards of all answers, each array [A], in the order of the data.

    Args:
        reward_A: fp64.
        length_A: tokens behind the prompt.
        comparison_A: the number of the answer's comparison, ascending.
        source_A: index into the sources.
    """

    reward_A: np.ndarray
    length_A: np.ndarray
    comparison_A: np.ndarray
    source_A: np.ndarray


def reward_metrics(answers: AnswerArrays, members: np.ndarray) -> dict[str, float]:
    """Metrics of the answers with these numbers; a correlation is NaN if all rewards or all lengths are equal.

    reward_mean, reward_std: over the answers.
    length_pearson, length_spearman: correlation of reward and length.
    length_pearson_within, length_spearman_within: the same after the mean of its comparison is subtracted from each
        reward and length, so that long prompts with high rewards do not count.
    """
    reward, length = answers.reward_A[members], answers.length_A[members].astype(np.float64)
    _, group = np.unique(answers.comparison_A[members], return_inverse=True)
    within = [values - (np.bincount(group, weights=values) / np.bincount(group))[group] for values in (reward, length)]
    return {
        "reward_mean": float(reward.mean()),
        "reward_std": float(reward.std()),
        "length_pearson": pearson(reward, length),
        "length_spearman": pearson(ranks(reward), ranks(length)),
        "length_pearson_within": pearson(*within),
        "length_spearman_within": pearson(*map(ranks, within)),
    }


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """The linear correlation of two arrays, NaN if one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    spread = float(np.sqrt((x * x).sum()) * np.sqrt((y * y).sum()))
    return float((x * y).sum()) / spread if spread > 0 else float("nan")


def ranks(values: np.ndarray) -> np.ndarray:
    """1 for the smallest value; equal values share the mean of their ranks: [5, 7, 5] -> [1.5, 3, 1.5]."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]


def best_of_k(
    answers: AnswerArrays, winner_P: np.ndarray, loser_P: np.ndarray, weight_P: np.ndarray, members: np.ndarray
) -> dict[str, Any]:
    """How often the answer with the highest reward is a best one, over comparisons of three or more answers.

    A best answer loses to no other. If n answers share the highest reward, each is worth 1/n. Comparisons in which
    every answer or no answer is a best one do not count. `members`: the numbers of the answers, whole comparisons.

    Returns best_of_k_accuracy, best_of_k_chance (of an answer drawn at random), best_of_k_count (comparisons), and
    `best_of` with the same by k; {} if no comparison counts.
    """
    # Number of answers of each comparison, and where its answers begin.
    best_A = ~beaten(len(answers.reward_A), winner_P, loser_P, weight_P)
    reward, best = answers.reward_A[members], best_A[members]
    _, first, k_C = np.unique(answers.comparison_A[members], return_index=True, return_counts=True)
    if not len(first):
        return {}

    # Of the answers that share the highest reward of their comparison, the share that is best is the credit.
    top = reward == np.repeat(np.maximum.reduceat(reward, first), k_C)
    best_C, top_C, both_C = (np.add.reduceat(which.astype(np.float64), first) for which in (best, top, top & best))
    credit_C = both_C / np.maximum(top_C, 1.0)  # a NaN among the rewards leaves no top
    chance_C = best_C / k_C
    counts_C = (k_C >= FEWEST) & (best_C > 0) & (best_C < k_C)
    if not counts_C.any():
        return {}

    def share(part_C: np.ndarray) -> dict[str, float]:
        accuracy, chance = float(credit_C[part_C].mean()), float(chance_C[part_C].mean())
        return {"accuracy": accuracy, "chance": chance, "count": int(part_C.sum())}

    by_k = {str(k): share(counts_C & (k_C == k)) for k in np.unique(k_C[counts_C]).tolist()}
    return {**{f"best_of_k_{name}": value for name, value in share(counts_C).items()}, "best_of": by_k}


def beaten(count: int, winner_P: np.ndarray, loser_P: np.ndarray, weight_P: np.ndarray) -> np.ndarray:
    """bool [count]: whether an answer loses to some other one, by the total weight of the pairs between the two."""
    # `net` is what the answer of the lower number wins against the other, per pair of answers.
    low_P, high_P = np.minimum(winner_P, loser_P), np.maximum(winner_P, loser_P)
    _, first, group_P = np.unique(pair_numbers(winner_P, loser_P), return_index=True, return_inverse=True)
    net = np.bincount(group_P, weights=np.where(winner_P == low_P, weight_P, -weight_P), minlength=len(first))
    lost = np.zeros(count, dtype=bool)
    lost[high_P[first[net > 0]]] = True
    lost[low_P[first[net < 0]]] = True
    return lost


def pair_numbers(winner_P: np.ndarray, loser_P: np.ndarray) -> np.ndarray:
    """int64 [P]: one number per pair of answers, whichever of the two wins."""
    low_P, high_P = (order(winner_P, loser_P).astype(np.int64) for order in (np.minimum, np.maximum))
    return low_P * (high_P.max(initial=0) + 1) + high_P
