"""Compares models on the same pairs: differences of accuracy with intervals and p-values, and how often models agree.

Input: the rewards of each model for the same data. Output: one dict per two models, overall and by source.
Example: of 100 pairs, model A is right on 75 and B on 68; A alone is right on 12, B alone on 5. The difference is 0.07
with a 95 % interval of -0.01 to 0.15, and p = 0.14: B may be as good as A.

The interval is a paired bootstrap: comparisons (a prompt and all its pairs) are drawn with replacement, and both models
are judged on the same draw. Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3
(percentile interval); Koehn 2004, "Statistical significance tests for machine translation evaluation".

The p-value is that of the paired randomisation test: if the models are equally good, swapping them in a comparison
changes nothing, so p is the share of random swaps whose difference is at least as large, in either direction. If every
comparison is one pair, this is McNemar's exact test. Source: Yeh 2000, "More accurate tests for the statistical
significance of result differences" (COLING), section 3.

Both are drawn under a seed. Comparisons with the same contribution are drawn together, from a binomial or multinomial
distribution, so that a million pairs take no longer than a thousand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from rmcore.config import UserError
from rmcore.evaluation.answer_metrics import AnswerArrays, pearson, ranks
from rmcore.evaluation.pair_metrics import PairArrays, pair_metrics

RESAMPLES = 10_000  # draws of the bootstrap
SWAPS = 100_000  # draws of the test; its smallest p-value is 1e-5
WORK = 100_000_000  # most random numbers of one interval or test; with more different contributions, draws are fewer
FEWEST = 1000  # draws, whatever the data
BLOCK = 4_000_000  # random numbers in memory at once


@dataclass(frozen=True)
class Judgements:
    """One model on a data set. `prompt_N`: uint64, the prompt of each comparison, the same under any template."""

    pairs: PairArrays
    answers: AnswerArrays
    prompt_N: np.ndarray


def compare(judged: Mapping[str, Judgements], metrics: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """The metrics of every model (`models`) and their differences (`comparison`, see `differences`).

    Args:
        judged: of at least two models, by name.
        metrics: those of each model by itself. They are computed anew where comparisons are left out.
    Raises UserError: no comparison has been scored by all models.
    """
    kept, left_out = common(judged)
    first = next(iter(kept.values()))
    if not len(first.pairs.weight_P):
        raise UserError("the models have no comparison in common: each drops what the other keeps")
    if any(left_out.values()):
        metrics = {name: pair_metrics(one.pairs, one.answers) for name, one in kept.items()}
    found = differences({name: one.pairs for name, one in kept.items()}, seed)
    counts = {"comparisons": len(first.prompt_N), "left_out": left_out, "seed": seed}
    return {"models": dict(metrics), "comparison": {**counts, **found}}


def common(judged: Mapping[str, Judgements]) -> tuple[dict[str, Judgements], dict[str, int]]:
    """The comparisons that every model has scored, and how many of each model's are left out.

    Models have templates, tokenizers and limits of their own, so that a row may be too long for one of them.
    Comparisons are the same if prompt, source and labels are, and if every model has as many of them.
    """
    first, *others = judged.values()
    if all(_labels_equal(first, other) for other in others):
        return dict(judged), dict.fromkeys(judged, 0)
    keys = {name: _keys(one) for name, one in judged.items()}
    counts = [Counter(found) for found in keys.values()]
    same = {key for key, count in counts[0].items() if all(other[key] == count for other in counts[1:])}
    keep = {name: np.array([key in same for key in found], dtype=bool) for name, found in keys.items()}
    kept = {name: _restricted(one, keep[name]) for name, one in judged.items()}
    return kept, {name: int((~mask).sum()) for name, mask in keep.items()}


def _labels_equal(one: Judgements, other: Judgements) -> bool:
    """Whether two models have scored the same comparisons in the same order."""
    columns = [
        (j.prompt_N, j.answers.comparison_A, j.pairs.winner_P, j.pairs.loser_P, j.pairs.weight_P, j.pairs.source_P)
        for j in (one, other)
    ]
    return one.pairs.sources == other.pairs.sources and all(map(np.array_equal, *columns))


def _keys(judged: Judgements) -> list[tuple[Any, ...]]:
    """For each comparison its prompt, number of answers, source and labels."""
    pairs, count = judged.pairs, len(judged.prompt_N)
    first_N = np.searchsorted(judged.answers.comparison_A, np.arange(count + 1))
    offset_N = np.searchsorted(pairs.comparison_P, np.arange(count + 1))
    first_P = first_N[pairs.comparison_P]
    labels = np.stack([pairs.winner_P - first_P, pairs.loser_P - first_P, pairs.weight_P, pairs.source_P], axis=1)
    keys = []
    for number, (start, end) in enumerate(zip(offset_N[:-1].tolist(), offset_N[1:].tolist(), strict=True)):
        source = pairs.sources[pairs.source_P[start]] if end > start else ""
        answers = int(first_N[number + 1] - first_N[number])
        keys.append((int(judged.prompt_N[number]), answers, source, labels[start:end, :3].tobytes()))
    return keys


def _restricted(judged: Judgements, keep_N: np.ndarray) -> Judgements:
    """The comparisons of `keep_N` (bool), and their answers and pairs, numbered anew."""
    pairs, answers = judged.pairs, judged.answers
    keep_P, keep_A = keep_N[pairs.comparison_P], keep_N[answers.comparison_A]
    number_N, number_A = np.cumsum(keep_N) - 1, np.cumsum(keep_A) - 1
    of_pairs = {name: value[keep_P] for name, value in vars(pairs).items() if name != "sources"}
    of_answers = {name: value[keep_A] for name, value in vars(answers).items()}
    of_pairs |= {name: number_A[of_pairs[name]] for name in ("winner_P", "loser_P")}
    return Judgements(
        pairs=replace(pairs, **{**of_pairs, "comparison_P": number_N[of_pairs["comparison_P"]]}),
        answers=AnswerArrays(**{**of_answers, "comparison_A": number_N[of_answers["comparison_A"]]}),
        prompt_N=judged.prompt_N[keep_N],
    )


def differences(pairs: Mapping[str, PairArrays], seed: int) -> dict[str, Any]:
    """Every two models, the earlier one as `model` and the later one as `baseline`.

    Args:
        pairs: the same pairs with the rewards of each model, by its name.
        seed: of the random draws.

    Returns `differences`, a list of dicts (see `difference`) over all pairs, and `sources`, such a list for each of
    several sources. `p_holm` is p, adjusted for the number of models by Holm's method; sources are not adjusted for.
    """
    first = next(iter(pairs.values()))
    generator = np.random.Generator(np.random.PCG64(seed))

    def rows(members_P: np.ndarray) -> list[dict[str, Any]]:
        if not members_P.any():
            return []
        found = [
            {"model": model, "baseline": baseline, **difference(pairs[model], pairs[baseline], members_P, generator)}
            for model, baseline in combinations(pairs, 2)
        ]
        adjusted = holm([row["p"] for row in found])
        return [{**row, "p_holm": p} for row, p in zip(found, adjusted, strict=True)]

    used_P = first.weight_P > 0
    overall = rows(used_P)
    by_source = {name: rows(used_P & (first.source_P == index)) for index, name in enumerate(first.sources)}
    by_source = {name: found for name, found in by_source.items() if found}
    return {"differences": overall, "sources": by_source if len(by_source) > 1 else {}}


def difference(
    model: PairArrays, baseline: PairArrays, members_P: np.ndarray, generator: np.random.Generator
) -> dict[str, Any]:
    """One model against another on the pairs of `members_P` (bool), whose weights are positive.

    difference: accuracy of the model minus that of the baseline; low, high: its 95 % interval; p: of the test.
    only_model, only_baseline: pairs on which only one of the two is right.
    agreement: weighted share of the pairs in which both prefer the same answer (or neither prefers one).
    margin_spearman: rank correlation of the two models' reward margins.
    """
    margins = [one.chosen_P[members_P] - one.rejected_P[members_P] for one in (model, baseline)]
    right, other = (margin > 0 for margin in margins)
    weight = model.weight_P[members_P]
    _, group_P = np.unique(model.comparison_P[members_P], return_inverse=True)
    weight_C = np.bincount(group_P, weights=weight)
    gain_C = np.bincount(group_P, weights=weight * (right.astype(np.float64) - other))
    low, high = bootstrap_interval(gain_C, weight_C, generator)
    return {
        "difference": float(gain_C.sum() / weight_C.sum()),
        "low": low,
        "high": high,
        "p": swap_test(gain_C, generator),
        "only_model": int((right & ~other).sum()),
        "only_baseline": int((other & ~right).sum()),
        "agreement": float(np.average(np.sign(margins[0]) == np.sign(margins[1]), weights=weight)),
        "margin_spearman": pearson(*map(ranks, margins)),
        "count": len(weight),
    }


def bootstrap_interval(gain_C: np.ndarray, weight_C: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """The 95 % percentile interval of sum(gain) / sum(weight), if the comparisons are drawn with replacement."""
    both_K, count_K = np.unique(np.stack([gain_C, weight_C], axis=1), axis=0, return_counts=True)
    drawn = []
    for size in _blocks(RESAMPLES, len(count_K)):
        count_BK = generator.multinomial(len(gain_C), count_K / len(gain_C), size=size)
        gain_B, weight_B = (count_BK @ both_K).T
        drawn.append(gain_B / weight_B)
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
    return float(low), float(high)


def swap_test(gain_C: np.ndarray, generator: np.random.Generator) -> float:
    """The two-sided p-value of |sum(gain)| if the sign of each comparison's gain is random."""
    size_K, count_K = np.unique(np.abs(gain_C[gain_C != 0]), return_counts=True)
    if not len(size_K):
        return 1.0
    # A sum of the same terms in another order may differ in its last bits, and is as large.
    observed = abs(float(gain_C.sum())) - 1e-9 * float(size_K @ count_K)
    reached = draws = 0
    for size in _blocks(SWAPS, len(size_K)):
        positive_BK = generator.binomial(count_K, 0.5, size=(size, len(size_K)))
        reached += int((np.abs((2 * positive_BK - count_K) @ size_K) >= observed).sum())
        draws += size
    return (reached + 1) / (draws + 1)  # the observed difference is one of the possible ones


def _blocks(draws: int, numbers: int) -> Iterator[int]:
    """How many draws of `numbers` random numbers to make at once, until all are made."""
    left = max(min(draws, WORK // numbers), FEWEST)
    while left > 0:
        size = min(left, max(1, BLOCK // numbers))
        yield size
        left -= size


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, adjusted for their number: [0.01, 0.04, 0.03] -> [0.03, 0.06, 0.06].

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure", Scand. J. Statistics 6, p. 65-70.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - place)))
        adjusted[index] = largest
    return adjusted
