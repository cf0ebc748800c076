"""The table of labels: every class that holds labels agrees with it, and a label arrives in the batch as it left."""

from dataclasses import fields

import numpy as np

from rmcore.data.batches.batch import Judged, build_batch
from rmcore.data.formats.comparison import Comparison
from rmcore.data.formats.selection import Reads, merged
from rmcore.data.labels import LABEL_FIELDS, Judgement
from rmcore.data.tokens.comparisons import ARRAYS, OPTIONAL, EncodedRow, TokenizedComparison, TokenizedComparisons


def names(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def test_every_class_that_holds_labels_has_those_of_the_table() -> None:
    rows = {label.name for label in LABEL_FIELDS}
    assert names(Judgement) == rows
    assert rows <= names(Comparison) and rows <= names(EncodedRow)
    others = {"prefix", "tails", "prompt_length", "objective"}
    assert {label.view for label in LABEL_FIELDS} == names(TokenizedComparison) - others
    assert (
        {array for label in LABEL_FIELDS for array in label.arrays}
        <= set(ARRAYS) | set(OPTIONAL)
        <= names(TokenizedComparisons)
    )
    assert {tensor for label in LABEL_FIELDS for tensor in label.tensors} == names(Judged) - {"lists", "list_A"}


def some_rows() -> list[EncodedRow]:
    """Two comparisons of three answers: one with every kind of label, one with a single pair."""
    texts = [np.array([7, tail], dtype=np.int32) for tail in (1, 2, 3)]
    every = EncodedRow(
        texts[0][:1], texts, [(0, 1), (2, 1)], [0.5, -1.0], [0.25, 0.75], ties=[(0, 2)], tie_weight=[0.5],
        scores=[3.0, 1.0, 3.0],
    )  # fmt: skip
    return [every, EncodedRow(texts[0][:1], texts, [(1, 2)], [0.0], [1.0])]


def test_labels_arrive_in_the_batch_counted_from_its_first_answer() -> None:
    data = TokenizedComparisons.of(some_rows())
    nan = float("nan")
    for judged in (build_batch(data, [0, 1]), Judged.of(data)):
        assert judged.winner_P.tolist() == [0, 2, 4] and judged.loser_P.tolist() == [1, 1, 5]
        assert judged.margin_P.tolist() == [0.5, -1.0, 0.0] and judged.weight_P.tolist() == [0.25, 0.75, 1.0]
        assert (judged.tie_a_Q.tolist(), judged.tie_b_Q.tolist(), judged.tie_weight_Q.tolist()) == ([0], [2], [0.5])
        np.testing.assert_array_equal(judged.score_A.numpy(), [3.0, 1.0, 3.0, nan, nan, nan])
        assert judged.lists == 2
    assert build_batch(data, [1]).winner_P.tolist() == [1]
    nothing = build_batch(data, [])
    assert {len(getattr(nothing, name)) for label in LABEL_FIELDS for name in label.tensors} == {0}


def test_a_comparison_without_labels_of_its_answers_has_missing_ones_in_the_batch() -> None:
    class One:
        def comparison(self, number: int) -> TokenizedComparison:
            one = np.ones(1, dtype=np.float32)
            return TokenizedComparison(one.astype(np.int32), [one.astype(np.int32)] * 2, np.array([[1, 0]]), one, one)

    batch = build_batch(One(), [0, 1])
    assert batch.score_A.isnan().tolist() == [True] * 4 and batch.winner_P.tolist() == [1, 3]
    assert len(batch.tie_a_Q) == len(batch.tie_weight_Q) == 0


def test_merged_rows_keep_the_labels_of_every_pair_and_tie() -> None:
    first = Comparison("p", ("a", "b"), "s", "p", pairs=((0, 1),), margin=(2.0,), weight=(0.5,))
    second = Comparison("p", ("c", "b"), "s", "p", ties=((0, 1),), tie_weight=(0.25,))
    both = merged([first, second], Reads())
    assert both.answers == ("a", "b", "c") and both.rows == 2
    assert (both.pairs, both.margin, both.weight) == (((0, 1),), (2.0,), (0.5,))
    assert (both.ties, both.tie_weight, both.scores) == (((2, 1),), (0.25,), ())
