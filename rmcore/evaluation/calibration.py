"""How far the rewards can be believed as probabilities: ECE, Brier score, the table of a reliability diagram.

In: reward margins and weights of P pairs. Out: a dict of figures. A pair says sigmoid(margin) for its winner; what it
prefers, it prefers with the confidence sigmoid(|margin|), from 1/2 to 1, and is right where the margin is positive (a
tie, confidence 1/2, is half right).

Example: margins [2, 2, -2] -> confidence 0.8808 in the bin from 0.85 to 0.9, accuracy 2/3, ECE 0.2141; Brier
(2 * 0.1192^2 + 0.8808^2) / 3 = 0.2681.

ECE: Guo et al. 2017, "On calibration of modern neural networks" (arXiv 1706.04599), eq. 3, over ten equal bins.
Brier 1950, "Verification of forecasts expressed in terms of probability", Monthly Weather Review 78, p. 1-3: for one of
the two outcomes, so that 0.25 is what always saying 1/2 gives.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BINS = 10


def calibration(margin_P: np.ndarray, weight_P: np.ndarray) -> dict[str, Any]:
    """`ece`, `brier`, and `reliability`: for each bin with pairs its limits, count, share of the weight, mean
    confidence and accuracy. The weights' sum is positive.

    A soft label's two directions are two pairs: Brier is then p (1 - q)^2 + (1 - p) q^2 for a label p and a forecast q.
    """
    confidence_P = 1 / (1 + np.exp(-np.abs(margin_P)))
    right_P = np.where(margin_P == 0, 0.5, margin_P > 0)
    total = weight_P.sum()
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
            {"low": float(edges[number]), "high": float(edges[number + 1]), "count": len(weight), "share": share,
             "confidence": confidence, "accuracy": accuracy}
        )  # fmt: skip
    wrong_P = np.where(margin_P > 0, 1 - confidence_P, confidence_P)  # what is said for the loser
    return {"ece": ece, "brier": float((wrong_P**2 * weight_P).sum() / total), "reliability": rows}
