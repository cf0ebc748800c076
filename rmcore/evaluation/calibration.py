"""Measures how well the rewards work as probabilities: ECE, Brier score and the table of a reliability diagram.

Input: reward margins and weights of P pairs. Output: a dict of metrics.
Example: margins [2, 2, -2] -> confidence 0.8808 in the bin from 0.85 to 0.9, accuracy 2/3, ECE 0.2141; Brier
(2 * 0.1192^2 + 0.8808^2) / 3 = 0.2681.

The model predicts sigmoid(margin) as the probability that the winner is better. Its confidence in the answer that it
prefers is sigmoid(|margin|), from 1/2 to 1; it is right if the margin is positive. A tie has confidence 1/2 and counts
as half right.

ECE: Guo et al. 2017, "On calibration of modern neural networks" (arXiv 1706.04599), eq. 3, over ten equal bins.
Brier 1950, "Verification of forecasts expressed in terms of probability", Monthly Weather Review 78, p. 1-3: for one of
the two outcomes, so that a constant prediction of 1/2 scores 0.25.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BINS = 10  # of the confidence, from 1/2 to 1


def calibration(margin_P: np.ndarray, weight_P: np.ndarray) -> dict[str, Any]:
    """`ece`, `brier`, and `reliability`: the limits of each bin that has pairs, and the count, share of the weight,
    mean confidence and accuracy of its pairs. The sum of the weights must be positive.

    A soft label's two directions are two pairs: Brier is then p (1 - q)^2 + (1 - p) q^2 for a label p and a forecast q.
    """
    confidence_P = 1 / (1 + np.exp(-np.abs(margin_P)))
    right_P = np.where(margin_P == 0, 0.5, margin_P > 0)
    total = weight_P.sum()

    # ECE: the distance between confidence and accuracy in each bin, weighted by the share of the pairs in it.
    edges = np.linspace(0.5, 1.0, BINS + 1)
    bin_P = np.searchsorted(edges[1:-1], confidence_P)  # a confidence on an edge belongs to the lower bin
    rows, ece = [], 0.0
    for number in np.unique(bin_P).tolist():
        members = bin_P == number
        weight = weight_P[members]
        if not weight.sum() > 0:
            continue
        share = float(weight.sum() / total)
        confidence = float((confidence_P[members] * weight).sum() / weight.sum())
        accuracy = float((right_P[members] * weight).sum() / weight.sum())
        ece += share * abs(accuracy - confidence)
        rows.append(
            {
                "low": float(edges[number]),
                "high": float(edges[number + 1]),
                "count": len(weight),
                "share": share,
                "confidence": confidence,
                "accuracy": accuracy,
            }
        )

    # Brier: the squared probability that the model gives to the wrong outcome.
    wrong_P = np.where(margin_P > 0, 1 - confidence_P, confidence_P)
    return {"ece": ece, "brier": float((wrong_P**2 * weight_P).sum() / total), "reliability": rows}
