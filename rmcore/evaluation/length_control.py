"""Estimates the accuracy at equal length: what a model would reach if the two answers of every pair were equally long.

Input: of P pairs, whether the model is right, how many tokens the winner is longer than the loser, and the weight.
Output: the accuracy at equal length with its interval, or None where the lengths cannot show it.
Example: 90 of 100 pairs whose winner is 50 tokens longer are right, and 30 of 100 whose winner is 50 tokens shorter:
the accuracy is 0.6, and at equal length 0.663, halfway between the two on the scale of log odds.

The fit is log odds(right) = a + b tanh(difference / s), where s is the standard deviation of the differences; the
accuracy at equal length is sigmoid(a). Source: Dubois et al. 2024, "Length-Controlled AlpacaEval" (arXiv 2404.04475),
section 3, whose model has the same term for length. Their terms for the model and for the difficulty of an instruction
do not apply here: one model is fitted, and the outcome is agreement with the label, not a win over a baseline.
"""

from __future__ import annotations

import numpy as np

from rmcore.evaluation.intervals import wilson_interval

PRIOR = 10.0  # standard deviation of a normal prior of b, so that b stays finite where the lengths separate the pairs
ROUNDS = 100  # most Newton steps; ten are usual


def accuracy_at_equal_length(
    right_P: np.ndarray, longer_P: np.ndarray, weight_P: np.ndarray, comparison_P: np.ndarray, judgements: int
) -> tuple[float, float, float] | None:
    """The accuracy at equal length, and the ends of its 95 % interval.

    Args:
        right_P: bool, whether the model prefers the winner.
        longer_P: tokens of the winner minus tokens of the loser.
        weight_P: fp64, with a positive sum.
        comparison_P: the number of the comparison; its pairs are not independent.
        judgements: the number of different pairs of answers, the most trials that the pairs can be worth.

    Without any difference of length it is the accuracy. None if all differences are the same number of tokens, not 0:
    then nothing shows the influence of length.

    The interval is Wilson's, with as many trials as give the variance of sigmoid(a). That is the larger of the model's
    own variance and the sandwich with comparisons as clusters: Liang and Zeger 1986, "Longitudinal data analysis using
    generalized linear models", Biometrika 73, p. 13-22. The model's own is large where all winners are the longer or
    all the shorter ones, so that equal lengths lie outside of what was seen.
    """
    used = weight_P > 0
    right_P, longer_P = right_P[used].astype(np.float64), longer_P[used].astype(np.float64)
    _, cluster_P = np.unique(comparison_P[used], return_inverse=True)
    weight_P = weight_P[used] / weight_P[used].mean()  # so that PRIOR is relative to the number of pairs
    mean = float((weight_P * longer_P).sum() / weight_P.sum())
    scale = float(np.sqrt((weight_P * (longer_P - mean) ** 2).sum() / weight_P.sum()))
    if scale == 0 and mean != 0:
        return None
    term_P = np.tanh(longer_P / scale) if scale > 0 else np.zeros_like(longer_P)
    design_P2 = np.stack([np.ones_like(term_P), term_P], axis=1)  # for a and b

    accuracy = float((weight_P * right_P).sum() / weight_P.sum())
    clusters = int(cluster_P.max()) + 1
    if accuracy in (0.0, 1.0):  # no error, or nothing right: no difference of length changes that
        return accuracy, *wilson_interval(accuracy, clusters)

    # Variance of a. The sandwich is the inverse curvature around the outer products of the clusters' gradients.
    a, b = _fit(right_P, design_P2, weight_P)
    predicted_P = _sigmoid(design_P2 @ np.array([a, b]))
    bread = np.linalg.inv(_curvature(design_P2, weight_P, predicted_P))
    gradient_P2 = (weight_P * (right_P - predicted_P))[:, None] * design_P2
    gradient_C2 = np.stack([np.bincount(cluster_P, weights=column) for column in gradient_P2.T], axis=1)
    variance = max(float((bread @ (gradient_C2.T @ gradient_C2) @ bread)[0, 0]), float(bread[0, 0]))

    level = float(_sigmoid(np.array(a)))
    spread = level * (
        1 - level
    )  # the derivative of sigmoid at a, so that sigmoid(a) has the variance spread^2 variance
    worth = 1 / (spread * variance) if spread * variance > 0 else clusters
    return level, *wilson_interval(level, min(judgements, worth))


def _fit(right_P: np.ndarray, design_P2: np.ndarray, weight_P: np.ndarray) -> np.ndarray:
    """[a, b] of the largest likelihood times prior, by Newton's method with halved steps. The function is concave."""

    def height(at: np.ndarray) -> float:
        odds_P = design_P2 @ at
        return float((weight_P * (right_P * odds_P - np.logaddexp(0.0, odds_P))).sum() - (at[1] / PRIOR) ** 2 / 2)

    found = np.zeros(2)
    reached = height(found)
    for _ in range(ROUNDS):
        predicted_P = _sigmoid(design_P2 @ found)
        gradient = design_P2.T @ (weight_P * (right_P - predicted_P)) - np.array([0.0, found[1] / PRIOR**2])
        step = np.linalg.solve(_curvature(design_P2, weight_P, predicted_P), gradient)
        while (new := height(found + step)) < reached and np.abs(step).max() > 1e-12:
            step /= 2
        found, reached = found + step, new
        if np.abs(step).max() < 1e-10:
            break
    return found


def _curvature(design_P2: np.ndarray, weight_P: np.ndarray, predicted_P: np.ndarray) -> np.ndarray:
    """[2, 2]: minus the second derivative of the function that `_fit` maximises."""
    information = (design_P2 * (weight_P * predicted_P * (1 - predicted_P))[:, None]).T @ design_P2
    return information + np.diag([0.0, 1 / PRIOR**2])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))
