"""Counts what an objective counts of each comparison: pairs, lists or answers.

Input: the tokenised comparisons, and `Traits.counts` of the objective.
Output: one number per comparison. Example: three answers with the scores 5, 3, 3 have two pairs of weight 1/3 and a tie
of weight 1/3: counted_N is 1.0 for `pairs`, 1.0 for `lists`, 3.0 for `answers`; size_N is 3, 3 and 3.
"""

import numpy as np

from rmcore.data.tokens.comparisons import TokenizedComparisons
from rmcore.data.tokens.ragged_arrays import sums_between


def counted_N(data: TokenizedComparisons, counts: str) -> np.ndarray:
    """float64 [N]: the weights of a comparison's pairs and ties (`pairs`), 1 (`lists`), or the number of its scored
    answers (`answers`). The summed loss of a step is divided by the sum over the step."""
    if counts == "pairs":
        return data.weight_N + sums_between(data.tie_weight, data.tie_offset)
    if counts == "lists":
        return np.ones(len(data))
    return sums_between(np.isfinite(data.score), data.answer_offset)


def size_N(data: TokenizedComparisons, counts: str) -> np.ndarray:
    """int64 [N]: what a comparison adds to the size of a global batch: its pairs and ties, or its scored answers."""
    if counts == "answers":
        return counted_N(data, counts).astype(np.int64)
    return data.pairs_N + np.diff(data.tie_offset)
