"""Fits and applies the temperature that turns rewards into calibrated probabilities.

Input: held-out comparisons and the rewards of their answers. Output: one number T > 0, kept in config.json as
{"rmcore": {"temperature": T}}, and the probability of each answer of a row, softmax(rewards / T).
Example: rewards [2.0, 0.0] with T = 2 give the probabilities [0.731, 0.269]; with T = 1 they would be [0.881, 0.119].

T is where the held-out log loss is least (Guo et al., arXiv 1706.04599, section 4.2): of the probabilities of a
comparison's options where the data have them, else of its pairs. It changes no ranking. As the loss is convex in 1 / T,
its derivative is bisected.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rmcore.config import UserError
from rmcore.data.tokens.comparisons import TokenizedComparisons
from rmcore.model.outputs import KEY

LIMITS = (1e-4, 1e4)  # of 1 / T


class Calibration(NamedTuple):
    """The temperature, and the mean log loss of the held-out data at T = 1 and at this T."""

    temperature: float
    before: float
    after: float


def probabilities(rewards: Sequence[float | None], temperature: float) -> list[float | None]:
    """softmax(rewards / temperature); None where there is no reward."""
    known = [reward / temperature for reward in rewards if reward is not None]
    top = max(known, default=0.0)
    total = sum(math.exp(value - top) for value in known)
    return [None if reward is None else math.exp(reward / temperature - top) / total for reward in rewards]


def read_temperature(hf_config: Any, model: str) -> float | None:
    """The temperature in the config of an exported model, None if it has none. Raises UserError for a wrong one."""
    kept = getattr(hf_config, KEY, None)
    found = kept.get("temperature") if isinstance(kept, dict) else None
    if found is None:
        return None
    if not isinstance(found, int | float) or not 0.0 < found < math.inf:
        raise UserError(f"{model}: {KEY}.temperature in its config.json is not a positive number: {found!r}")
    return float(found)


def calibrate(data: TokenizedComparisons, rewards_A: np.ndarray, *, targets: bool) -> Calibration:
    """Fit the temperature. `targets`: the scores of the data are the probabilities of each comparison's options.

    Raises UserError if there is no least loss: the rewards rank all pairs right, or none better than at random.
    """
    loss, slope = _of_options(data, rewards_A) if targets else _of_pairs(data, rewards_A)
    low, high = (math.log(limit) for limit in LIMITS)
    if not slope(LIMITS[0]) < 0.0 < slope(LIMITS[1]):
        why = "rank the held-out data no better than at random" if slope(LIMITS[0]) >= 0 else "make no held-out mistake"
        raise UserError(f"cannot fit a temperature: the rewards {why}")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(math.exp(middle)) < 0.0 else (low, middle)
    inverse = math.exp((low + high) / 2)
    return Calibration(1.0 / inverse, loss(1.0), loss(inverse))


Function = Callable[[float], float]  # of 1 / T


def _of_pairs(data: TokenizedComparisons, rewards_A: np.ndarray) -> tuple[Function, Function]:
    """The weighted mean of -log sigmoid(b d) over the pairs, and its derivative by b."""
    first_P = np.repeat(np.asarray(data.answer_offset)[:-1], data.pairs_N)
    d_P = rewards_A[first_P + data.winner] - rewards_A[first_P + data.loser]
    weight_P = np.asarray(data.weight, dtype=np.float64)
    total = max(float(weight_P.sum()), 1e-30)

    def loss(b: float) -> float:
        return float((weight_P * np.logaddexp(0.0, -b * d_P)).sum()) / total

    def slope(b: float) -> float:
        return float((weight_P * -d_P * np.exp(-np.logaddexp(0.0, b * d_P))).sum()) / total

    return loss, slope


def _of_options(data: TokenizedComparisons, rewards_A: np.ndarray) -> tuple[Function, Function]:
    """The mean cross entropy of softmax(b r) with the probabilities of each comparison, and its derivative by b."""
    pieces = itertools.pairwise(np.asarray(data.answer_offset).tolist())
    lists = [(rewards_A[i:j], data.score[i:j].astype(np.float64)) for i, j in pieces]
    lists = [(reward, target) for reward, target in lists if np.isfinite(target).all()]

    def logs(reward: np.ndarray, b: float) -> np.ndarray:
        return b * reward - np.logaddexp.reduce(b * reward)

    def loss(b: float) -> float:
        return float(np.mean([-(target * logs(reward, b)).sum() for reward, target in lists]))

    def slope(b: float) -> float:
        return float(np.mean([((np.exp(logs(reward, b)) - target) * reward).sum() for reward, target in lists]))

    return loss, slope
