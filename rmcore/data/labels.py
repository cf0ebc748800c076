"""The labels of a comparison, and the one table that carries them from the row to the batch.

Input: what a row says of its answers: which is better (pairs), by how much (margin), how sure (weight), ties, scores.
Output: `Judgement`, the labels of one comparison as Python values, and `LABEL_FIELDS`. The arrays of the token cache,
the views of one comparison and the tensors of a batch are made from this table.

Example: three answers with the scores 5, 3, 3. The second and third tie, so there are two pairs and one tie:

    Judgement     pairs ((0, 1), (0, 2))       weight (1/3, 1/3)      ties ((1, 2),)            scores (5, 3, 3)
    token cache   winner [0 0]  loser [1 2]    weight [.33 .33]       tie_a [1]    tie_b [2]    score [5 3 3]
    batch         winner_P      loser_P        weight_P               tie_a_Q      tie_b_Q      score_A
                  (in the batch, answers are counted from the first answer of the batch)

A label has one value for each pair, for each tie or for each answer; `attributes` has W values for each answer, one for
each attribute that a run reads, NaN where it is not known. To add a kind of label, see rmcore/data/README.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

OFFSETS = {"pairs": "pair_offset", "ties": "tie_offset", "answers": "answer_offset"}
LETTERS = {"pairs": "P", "ties": "Q", "answers": "A"}


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a row says of its answers. Without pairs, no answer is preferred to another."""

    pairs: tuple[tuple[int, int], ...] = ()  # (winner, loser): indices into the answers
    margin: tuple[float, ...] = ()  # of each pair; 0.0 where the data have none
    weight: tuple[float, ...] = ()  # of each pair
    ties: tuple[tuple[int, int], ...] = ()  # pairs of which neither is preferred, where the objective reads them
    tie_weight: tuple[float, ...] = ()  # of each tie
    scores: tuple[float, ...] = ()  # of each answer, or none
    attributes: tuple[tuple[float, ...], ...] = ()  # of each answer a value for each attribute (NaN: unknown), or none


class LabelField(NamedTuple):
    """One field of `Judgement`, and what becomes of it."""

    name: str  # the field of Judgement, Comparison and EncodedRow
    of: Literal["pairs", "ties", "answers"]  # the label has one value for each of them
    arrays: tuple[str, ...]  # the arrays of the token cache; two of them: the label is a pair of answers
    dtype: type[np.generic]  # of these arrays
    missing: float = np.nan  # the value of every pair, tie or answer of a row that does not have the label
    wide: bool = False  # each answer has several values; the array is in the cache only if the run reads them

    @property
    def is_pair(self) -> bool:
        """The values are two answers of the comparison, not a number."""
        return len(self.arrays) == 2

    @property
    def view(self) -> str:
        """The field of TokenizedComparison."""
        return self.name if self.is_pair else self.arrays[0]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The fields of a batch, one for each array."""
        return tuple(f"{array}_{LETTERS[self.of]}" for array in self.arrays)

    def values(self, holder: Any, field: str, answers: int, width: int = 0) -> Sequence[Any]:
        """The values in `holder.field`; if it is empty, `missing` for each pair, tie or answer of `holder`.

        `width`: the number of values of each answer, for a wide label.
        """
        values: Sequence[Any] = getattr(holder, field)
        if len(values):
            return values
        count = answers if self.of == "answers" else len(getattr(holder, self.of))
        one: Any = [self.missing] * width if self.wide else self.missing
        return [one] * count if count else values


# The arrays of one `of` lie in the token cache in this order, which its fingerprint depends on: new ones go to the end.
LABEL_FIELDS = (
    LabelField("pairs", "pairs", ("winner", "loser"), np.int32),
    LabelField("margin", "pairs", ("margin",), np.float32),
    LabelField("weight", "pairs", ("weight",), np.float32),
    LabelField("ties", "ties", ("tie_a", "tie_b"), np.int32),
    LabelField("tie_weight", "ties", ("tie_weight",), np.float32),
    LabelField("scores", "answers", ("score",), np.float32),
    LabelField("attributes", "answers", ("attribute",), np.float32, wide=True),
)


def label_arrays(of: str) -> dict[str, type[np.generic]]:
    """Name and dtype of the cache's arrays for the labels of pairs, ties or answers, without those of wide labels."""
    narrow = [field for field in LABEL_FIELDS if field.of == of and not field.wide]
    return {array: field.dtype for field in narrow for array in field.arrays}


def is_labelled(holder: Any) -> bool:
    """Whether the answers of a row or comparison have labels of their own: scores, or a known attribute."""
    return len(holder.scores) > 0 or bool(np.isfinite(np.asarray(holder.attributes, dtype=float)).any())
