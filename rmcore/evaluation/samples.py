"""Shows some pairs of a data set as text, with their rewards.

Input: tokenised comparisons, the rewards of all answers, a tokenizer. Output: a `SampleRow` per pair shown.
Example: 10 of 1,000 comparisons -> the pairs of the comparisons 0, 111, 222, ..., 999.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rmcore.data.tokens.comparisons import TokenizedComparisons


@dataclass(frozen=True)
class SampleRow:
    """One line of the samples table: a pair as text, and its rewards."""

    prompt: str
    chosen: str
    rejected: str
    chosen_reward: float
    rejected_reward: float

    @property
    def correct(self) -> bool:
        """Whether the model prefers the chosen answer."""
        return self.chosen_reward > self.rejected_reward


def sample_rows(data: TokenizedComparisons, rewards_A: np.ndarray, tokenizer: Any, count: int) -> list[SampleRow]:
    """`count` pairs (or all, if there are fewer) spread evenly over the data, as text; the same at every evaluation.

    The prompt of a sample is the rendered prompt. If the texts share more than that, the rest belongs to both answers.
    """
    rows = []
    paired = np.flatnonzero(data.pairs_N)
    total = len(paired)
    places = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))
    for number in paired[places].tolist():
        item = data.comparison(number)
        winner, loser = (int(answer) for answer in item.pairs[0])
        prompt_length = min(int(data.prompt_length[number]), len(item.prefix))
        prompt, opening = item.prefix[:prompt_length], item.prefix[prompt_length:]
        chosen, rejected = (np.concatenate([opening, item.tails[answer]]) for answer in (winner, loser))
        first = int(data.answer_offset[number])
        rows.append(
            SampleRow(
                prompt=tokenizer.decode(prompt.tolist()),
                chosen=tokenizer.decode(chosen.tolist()),
                rejected=tokenizer.decode(rejected.tolist()),
                chosen_reward=float(rewards_A[first + winner]),
                rejected_reward=float(rewards_A[first + loser]),
            )
        )
    return rows
