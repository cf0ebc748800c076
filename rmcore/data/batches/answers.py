"""The tokens of the chosen answers, for the language-modelling loss.

Input: tokenised comparisons. Output: how many such tokens each comparison has, and which answers they belong to.
Example: the prompt [5 6], the chosen answer [7 8] and the rejected one [7 9]: two tokens, 7 and 8, although 7 is in the
prefix that the two texts share. They are predicted at the rows of 6 and 7.

An answer is chosen if it wins a pair and loses none; so soft labels, which hold both directions of a pair, choose none.
What the template writes behind the prompt belongs to the answer. The first token of a text is never predicted.
"""

import numpy as np

from rmcore.data.tokens.comparisons import TokenizedComparison, TokenizedComparisons
from rmcore.data.tokens.ragged_arrays import sums_between


def chosen_answers(pairs: np.ndarray) -> np.ndarray:
    """The answers of one comparison that win a pair and lose none; `pairs`: int [P, 2] (winner, loser)."""
    return np.setdiff1d(pairs[:, 0], pairs[:, 1])


def first_answer_token(item: TokenizedComparison) -> int:
    """The place of the first predicted token in each text of a comparison."""
    return max(1, min(item.prompt_length, len(item.prefix)))


def chosen_tokens_N(data: TokenizedComparisons) -> np.ndarray:
    """float64 [N]: predicted tokens of the chosen answers of each comparison."""
    first_P = np.repeat(data.answer_offset[:-1], data.pairs_N)
    answers = len(data.tail_length)
    wins_A = np.bincount(first_P + data.winner, minlength=answers) > 0
    loses_A = np.bincount(first_P + data.loser, minlength=answers) > 0
    text_A = data.text_length_A
    tokens_A = np.minimum(data.answer_length_A, text_A - 1).clip(min=0)
    return sums_between(np.where(wins_A & ~loses_A, tokens_A, 0), data.answer_offset).astype(np.float64)
