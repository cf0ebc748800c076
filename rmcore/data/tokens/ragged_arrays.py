"""Arithmetic on flat arrays: many short pieces that lie end to end in one long array.

Input and output: numpy arrays. Where a piece begins is given by `starts`, or by `offset`, which has the end appended.
Example: ranges([5, 0], [2, 3]) = [5, 6, 0, 1, 2]; sums_between([1, 2, 3], [0, 2, 2, 3]) = [3, 0, 3].
"""

import numpy as np


def common_prefix_lengths(
    flat: np.ndarray, start_a: np.ndarray, start_b: np.ndarray, longest: np.ndarray
) -> np.ndarray:
    """For each i, the number of entries in which flat[start_a[i]:] and flat[start_b[i]:] agree at their beginning, at
    most longest[i]. All arrays but `flat` are int64 [n]."""
    # Compare all candidates at once: entry k of piece i is the pair (start_a[i] + k, start_b[i] + k), k < longest[i].
    filled = np.flatnonzero(longest)
    lengths = longest[filled]
    differs = flat[ranges(start_a[filled], lengths)] != flat[ranges(start_b[filled], lengths)]

    # The prefix ends at the least k at which they differ, or at the end of the piece if they never do.
    within = ranges(np.zeros_like(lengths), lengths)
    where = np.where(differs, within, np.repeat(lengths, lengths))
    result = np.zeros_like(longest)
    if len(filled):  # reduceat needs pieces that are not empty
        result[filled] = np.minimum.reduceat(where, np.cumsum(lengths) - lengths)
    return result


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64: arange(starts[0], starts[0] + lengths[0]), then the same for starts[1], and so on, end to end."""
    # One arange over the whole result, shifted for each piece by its start minus its place in the result.
    return np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)


def sums_from(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The sums of the pieces that begin at `first`; no piece is empty."""
    return np.add.reduceat(values, first) if len(first) else np.zeros(0, dtype=np.int64)


def sums_between(values: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """float64 [N]: the sum of values[offset[i]:offset[i + 1]] for each i, 0 for an empty piece."""
    total = np.zeros(len(offset) - 1)
    filled = np.flatnonzero(np.diff(offset))
    if len(filled):  # between the starts of filled pieces there are only empty ones, so reduceat stops at the right end
        total[filled] = np.add.reduceat(values, offset[filled], dtype=np.float64)
    return total
