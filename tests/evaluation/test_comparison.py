"""Checks the comparison of models: p-values against exact tests, intervals against plain resampling, common rows."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rmcore.config import UserError
from rmcore.evaluation import comparison
from rmcore.evaluation.answer_metrics import AnswerArrays
from rmcore.evaluation.comparison import Judgements, bootstrap_interval, common, compare, differences, holm, swap_test
from rmcore.evaluation.pair_metrics import PairArrays, pair_metrics


def generator(seed: int = 1) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def error(p: float) -> float:
    """Four standard deviations of a share of SWAPS draws, and the one that is added to both counts."""
    return 4 * math.sqrt(p * (1 - p) / comparison.SWAPS) + 1 / comparison.SWAPS


@pytest.mark.parametrize(("alone", "other"), [(12, 5), (5, 12), (1, 0), (30, 30), (60, 31), (400, 340)])
def test_single_pairs_give_mcnemars_exact_p(alone: int, other: int) -> None:
    """The exact test is binomial on the pairs that only one model gets right; those of both or none do not count."""
    gains = np.concatenate([np.ones(alone), -np.ones(other), np.zeros(100)])
    exact = stats.binomtest(alone, alone + other).pvalue
    assert swap_test(gains, generator()) == pytest.approx(exact, abs=error(exact))


def test_weighted_comparisons_give_the_p_of_all_swaps() -> None:
    """All 2^11 signs by enumeration; some sizes are equal, some not, and one is 0."""
    gains = np.array([1.0, -1 / 6, 1 / 3, 1 / 3, -1 / 2, 1.0, 0.0, 2 / 3, -1 / 6, 1.0, 0.7])
    swapped = np.array([np.dot(signs, gains) for signs in itertools.product((-1, 1), repeat=len(gains))])
    exact = float((np.abs(swapped) >= abs(gains.sum()) - 1e-12).mean())
    assert 0.01 < exact < 0.2
    assert swap_test(gains, generator()) == pytest.approx(exact, abs=error(exact))


@pytest.mark.parametrize(("gain", "count"), [(0.7, 6), (1 / 3, 10)])
def test_sums_that_differ_by_rounding_are_equal(gain: float, count: int) -> None:
    """Equal gains: two of the 2^count sums reach the observed one, which numpy adds in another order."""
    exact = 2.0 ** (1 - count)
    assert swap_test(np.full(count, gain), generator()) == pytest.approx(exact, abs=error(exact))


def test_equal_models_are_called_different_as_often_as_the_level_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """500 seeded pairs of equally good models on comparisons of six pairs, all right or all wrong together."""
    monkeypatch.setattr(comparison, "SWAPS", 1000)
    draws = generator(3)
    found, by_pair = [], []
    for number in range(500):
        gains = draws.integers(-1, 2, 40) * draws.uniform(0.2, 1.0, 40)
        found.append(swap_test(gains, draws))
        if number < 100:
            by_pair.append(swap_test(np.repeat(gains, 6), draws))
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(found) <= level) == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 500))
    assert np.mean(np.array(by_pair) <= 0.05) > 0.2, "pairs of one comparison are not independent"


def test_the_interval_is_that_of_plain_resampling() -> None:
    draws = generator(4)
    weights = np.concatenate([np.ones(60), draws.uniform(0.2, 3.0, 60)])
    gains = draws.choice([-1, 0, 0, 1, 1], 120) * weights
    plain = np.array([(gains[i].sum() / weights[i].sum()) for i in draws.integers(0, 120, (20_000, 120))])
    found = bootstrap_interval(gains, weights, generator())
    # A quantile at 0.025 of B draws varies by sqrt(0.025 * 0.975 / B) / density; 0.06 standard deviations for both.
    np.testing.assert_allclose(found, np.quantile(plain, [0.025, 0.975]), atol=0.15 * plain.std())
    normal = gains.sum() / weights.sum() + np.array([-1.96, 1.96]) * plain.std()
    np.testing.assert_allclose(found, normal, atol=0.3 * plain.std())


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and holm([0.7]) == [0.7] and holm([]) == []
    assert holm([0.5, 0.6]) == [1.0, 1.0]


# Comparisons as (prompt, source, pairs of answers as (winner, loser)); two answers unless a pair has the answer 2.
ROWS: list[tuple[int, int, list[tuple[int, int]]]] = [
    (11, 0, [(0, 1)]), (12, 1, [(0, 1), (0, 2), (1, 2)]), (13, 0, [(1, 0)]), (11, 0, [(1, 0)]), (14, 1, [(0, 1)]),
    (15, 1, [(0, 1), (1, 0)]),
]  # fmt: skip


def judged(rows: list[int], seed: int, sources: tuple[str, ...] = ("a", "b")) -> Judgements:
    """Some of ROWS with random rewards that depend on the row and the seed alone."""
    rewards: list[float] = []
    columns: dict[str, list[Any]] = {name: [] for name in ("winner", "loser", "weight", "comparison", "source")}
    length, of_answer, of_source = [], [], []
    for number, row in enumerate(rows):
        _, source, pairs = ROWS[row]
        answers = 1 + max(map(max, pairs))
        for winner, loser in pairs:
            found = (len(rewards) + winner, len(rewards) + loser, 1 / len(pairs), number, sources.index("ab"[source]))
            for column, value in zip(columns.values(), found, strict=True):
                column.append(value)
        rewards += generator(100 * seed + row).normal(size=answers).tolist()
        length += [5 + row + answer for answer in range(answers)]
        of_answer += [number] * answers
        of_source += [sources.index("ab"[source])] * answers
    reward_A, length_A = np.array(rewards), np.array(length)
    winner_P, loser_P = np.array(columns["winner"]), np.array(columns["loser"])
    pairs_ = PairArrays(
        reward_A[winner_P], reward_A[loser_P], np.array(columns["weight"]), length_A[winner_P], length_A[loser_P],
        np.array(columns["comparison"]), winner_P, loser_P, np.array(columns["source"]), sources,
    )  # fmt: skip
    answers_ = AnswerArrays(reward_A, length_A, np.array(of_answer), np.array(of_source))
    return Judgements(pairs_, answers_, np.array([ROWS[row][0] for row in rows], dtype=np.uint64))


def same(one: Judgements, other: Judgements) -> None:
    for part in ("pairs", "answers"):
        for name, value in vars(getattr(one, part)).items():
            np.testing.assert_array_equal(value, getattr(getattr(other, part), name), err_msg=name)
    np.testing.assert_array_equal(one.prompt_N, other.prompt_N)


def test_only_comparisons_of_all_models_count() -> None:
    """Each model drops another row; the arrays are then as if the file had only the other rows."""
    kept, left_out = common({"x": judged([0, 1, 2, 3, 5], 1), "y": judged([0, 1, 3, 4, 5], 2)})
    same(kept["x"], judged([0, 1, 3, 5], 1))
    same(kept["y"], judged([0, 1, 3, 5], 2))
    assert left_out == {"x": 1, "y": 1}
    # The same prompt with the other answer as the better one is another comparison: row 0 does not stand in for row 3.
    kept, left_out = common({"x": judged([0, 1], 1), "y": judged([3, 1], 2)})
    same(kept["y"], judged([1], 2))
    assert left_out == {"x": 1, "y": 1}
    # Sources may be numbered in another order, as they are in the order of the rows that are kept.
    kept, left_out = common({"x": judged([0, 1, 2], 1), "y": judged([1, 2], 2, ("b", "a"))})
    assert left_out == {"x": 1, "y": 0} and kept["x"].pairs.chosen_P.size == kept["y"].pairs.chosen_P.size == 4
    with pytest.raises(UserError, match="no comparison in common"):
        compare({"x": judged([0], 1), "y": judged([1], 2)}, {}, 0)


def test_compare() -> None:
    """Metrics are those of each model by itself, unless rows are left out; differences have the sign of `model`."""
    whole = {"x": judged([0, 1, 2, 3, 4, 5], 1), "y": judged([0, 1, 2, 3, 4, 5], 2), "z": judged([0, 1, 2, 3, 4, 5], 3)}
    metrics = {name: pair_metrics(one.pairs, one.answers) for name, one in whole.items()}
    found = compare(whole, metrics, 7)
    assert found["models"] == metrics and found["comparison"]["left_out"] == {"x": 0, "y": 0, "z": 0}
    rows = found["comparison"]["differences"]
    assert [(row["model"], row["baseline"]) for row in rows] == [("x", "y"), ("x", "z"), ("y", "z")]
    for row in rows:
        expected = metrics[row["model"]]["accuracy"] - metrics[row["baseline"]]["accuracy"]
        assert row["difference"] == pytest.approx(expected) and row["low"] <= row["difference"] <= row["high"]
        one, other = (whole[row[name]].pairs for name in ("model", "baseline"))
        right = [(p.chosen_P > p.rejected_P) for p in (one, other)]
        assert row["only_model"] == (right[0] & ~right[1]).sum() and row["count"] == 9
        assert row["agreement"] == pytest.approx(np.average(right[0] == right[1], weights=one.weight_P))
        margins = [p.chosen_P - p.rejected_P for p in (one, other)]
        assert row["margin_spearman"] == pytest.approx(stats.spearmanr(*margins).statistic)
        assert row["p"] <= row["p_holm"] <= 1
    assert found["comparison"]["sources"].keys() == {"a", "b"}
    assert found == compare(whole, metrics, 7), "seeded"
    part = compare({**whole, "y": judged([0, 1, 2, 3, 5], 2)}, metrics, 7)
    assert part["models"]["x"] == pair_metrics(
        *(vars(judged([0, 1, 2, 3, 5], 1))[name] for name in ("pairs", "answers"))
    )


def test_equal_models_and_weightless_pairs() -> None:
    one = judged([0, 1, 2, 3, 4, 5], 1)
    [row] = differences({"x": one.pairs, "copy": one.pairs}, 0)["differences"]
    assert (row["difference"], row["low"], row["high"], row["p"], row["agreement"]) == (0, 0, 0, 1, 1)
    weightless = PairArrays(**{**vars(one.pairs), "weight_P": np.zeros(9)})
    assert differences({"x": weightless, "copy": weightless}, 0) == {"differences": [], "sources": {}}
