"""Compares the accuracy at equal length with SciPy's optimiser, with simulated truth, and with the plain accuracy."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from rmcore.evaluation.intervals import accuracy_interval, wilson_interval
from rmcore.evaluation.length_control import PRIOR, accuracy_at_equal_length


def drawn(seed: int, count: int = 400, level: float = 0.8, slope: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong, and length differences, under the model of the fit with sigmoid(a) = level."""
    generator = np.random.Generator(np.random.PCG64(seed))
    longer_P = np.round(generator.normal(20, 60, count)).astype(np.int64)
    odds_P = math.log(level / (1 - level)) + slope * np.tanh(longer_P / longer_P.std())
    return generator.random(count) < expit(odds_P), longer_P


def plain(right_P: np.ndarray, longer_P: np.ndarray) -> tuple[float, float, float] | None:
    count = len(right_P)
    return accuracy_at_equal_length(right_P, longer_P, np.ones(count), np.arange(count), count)


def test_the_fit_against_scipy() -> None:
    """Weighted pairs. Weights are relative, so the prior is that of weights with mean 1."""
    right_P, longer_P = drawn(1)
    weight_P = np.random.Generator(np.random.PCG64(2)).random(400)
    found = accuracy_at_equal_length(right_P, longer_P, 7 * weight_P, np.arange(400), 400)
    mean = np.average(longer_P, weights=weight_P)
    term_P = np.tanh(longer_P / math.sqrt(np.average((longer_P - mean) ** 2, weights=weight_P)))

    def minus_height(at: np.ndarray) -> float:
        odds_P = at[0] + at[1] * term_P
        likelihood = (weight_P / weight_P.mean() * np.where(right_P, log_expit(odds_P), log_expit(-odds_P))).sum()
        return -likelihood + (at[1] / PRIOR) ** 2 / 2

    best = minimize(minus_height, np.zeros(2), method="BFGS", options={"gtol": 1e-9})
    assert found is not None and found[0] == pytest.approx(expit(best.x[0]), abs=1e-7)
    assert found[1] < found[0] < found[2]


def test_a_model_that_likes_length_is_better_or_worse_than_its_accuracy_says() -> None:
    """The truth at equal length is 0.8 in both; winners that are mostly longer flatter a model that likes length."""
    for slope in (1.5, -1.5):
        right_P, longer_P = drawn(3, 20_000, slope=slope)
        found = plain(right_P, longer_P)
        assert found is not None
        error = (found[2] - found[1]) / 2 / 1.96  # of the estimate; 4.5 of them are one in 150,000
        assert abs(found[0] - 0.8) < 4.5 * error
        assert (right_P.mean() - found[0]) * slope > 4.5 * error * 0.5, "the plain accuracy is off to this side"


def test_95_of_100_intervals_hold_the_truth() -> None:
    """300 simulations: with 95 % coverage, fewer than 270 or all 300 hold it in less than one case of 10,000.

    The same pairs twice, as two of one comparison: half the trials that independent pairs would be.
    """
    inside = twice = 0
    for seed in range(300):
        right_P, longer_P = drawn(100 + seed, 200)
        found = plain(right_P, longer_P)
        assert found is not None
        inside += found[1] <= 0.8 <= found[2]
        doubled = accuracy_at_equal_length(
            np.tile(right_P, 2), np.tile(longer_P, 2), np.ones(400), np.tile(np.arange(200), 2), 400
        )
        assert doubled is not None and doubled[0] == pytest.approx(found[0], abs=2e-3), "but for the prior"
        twice += doubled[1] <= 0.8 <= doubled[2]
    assert 270 <= inside < 300 and 270 <= twice < 300


def test_a_soft_label_is_at_most_one_trial() -> None:
    """The two directions of a label of 0.6 nearly cancel, so that the variance is that of more than 200 trials."""
    generator = np.random.Generator(np.random.PCG64(0))
    ahead_C, longer_C = generator.normal(0.4, 1.0, 200), np.round(generator.normal(0, 60, 200))
    right_P, longer_P = np.stack([ahead_C > 0, ahead_C < 0], 1).ravel(), np.stack([longer_C, -longer_C], 1).ravel()
    found = accuracy_at_equal_length(right_P, longer_P, np.tile([0.6, 0.4], 200), np.repeat(np.arange(200), 2), 200)
    assert found is not None and found[1:] == pytest.approx(wilson_interval(found[0], 200), abs=1e-12)


def test_without_differences_it_is_the_accuracy() -> None:
    right_P = np.arange(100) < 68
    found = plain(right_P, np.zeros(100, dtype=np.int64))
    assert found is not None and found[0] == pytest.approx(0.68, abs=1e-12)
    interval = accuracy_interval(right_P, np.ones(100), np.arange(100), 100)
    assert found[1:] == pytest.approx(interval, abs=1e-6)
    assert plain(right_P, np.full(100, 5)) is None, "one and the same difference shows no influence of length"
    assert plain(np.ones(100, dtype=bool), np.arange(100)) == (1.0, *wilson_interval(1.0, 100))
    assert plain(np.zeros(100, dtype=bool), np.arange(100)) == (0.0, *wilson_interval(0.0, 100))


def test_pairs_that_length_separates_have_a_finite_answer() -> None:
    """Always the longer answer: nothing is known about equal lengths but that they lie between."""
    longer_P = np.array([*range(-50, 0), *range(1, 51)])
    found = plain(longer_P > 0, longer_P)
    assert found is not None and found[0] == pytest.approx(0.5, abs=1e-6)
    # Winners that are all longer: equal length is outside the data, and the interval says so.
    right_P, _ = drawn(5, 100, slope=0.0)
    outside = plain(right_P, np.linspace(80, 100, 100).round().astype(np.int64))
    assert outside is not None and outside[2] - outside[1] > 0.5
    alone = plain(np.array([True]), np.array([3]))
    assert alone is None


def test_the_example_of_the_module() -> None:
    right_P = np.concatenate([np.arange(100) < 90, np.arange(100) < 30])
    found = plain(right_P, np.repeat([50, -50], 100))
    assert found is not None and found[0] == pytest.approx(0.663, abs=5e-4) and right_P.mean() == 0.6
