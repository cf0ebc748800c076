"""Arithmetic on flat arrays: many short pieces that lie end to end in one long array.

Example: ranges([5, 0], [2, 3]) = [5, 6, 0, 1, 2]; sums_between([1, 2, 3], [0, 2, 2, 3]) = [3, 0, 3].
"""

import numpy as np


def common_prefix_lengths(
    flat: np.ndarray, start_a: np.ndarray, start_b: np.ndarray, longest: np.ndarray
) -> np.ndarray:
    """For each i, how many tokens from start_a[i] and from start_b[i] on agree, at most longest[i]. All int64 [n]."""
    filled = np.flatnonzero(longest)
    lengths = longest[filled]
    within = ranges(np.zeros_like(lengths), lengths)
    differs = flat[ranges(start_a[filled], lengths)] != flat[ranges(start_b[filled], lengths)]
    where = np.where(differs, within, np.repeat(lengths, lengths))
    result = np.zeros_like(longest)
    if len(filled):
        result[filled] = np.minimum.reduceat(where, np.cumsum(lengths) - lengths)
    return result


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """arange(starts[0], starts[0] + lengths[0]), then the next, in one int64 array."""
    return np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)


def sums_from(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The sums of the pieces that begin at `first`, none of them empty."""
    return np.add.reduceat(values, first) if len(first) else np.zeros(0, dtype=np.int64)


def sums_between(values: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """float64 [N]: the sum of values[offset[i]:offset[i + 1]], 0 where that is empty."""
    total = np.zeros(len(offset) - 1)
    filled = np.flatnonzero(np.diff(offset))
    if len(filled):
        total[filled] = np.add.reduceat(values, offset[filled], dtype=np.float64)
    return total
