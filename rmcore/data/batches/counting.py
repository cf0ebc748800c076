"""Counts what an objective counts of each comparison: pairs, lists, answers, cells or targets.

Input: the tokenised comparisons, and `Traits.counts` of the objective.
Output: one number per comparison. Example: three answers with the scores 5, 3, 3 have two pairs of weight 1/3 and a tie
of weight 1/3: counted_N is 1.0 for `pairs`, 1.0 for `lists`, 3.0 for `answers`; size_N is 3, 3 and 3.
"""

from collections.abc import Sequence

import numpy as np

from rmcore.config import Config
from rmcore.data.tokens.comparisons import TokenizedComparisons
from rmcore.data.tokens.ragged_arrays import sums_between


def counted_N(data: TokenizedComparisons, counts: str, attributes: Sequence[int] = ()) -> np.ndarray:
    """float64 [N]: the weights of a comparison's pairs and ties (`pairs`), 1 (`lists`), the number of its scored
    answers (`answers`), of its known values among `attributes` (`cells`), or 1 if its answers have probabilities
    (`targets`). The summed loss of a step is divided by the sum over the step."""
    if counts == "pairs":
        return data.weight_N + sums_between(data.tie_weight, data.tie_offset)
    if counts == "lists":
        return np.ones(len(data))
    if counts == "cells":
        known = np.isfinite(data.attribute[:, list(attributes)])
        return sums_between(known.sum(1), data.answer_offset)
    scored = sums_between(np.isfinite(data.score), data.answer_offset)
    return scored if counts == "answers" else (scored > 0).astype(np.float64)


def size_N(data: TokenizedComparisons, counts: str, attributes: Sequence[int] = ()) -> np.ndarray:
    """int64 [N]: what a comparison adds to the size of a global batch: its pairs and ties, its scored answers, or 1."""
    if counts in ("answers", "targets"):
        return counted_N(data, counts).astype(np.int64)
    if counts == "cells":
        known = np.isfinite(data.attribute[:, list(attributes)]).any(1)
        return sums_between(known, data.answer_offset).astype(np.int64)
    return data.pairs_N + np.diff(data.tie_offset)


def counted_of(config: Config, data: TokenizedComparisons) -> list[np.ndarray]:
    """`counted_N` for each objective of the run; 0 for the comparisons of the others."""
    return [
        np.where(data.of_objective(number), counted_N(data, loss.traits.counts, columns), 0.0)
        for number, (loss, columns) in enumerate(_read(config))
    ]


def sizes_of(config: Config, data: TokenizedComparisons) -> np.ndarray:
    """int64 [N]: `size_N` of each comparison by its own objective."""
    sizes = np.zeros(len(data), dtype=np.int64)
    for number, (loss, columns) in enumerate(_read(config)):
        own = data.of_objective(number)
        sizes[own] = size_N(data, loss.traits.counts, columns)[own]
    return sizes


def _read(config: Config):  # type: ignore[no-untyped-def]
    """The objectives of a run, each with the columns of the attributes that it reads."""
    return [(loss, [config.attributes.index(name) for name in loss.attributes]) for loss in config.losses]
