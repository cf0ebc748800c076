"""What an objective counts of each comparison: pairs, lists or answers."""

import numpy as np

from rmcore.data.tokens.comparisons import TokenizedComparisons
from rmcore.data.tokens.ragged_arrays import sums_between


def counted_N(data: TokenizedComparisons, counts: str) -> np.ndarray:
    """float64 [N]: what an objective's mean counts of each comparison: the weights of its pairs and ties (`pairs`), 1
    (`lists`), or its scored answers (`answers`). The sum over a step is what its summed loss is divided by."""
    if counts == "pairs":
        return data.weight_N + sums_between(data.tie_weight, data.tie_offset)
    if counts == "lists":
        return np.ones(len(data))
    return sums_between(np.isfinite(data.score), data.answer_offset)


def size_N(data: TokenizedComparisons, counts: str) -> np.ndarray:
    """int64 [N]: what a global batch counts of each comparison: pairs, ties among them, or scored answers."""
    if counts == "answers":
        return counted_N(data, counts).astype(np.int64)
    return data.pairs_N + np.diff(data.tie_offset)
