"""Puts the rewards of an evaluation next to lengths, weights and sources of the data, as flat arrays.

Input: tokenised comparisons and the reward of each answer. Output: `PairArrays` and `AnswerArrays`.
Example: one comparison of three answers with rewards [0.5, 1.5, 1.0], the second beats the others -> chosen_P
[1.5, 1.5], rejected_P [0.5, 1.0], comparison_P [0, 0].
"""

from __future__ import annotations

import numpy as np

from rmcore.data.tokens.comparisons import TokenizedComparisons
from rmcore.evaluation.answer_metrics import AnswerArrays
from rmcore.evaluation.pair_metrics import PairArrays


def pair_arrays(data: TokenizedComparisons, rewards_A: np.ndarray) -> PairArrays:
    """Rewards, lengths, weights and sources of all pairs in the order of the data."""
    first_answer_P = np.repeat(np.asarray(data.answer_offset)[:-1], data.pairs_N)
    winner_P, loser_P = first_answer_P + data.winner, first_answer_P + data.loser
    length_A = data.answer_length_A
    return PairArrays(
        chosen_P=rewards_A[winner_P],
        rejected_P=rewards_A[loser_P],
        weight_P=np.asarray(data.weight, dtype=np.float64),
        chosen_length_P=length_A[winner_P],
        rejected_length_P=length_A[loser_P],
        comparison_P=np.repeat(np.arange(len(data)), data.pairs_N),
        winner_P=winner_P,
        loser_P=loser_P,
        source_P=np.repeat(data.source_index, data.pairs_N),
        sources=tuple(data.sources),
    )


def answer_arrays(data: TokenizedComparisons, rewards_A: np.ndarray) -> AnswerArrays:
    """Rewards, lengths, comparisons and sources of all answers in the order of the data."""
    answers_N = np.diff(data.answer_offset)
    return AnswerArrays(
        reward_A=rewards_A,
        length_A=data.answer_length_A,
        comparison_A=np.repeat(np.arange(len(data)), answers_N),
        source_A=np.repeat(data.source_index, answers_N),
    )
