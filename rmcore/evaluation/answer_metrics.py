"""Figures of single answers: level and spread of the rewards, their correlation with length, best of k.

In: the reward, length and comparison of each of A answers, and which answer beat which. Out: a dict of figures.

Example: rewards [3, 1, 3] of one comparison whose first answer beats both others -> best_of_k_accuracy 1/2: two answers
share the top, one of them is the best. Lengths [30, 10, 20] -> Pearson correlation 0.866 over all answers.

Shape legend: A answers, C comparisons, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

FEWEST = 3  # answers of a comparison that counts as best of k: the best of two is what accuracy measures


@dataclass(frozen=True)
class AnswerArrays:
    """What is known of each answer, each array [A], in the order of the data: fp64 rewards, tokens behind the prompt,
    the number of its comparison (ascending), index into the sources."""

    reward_A: np.ndarray
    length_A: np.ndarray
    comparison_A: np.ndarray
    source_A: np.ndarray


def reward_figures(answers: AnswerArrays, members: np.ndarray) -> dict[str, float]:
    """reward_mean and reward_std over the answers with these numbers; length_pearson and length_spearman: correlation
    of reward with length; length_pearson_within and length_spearman_within: of both less the mean of their comparison,
    so that long prompts with high rewards say nothing. NaN where rewards or lengths are all the same.
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
    """The correlation of two arrays, NaN when one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    spread = float(np.sqrt((x * x).sum()) * np.sqrt((y * y).sum()))
    return float((x * y).sum()) / spread if spread > 0 else float("nan")


def ranks(values: np.ndarray) -> np.ndarray:
    """1 for the smallest, equal values share the mean of theirs: [5, 7, 5] -> [1.5, 3, 1.5]."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]


def best_of_k(
    answers: AnswerArrays, winner_P: np.ndarray, loser_P: np.ndarray, weight_P: np.ndarray, members: np.ndarray
) -> dict[str, Any]:
    """Whether the answer of the highest reward is one of the best, where a comparison has three answers or more.

    The best answers are those that lose to none. n answers that share the highest reward are worth 1/n each.
    best_of_k_accuracy, best_of_k_chance (of an answer drawn blindly), best_of_k_count (comparisons), and `best_of`: the
    same by k. Comparisons in which nobody or everybody is unbeaten have no best answer and do not count; {} without any
    that does. `members`: numbers of answers, whole comparisons.
    """
    best_A = ~beaten(len(answers.reward_A), winner_P, loser_P, weight_P)
    reward, best = answers.reward_A[members], best_A[members]
    _, first, k_C = np.unique(answers.comparison_A[members], return_index=True, return_counts=True)
    if not len(first):
        return {}
    top = reward == np.repeat(np.maximum.reduceat(reward, first), k_C)
    best_C = np.add.reduceat(best.astype(np.float64), first)
    top_C, both_C = (np.add.reduceat(which.astype(np.float64), first) for which in (top, top & best))
    credit_C = both_C / np.maximum(top_C, 1.0)  # a NaN among the rewards leaves no top
    counts_C = (k_C >= FEWEST) & (best_C > 0) & (best_C < k_C)
    if not counts_C.any():
        return {}
    by_k = {str(k): _share(credit_C, best_C / k_C, counts_C & (k_C == k)) for k in np.unique(k_C[counts_C]).tolist()}
    overall = {f"best_of_k_{name}": value for name, value in _share(credit_C, best_C / k_C, counts_C).items()}
    return {**overall, "best_of": by_k}


def _share(credit_C: np.ndarray, chance_C: np.ndarray, members: np.ndarray) -> dict[str, float]:
    mean, chance = float(credit_C[members].mean()), float(chance_C[members].mean())
    return {"accuracy": mean, "chance": chance, "count": int(members.sum())}


def beaten(count: int, winner_P: np.ndarray, loser_P: np.ndarray, weight_P: np.ndarray) -> np.ndarray:
    """bool [count]: the answers that lose to another by the weight of all pairs between the two."""
    low_P, high_P = np.minimum(winner_P, loser_P), np.maximum(winner_P, loser_P)
    _, first, group_P = np.unique(pair_numbers(winner_P, loser_P), return_index=True, return_inverse=True)
    net = np.bincount(group_P, weights=np.where(winner_P == low_P, weight_P, -weight_P), minlength=len(first))
    lost = np.zeros(count, dtype=bool)
    lost[high_P[first[net > 0]]] = True
    lost[low_P[first[net < 0]]] = True
    return lost


def pair_numbers(winner_P: np.ndarray, loser_P: np.ndarray) -> np.ndarray:
    """int64 [P]: the same number for the same two answers, whichever of them wins."""
    low_P, high_P = (order(winner_P, loser_P).astype(np.int64) for order in (np.minimum, np.maximum))
    return low_P * (high_P.max(initial=0) + 1) + high_P
