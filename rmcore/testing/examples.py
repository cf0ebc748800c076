"""Comparisons with every kind of label, to test functions on; a batch and its rewards.

Input: a seed. Output: `TokenizedComparisons` of nine comparisons of two to five answers: pairs with margins and
weights, ties, soft labels, answers with and without a score, and one comparison without any label.
Example: `labelled(0)` has a comparison of four answers with the scores 2, 0, 2 and 3: five pairs and a tie.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmcore.data.batches.batch import Judged, RaggedBatch, build_batch
from rmcore.data.tokens.comparisons import EncodedRow, TokenizedComparisons


def labelled(seed: int = 0) -> TokenizedComparisons:
    """Comparisons with pairs, margins, weights, ties, soft labels and scores, all drawn by the seed."""
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = []
    for number in range(9):
        count = 2 + number % 4
        levels = generator.integers(0, 4, size=count)
        every = list(itertools.combinations(range(count), 2))
        pairs = [(i, j) if levels[i] > levels[j] else (j, i) for i, j in every if levels[i] != levels[j]]
        ties = [(i, j) for i, j in every if levels[i] == levels[j]]
        scores = [float(level) if k or number % 3 else math.nan for k, level in enumerate(levels)]
        if number == 4:  # soft: both directions
            pairs, ties = [(0, 1), (1, 0)], []
        if number == 7:
            pairs, ties, scores = [], [], [math.nan] * count
        answers = [np.array([1, 2 + k], dtype=np.int32) for k in range(count)]
        margin, weight, tie_weight = ((0.1 + generator.random(len(x))).tolist() for x in (pairs, pairs, ties))
        prompt = answers[0][:1]
        rows.append(EncodedRow(prompt, answers, pairs, margin, weight, ties=ties, tie_weight=tie_weight, scores=scores))
    return TokenizedComparisons.of(rows)


UNLABELLED = 7  # the number of the comparison without a label


def rewards_for(data: TokenizedComparisons, seed: int = 1) -> Tensor:
    """fp64 [A]: rewards of the size of a trained model's."""
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randn(int(data.answer_offset[-1]), generator=generator, dtype=torch.float64)


def part(data: TokenizedComparisons, rewards_A: Tensor, numbers: Sequence[int]) -> tuple[Tensor, RaggedBatch]:
    """The rewards of the answers of some comparisons, in this order, and their batch."""
    places = [np.arange(data.answer_offset[n], data.answer_offset[n + 1]) for n in numbers]
    chosen = torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *places]).astype(np.int64))
    return rewards_A.index_select(0, chosen), build_batch(data, list(numbers))


def shuffled(batch: Judged, generator: torch.Generator) -> dict[str, Any]:
    """The labels of a batch with its pairs and its ties in another order."""
    pairs = torch.randperm(len(batch.winner_P), generator=generator)
    ties = torch.randperm(len(batch.tie_a_Q), generator=generator)
    names = {"_P": pairs, "_Q": ties}
    found = {name: getattr(batch, name) for name in vars(batch) if name[-2:] in names}
    return {name: value[names[name[-2:]]] for name, value in found.items()}
