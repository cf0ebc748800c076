"""Compares the metrics of an evaluation with scikit-learn and SciPy on the same numbers."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import binomtest, bootstrap, pearsonr, rankdata, spearmanr
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from rmcore.evaluation.answer_metrics import AnswerArrays, beaten, best_of_k, ranks
from rmcore.evaluation.calibration import calibration
from rmcore.evaluation.intervals import accuracy_interval, wilson_interval
from rmcore.evaluation.pair_metrics import PairArrays, pair_metrics


def random_pairs(count: int, ties: int) -> PairArrays:
    generator = np.random.Generator(np.random.PCG64(count))
    chosen, rejected = generator.normal(size=(2, count))
    rejected[:ties] = chosen[:ties]
    return PairArrays(
        chosen_P=chosen,
        rejected_P=rejected,
        weight_P=generator.random(count),
        chosen_length_P=generator.integers(1, 9, count),
        rejected_length_P=generator.integers(1, 9, count),
        comparison_P=np.arange(count),
        winner_P=2 * np.arange(count),
        loser_P=2 * np.arange(count) + 1,
        source_P=generator.integers(0, 3, count),
        sources=("a", "b", "c", "never"),
    )


def test_metrics_against_scikit_learn() -> None:
    pairs = random_pairs(500, ties=20)
    margin = pairs.chosen_P - pairs.rejected_P
    metrics = pair_metrics(pairs)
    right, weight = np.ones(500), pairs.weight_P
    assert metrics["accuracy"] == pytest.approx(accuracy_score(right, margin > 0, sample_weight=weight), abs=1e-12)
    # A pair is one trial in which "first" wins with probability sigmoid(margin).
    loss = log_loss(right, 1 / (1 + np.exp(-margin)), labels=[0, 1], sample_weight=pairs.weight_P)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-12)
    assert metrics["reward_margin"] == pytest.approx(np.average(margin, weights=weight), rel=1e-12)
    assert metrics["chosen_rewards"] - metrics["rejected_rewards"] == pytest.approx(metrics["reward_margin"])
    assert metrics["sources"].keys() == {"a", "b", "c"}
    parts = metrics["sources"].values()
    assert sum(part["count"] for part in parts) == 500
    weights = [weight[pairs.source_P == number].sum() for number in range(3)]
    assert np.average([part["accuracy"] for part in parts], weights=weights) == pytest.approx(metrics["accuracy"])
    lengths = zip(pairs.chosen_length_P, pairs.rejected_length_P, strict=True)
    by_length = [1.0 if c > r else 0.5 if c == r else 0.0 for c, r in lengths]
    assert metrics["length_accuracy"] == pytest.approx(np.average(by_length, weights=weight))


def test_plain_pairs_have_plain_means() -> None:
    pairs = replace(random_pairs(333, ties=3), weight_P=np.ones(333))
    metrics, margin = pair_metrics(pairs), pairs.chosen_P - pairs.rejected_P
    assert metrics["accuracy"] == (margin > 0).mean() and metrics["reward_margin"] == margin.mean()
    expected = binomtest(int((margin > 0).sum()), 333).proportion_ci(0.95, method="wilson")
    assert (metrics["accuracy_low"], metrics["accuracy_high"]) == pytest.approx((expected.low, expected.high))


def test_the_two_directions_of_a_soft_label_count_as_one_comparison() -> None:
    """Labels p and rewards of 400 rows: the mean over rows, each direction weighted."""
    generator = np.random.Generator(np.random.PCG64(3))
    p, first, second = generator.uniform(0.1, 0.9, 400), generator.normal(size=400), generator.normal(size=400)
    ones = np.ones(800, dtype=np.int64)
    pairs = PairArrays(
        chosen_P=np.stack([first, second], axis=1).ravel(), rejected_P=np.stack([second, first], axis=1).ravel(),
        weight_P=np.stack([p, 1 - p], axis=1).ravel(), chosen_length_P=ones, rejected_length_P=ones,
        comparison_P=np.repeat(np.arange(400), 2), winner_P=np.arange(800), loser_P=np.arange(800) ^ 1,
        source_P=0 * ones, sources=("a",),
    )  # fmt: skip
    metrics = pair_metrics(pairs)
    assert metrics["accuracy"] == pytest.approx(np.where(first > second, p, 1 - p).mean())
    assert metrics["reward_margin"] == pytest.approx(((2 * p - 1) * (first - second)).mean())
    # Weights between 0 and 1 vary less than labels of 0 and 1 would: each row is a trial, no more.
    assert (metrics["accuracy_low"], metrics["accuracy_high"]) == wilson_interval(metrics["accuracy"], 400)


def test_the_interval_of_many_answers_against_the_bootstrap() -> None:
    """300 comparisons of 6 answers, all 15 pairs: resampling comparisons keeps the correlation between their pairs."""
    generator = np.random.Generator(np.random.PCG64(4))
    quality = generator.normal(size=(300, 6))
    rewards = quality + generator.normal(size=(300, 6)) * generator.exponential(2.0, size=(300, 1))
    first, second = np.triu_indices(6, 1)
    margins = (rewards[:, first] - rewards[:, second]) * np.sign(quality[:, first] - quality[:, second])
    correct_C = (margins > 0).mean(axis=1)
    low, high = accuracy_interval((margins > 0).ravel(), np.full(4500, 1 / 15), np.repeat(np.arange(300), 15), 4500)
    expected = bootstrap((correct_C,), np.mean, n_resamples=4000, method="percentile", random_state=5)
    # The bootstrap's own noise is some 2 % of the width, Wilson's pull towards 1/2 some 1 %; pairs taken for
    # independent would give an interval of half the width.
    width = expected.confidence_interval.high - expected.confidence_interval.low
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval), abs=0.06 * width)
    narrow = wilson_interval(float(correct_C.mean()), 4500)
    assert (narrow[1] - narrow[0]) < 0.7 * width


def test_a_tie_is_an_error() -> None:
    metrics = pair_metrics(random_pairs(30, ties=30))
    assert metrics["accuracy"] == 0.0 and metrics["loss"] == pytest.approx(np.log(2))


def test_large_margins_do_not_overflow() -> None:
    pairs = random_pairs(2, ties=0)
    pairs.chosen_P[:], pairs.rejected_P[:] = [2000.0, -2000.0], 0.0
    pairs.weight_P[:] = 1.0
    assert pair_metrics(pairs)["loss"] == 1000.0


def test_no_pairs_no_metrics() -> None:
    assert pair_metrics(random_pairs(0, ties=0)) == {"count": 0, "sources": {}}


@pytest.mark.parametrize(("successes", "count"), [(0, 7), (7, 7), (1, 3), (650, 1000)])
def test_the_interval_against_scipy(successes: int, count: int) -> None:
    expected = binomtest(successes, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes / count, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_calibration_against_scikit_learn() -> None:
    """Both orders of each pair, as forecasts of "the first is better": symmetric, so the upper half is enough."""
    generator = np.random.Generator(np.random.PCG64(7))
    margin = np.concatenate([generator.normal(0.7, 1.5, size=3000), np.zeros(40)])  # some ties
    found = calibration(margin, np.ones(3040))
    forecast, outcome = expit(np.concatenate([margin, -margin])), np.repeat([1, 0], 3040)
    # A tie says 1/2, on the edge between the halves: the table is compared without them.
    apart = calibration(margin[:3000], np.ones(3000))["reliability"]
    both = np.concatenate([margin[:3000], -margin[:3000]])
    accuracy, confidence = calibration_curve(np.repeat([1, 0], 3000), expit(both), n_bins=20, strategy="uniform")
    assert [row["accuracy"] for row in apart] == pytest.approx(accuracy[10:])
    assert [row["confidence"] for row in apart] == pytest.approx(confidence[10:])
    assert sum(row["count"] for row in apart) == 3000
    assert found["brier"] == pytest.approx(brier_score_loss(outcome, forecast))
    table = found["reliability"]
    assert found["ece"] == pytest.approx(sum(row["share"] * abs(row["accuracy"] - row["confidence"]) for row in table))
    assert sum(row["share"] for row in table) == pytest.approx(1.0) and table[0]["low"] == 0.5


def test_soft_labels_in_calibration_against_scikit_learn() -> None:
    generator = np.random.Generator(np.random.PCG64(8))
    label, margin = generator.uniform(size=500), generator.normal(size=500)
    found = calibration(np.stack([margin, -margin], 1).ravel(), np.stack([label, 1 - label], 1).ravel())
    outcome, forecast = np.repeat([1, 0], 500), np.tile(expit(margin), 2)
    expected = brier_score_loss(outcome, forecast, sample_weight=np.concatenate([label, 1 - label]))
    assert found["brier"] == pytest.approx(expected)
    # Labels that are the forecasts: nothing to correct.
    truth = expit(margin)
    assert calibration(np.stack([margin, -margin], 1).ravel(), np.stack([truth, 1 - truth], 1).ravel())["ece"] < 1e-15


def test_the_examples_of_the_docstrings() -> None:
    found = calibration(np.array([2.0, 2.0, -2.0]), np.ones(3))
    assert (round(found["ece"], 4), round(found["brier"], 4)) == (0.2141, 0.2681)
    answers = AnswerArrays(np.array([3.0, 1.0, 3.0]), np.array([30, 10, 20]), np.zeros(3, int), np.zeros(3, int))
    best = best_of_k(answers, np.array([0, 0]), np.array([1, 2]), np.ones(2) / 3, np.arange(3))
    assert best == {"best_of_k_accuracy": 0.5, "best_of_k_chance": 1 / 3, "best_of_k_count": 1,
                    "best_of": {"3": {"accuracy": 0.5, "chance": 1 / 3, "count": 1}}}  # fmt: skip
    assert pearsonr(answers.reward_A, answers.length_A).statistic == pytest.approx(0.866, abs=1e-3)
    assert ranks(np.array([5, 7, 5])).tolist() == [1.5, 3, 1.5]


def answers_of(pairs: PairArrays, seed: int) -> AnswerArrays:
    """The answers of plain pairs, winner and loser in turn, with their lengths."""
    reward = np.stack([pairs.chosen_P, pairs.rejected_P], axis=1).ravel()
    length = np.stack([pairs.chosen_length_P, pairs.rejected_length_P], axis=1).ravel()
    return AnswerArrays(reward, length, np.repeat(pairs.comparison_P, 2), np.repeat(pairs.source_P, 2))


def test_correlations_with_length_against_scipy() -> None:
    pairs = random_pairs(400, ties=30)  # lengths from 1 to 8: many ranks are shared
    answers = answers_of(pairs, 1)
    metrics = pair_metrics(pairs, answers)
    reward, length = answers.reward_A, answers.length_A.astype(float)
    middle = [np.repeat(values.reshape(-1, 2).mean(axis=1), 2) for values in (reward, length)]
    within = reward - middle[0], length - middle[1]
    assert metrics["length_pearson"] == pytest.approx(pearsonr(reward, length).statistic, abs=1e-12)
    assert metrics["length_spearman"] == pytest.approx(spearmanr(reward, length).statistic, abs=1e-12)
    assert metrics["length_pearson_within"] == pytest.approx(pearsonr(*within).statistic, abs=1e-12)
    assert metrics["length_spearman_within"] == pytest.approx(spearmanr(*within).statistic, abs=1e-12)
    assert (metrics["reward_mean"], metrics["reward_std"]) == pytest.approx((reward.mean(), np.std(reward)))
    own = metrics["sources"]["b"]
    assert own["length_spearman"] == pytest.approx(
        spearmanr(reward[answers.source_A == 1], length[answers.source_A == 1]).statistic
    )
    assert ranks(length).tolist() == rankdata(length).tolist()


def test_accuracy_by_length() -> None:
    pairs = random_pairs(600, ties=0)
    metrics, right = pair_metrics(pairs), pairs.chosen_P > pairs.rejected_P
    chosen, rejected = pairs.chosen_length_P, pairs.rejected_length_P
    matched = chosen == rejected  # from 1 to 8 tokens nothing else is within a tenth
    for name, which in (
        ("accuracy_chosen_longer", chosen > rejected), ("accuracy_chosen_shorter", chosen < rejected),
        ("length_matched_accuracy", matched),
    ):  # fmt: skip
        expected = accuracy_score(np.ones(which.sum()), right[which], sample_weight=pairs.weight_P[which])
        assert metrics[name] == pytest.approx(expected), name
    assert metrics["length_matched_count"] == matched.sum()
    never = replace(pairs, rejected_length_P=pairs.chosen_length_P * 2)
    assert "length_matched_accuracy" not in pair_metrics(never) and pair_metrics(never)["length_matched_count"] == 0


def test_best_of_k_against_a_loop() -> None:
    """Comparisons of 2 to 6 answers of few different qualities and rewards, so that both tie often."""
    generator = np.random.Generator(np.random.PCG64(9))
    rewards, comparison, winners, losers, expected = [], [], [], [], []
    for number in range(300):
        count, first = int(generator.integers(2, 7)), len(rewards)
        quality, reward = generator.integers(0, 3, count), generator.integers(0, 3, count).astype(float)
        for i in range(count):
            for j in range(count):
                if quality[i] > quality[j]:
                    winners.append(first + i)
                    losers.append(first + j)
        top = [i for i in range(count) if reward[i] == max(reward)]
        if count >= 3 and min(quality) < max(quality):
            expected.append(sum(quality[i] == max(quality) for i in top) / len(top))
        rewards += reward.tolist()
        comparison += [number] * count
    answers = AnswerArrays(np.array(rewards), np.ones(len(rewards)), np.array(comparison), np.zeros(len(rewards)))
    pairs = np.array(winners), np.array(losers), np.full(len(winners), 0.1)
    found = best_of_k(answers, *pairs, np.arange(len(rewards)))
    assert found["best_of_k_count"] == len(expected) > 100
    assert found["best_of_k_accuracy"] == pytest.approx(np.mean(expected))
    assert sum(part["count"] for part in found["best_of"].values()) == len(expected)
    assert found["best_of"].keys() == {"3", "4", "5", "6"}


def test_soft_labels_beat_by_their_weight() -> None:
    both = np.array([0, 1, 2, 3]), np.array([1, 0, 3, 2])
    assert beaten(5, *both, np.array([0.7, 0.3, 0.5, 0.5])).tolist() == [False, True, False, False, False]
