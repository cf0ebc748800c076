"""Packed rows as the tests of the ops describe them: comparisons as lengths, turned into segments."""

import torch
from hypothesis import strategies as st

Comparisons = list[tuple[int, list[int]]]  # (prefix length, tail lengths)
comparisons_strategy = st.lists(
    st.tuples(st.integers(0, 40), st.lists(st.integers(0, 30), min_size=1, max_size=4)), min_size=1, max_size=4
)


def segments_of(comparisons: Comparisons) -> torch.Tensor:
    """[S, 4] of the packed row: the first answer's segment holds the prompt, the others refer to it."""
    rows, start = [], 0
    for prefix, tails in comparisons:
        at = start + prefix + tails[0]
        rows.append((start, at, start, start))
        for tail in tails[1:]:
            rows.append((at, at + tail, start, start + prefix))
            at += tail
        start = at
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, 4)
