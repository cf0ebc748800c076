"""Computes intervals of shares: Wilson's, and Wilson's with as many trials as weighted, dependent pairs are worth.

Input: a share and its number of trials; or the pairs that it was computed from. Output: the two ends, 95 %.
Example: 68 of 100 pairs right -> 0.583 to 0.763.
"""

from __future__ import annotations

import math

import numpy as np


def accuracy_interval(
    correct_P: np.ndarray, weight_P: np.ndarray, comparison_P: np.ndarray, judgements: int
) -> tuple[float, float]:
    """The 95 % interval of a weighted accuracy: Wilson's, with as many trials as the pairs are worth.

    Each plain pair is a trial. Pairs of one comparison (K answers, the two directions of a soft label) are not
    independent. Their number of trials is a (1 - a) / V, where a is the accuracy and V the variance of the ratio
    sum(w correct) / sum(w) between comparisons; if V is 0, each comparison is a trial. There are never more trials
    than `judgements`, the number of different pairs of answers.
    Source: Korn and Graubard 1998, "Confidence intervals for proportions with small expected number of positive counts
    estimated from survey data", Survey Methodology 24, p. 193-201 (the effective sample size; Wilson's interval in
    place of theirs).
    """
    _, group_P = np.unique(comparison_P, return_inverse=True)
    weight_C = np.bincount(group_P, weights=weight_P)
    total = weight_C.sum()
    accuracy = float((weight_P * correct_P).sum() / total)
    # One pair per comparison, all of one weight: the plain interval.
    if len(weight_C) == len(weight_P) and (weight_P == weight_P[0]).all():
        return wilson_interval(accuracy, len(weight_P))
    # The residual of a comparison is what its pairs add to the numerator beyond the accuracy's share.
    residual_C = np.bincount(group_P, weights=weight_P * correct_P) - accuracy * weight_C
    variance, spread = float((residual_C**2).sum() / total**2), accuracy * (1 - accuracy)
    trials = min(judgements, spread / variance) if variance > 0 and spread > 0 else len(weight_C)
    return wilson_interval(accuracy, trials)


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """The 95 % score interval of a share of `count` trials.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22, p. 209-212.
    """
    z = 1.959963984540054  # the quantile of the normal distribution at 0.975
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    center, scale = share + z * z / (2 * count), 1 + z * z / count
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)
