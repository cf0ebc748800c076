"""Lays token ids of comparisons out as flat arrays, in which the tokens that all texts begin with appear once.

Input: `EncodedRow`s (ids of the rendered prompt and of each full text).
Output: `TokenizedComparisons`. Example: the texts [5 6 7 8 9] and [5 6 7 4] of one comparison, and the texts [5 6] and
[5 6 7] of another, in which one answer is a prefix of the other:

    number             0                   1
    tokens             5 6 7 | 8 9 | 4     5 6 | (nothing) | 7
                       prefix, tails       prefix, tails
    token_offset       0                   6                     9      tokens of comparison n: [offset[n], offset[n+1])
    prefix_length      3                   2
    answer_offset      0                   2                     4      answers of comparison n, the same way
    tail_length        2  1                0  1
    pair_offset        0                   1                     2      pairs of comparison n, the same way
    winner, loser      0, 1                1, 0                         answers, counted within their comparison

The other labels of pairs are laid out as `winner` is, labels of ties as `tie_a` (by `tie_offset`), and labels of
answers as `tail_length`; see rmcore.data.labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rmcore.data.labels import LABEL_FIELDS, OFFSETS, label_arrays
from rmcore.data.tokens.ragged_arrays import common_prefix_lengths, ranges, sums_between, sums_from

# Name and dtype of every array, in the order in which the cache's fingerprint hashes them.
ARRAYS: dict[str, type[np.generic]] = {
    "tokens": np.int32,
    "token_offset": np.int64,
    "answer_offset": np.int64,
    "pair_offset": np.int64,
    "prefix_length": np.int32,
    "tail_length": np.int32,
    **label_arrays("pairs"),
    "prompt_length": np.int32,
    "source_index": np.int32,
    "prompt_hash": np.uint64,
    **label_arrays("answers"),
    "tie_offset": np.int64,
    **label_arrays("ties"),
}
# Each array of offsets, and an array that it cuts into comparisons. Offsets have N + 1 entries, the first is 0.
OFFSET_OF = {
    "token_offset": "tokens",
    "answer_offset": "tail_length",
    "pair_offset": "winner",
    "tie_offset": "tie_a",
}


@dataclass
class EncodedRow:
    """One comparison as ids: int32 arrays of the rendered prompt and of each full text (prompt, answer, EOS)."""

    prompt: np.ndarray
    answers: list[np.ndarray]
    pairs: Sequence[tuple[int, int]]
    margin: Sequence[float]
    weight: Sequence[float]
    source_index: int = 0
    prompt_hash: int = 0
    rows: int = 1  # how many rows of the data became this comparison
    ties: Sequence[tuple[int, int]] = ()
    tie_weight: Sequence[float] = ()
    scores: Sequence[float] = ()  # of each answer, or none


@dataclass(frozen=True)
class TokenizedComparison:
    """One comparison of A answers, P pairs and Q ties: the shared prefix, the tail of each answer, the labels."""

    prefix: np.ndarray  # int32
    tails: list[np.ndarray]  # int32, A of them
    pairs: np.ndarray  # int64 [P, 2]: winner, loser
    margin: np.ndarray  # float32 [P]
    weight: np.ndarray  # float32 [P]
    ties: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))  # int64 [Q, 2]
    tie_weight: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))  # float32 [Q]
    score: np.ndarray = field(
        default_factory=lambda: np.zeros(0, dtype=np.float32)
    )  # float32 [A] (NaN: none), or empty
    prompt_length: int = 0  # tokens of the rendered prompt

    def text(self, answer: int) -> np.ndarray:
        """All tokens of one answer's text, the shared prefix first."""
        return np.concatenate([self.prefix, self.tails[answer]])


@dataclass(frozen=True)
class TokenizedComparisons:
    """N tokenised comparisons as flat arrays (memory-mapped when they come from the cache).

    The picture at the top of this file shows the layout; ARRAYS has the dtypes. `score` is NaN for answers without a
    score. `prompt_length`: tokens of the rendered prompt, after truncation. `source_index` points into `sources`.
    `prompt_hash` identifies the prompt. `fingerprint`: hash of the content, "" in memory. `report`: the counts of the
    preparation (rmcore.data.tokens.build.Work.report).
    """

    tokens: np.ndarray
    token_offset: np.ndarray
    answer_offset: np.ndarray
    pair_offset: np.ndarray
    prefix_length: np.ndarray
    tail_length: np.ndarray
    winner: np.ndarray
    loser: np.ndarray
    margin: np.ndarray
    weight: np.ndarray
    prompt_length: np.ndarray
    source_index: np.ndarray
    prompt_hash: np.ndarray
    score: np.ndarray
    tie_offset: np.ndarray
    tie_a: np.ndarray
    tie_b: np.ndarray
    tie_weight: np.ndarray
    sources: list[str]
    fingerprint: str
    report: dict[str, Any]

    @classmethod
    def of(
        cls, rows: Sequence[EncodedRow], sources: Sequence[str] = ("",), report: dict[str, Any] | None = None
    ) -> TokenizedComparisons:
        """The arrays of some rows, in memory, without a fingerprint."""
        arrays = lay_out(rows)
        for name in OFFSET_OF:
            arrays[name] = np.concatenate([[0], np.cumsum(arrays[name])])
        return cls(**arrays, sources=list(sources), fingerprint="", report=report or {})

    def __len__(self) -> int:
        return len(self.prefix_length)

    def comparison(self, number: int) -> TokenizedComparison:
        """Comparison `number` as views into the arrays. Raises IndexError unless 0 <= number < N."""
        if not 0 <= number < len(self):
            raise IndexError(f"comparison {number} of {len(self)}")
        start, end = self.token_offset[number], self.token_offset[number + 1]
        lengths = self.tail_length[self.answer_offset[number] : self.answer_offset[number + 1]]
        cuts = np.cumsum(np.concatenate([self.prefix_length[number : number + 1], lengths], dtype=np.int64))
        prefix, *tails = np.split(self.tokens[start:end], cuts[:-1])
        places = {of: slice(*getattr(self, offset)[number : number + 2].tolist()) for of, offset in OFFSETS.items()}
        labels = {}
        for label in LABEL_FIELDS:
            columns = [getattr(self, array)[places[label.of]] for array in label.arrays]
            labels[label.view] = np.array(columns, dtype=np.int64).T if label.is_pair else columns[0]
        return TokenizedComparison(prefix, tails, **labels, prompt_length=int(self.prompt_length[number]))

    @property
    def tokens_N(self) -> np.ndarray:
        """int64 [N]: tokens computed for each comparison, its prefix once."""
        return np.diff(self.token_offset)

    @property
    def logical_tokens_N(self) -> np.ndarray:
        """int64 [N]: tokens of each comparison's answers as separate texts, the prefix in each."""
        return self.tokens_N + self.prefix_length.astype(np.int64) * (np.diff(self.answer_offset) - 1)

    @property
    def text_length_A(self) -> np.ndarray:
        """int64 [A]: tokens of each answer's whole text."""
        return np.repeat(self.prefix_length, np.diff(self.answer_offset)).astype(np.int64) + self.tail_length

    @property
    def answer_length_A(self) -> np.ndarray:
        """int64 [A]: tokens behind the prompt in each answer's text, what the template writes around it among them.

        A rendered prompt may be longer than what all texts begin with (a cue that the answers' texts write otherwise):
        then only the common prefix counts as the prompt.
        """
        prompt_N = np.minimum(self.prompt_length, self.prefix_length).astype(np.int64)
        return self.text_length_A - np.repeat(prompt_N, np.diff(self.answer_offset))

    @property
    def pairs_N(self) -> np.ndarray:
        """int64 [N]: pairs of each comparison."""
        return np.diff(self.pair_offset)

    @property
    def weight_N(self) -> np.ndarray:
        """float64 [N]: sum of the pair weights of each comparison."""
        return sums_between(self.weight, self.pair_offset)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """The number of tokens in which two texts agree at their beginning."""
    shorter = min(len(a), len(b))
    differs = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differs[0]) if len(differs) else shorter


def lay_out(rows: Sequence[EncodedRow]) -> dict[str, np.ndarray]:
    """Rows -> the arrays of ARRAYS. The offsets are still lengths [N]: whoever joins chunks sums them."""
    # All texts end to end in one array: where each begins, and which is the first text of each comparison.
    answers = [answer for row in rows for answer in row.answers]
    answers_N = np.array([len(row.answers) for row in rows], dtype=np.int64)
    flat = np.concatenate([np.zeros(0, dtype=np.int32), *answers])
    length_A = np.array([len(answer) for answer in answers], dtype=np.int64)
    start_A = np.cumsum(length_A) - length_A
    first_N = np.cumsum(answers_N) - answers_N
    first_A = np.repeat(first_N, answers_N)

    # Each text is compared with the first text of its comparison; the shortest agreement is the prefix of all.
    shared_A = common_prefix_lengths(flat, start_A[first_A], start_A, np.minimum(length_A[first_A], length_A))
    prefix_N = np.minimum.reduceat(shared_A, first_N) if len(rows) else np.zeros(0, dtype=np.int64)
    prefix_A = np.repeat(prefix_N, answers_N)

    # The pieces of `flat` that are kept, in order: prefix of comparison 0, its tails, prefix of comparison 1, ...
    # A prefix is taken from the first text, so it is inserted before the tail of that text.
    piece_start = np.insert(start_A + prefix_A, first_N, start_A[first_N])
    piece_length = np.insert(length_A - prefix_A, first_N, prefix_N)
    chunk: dict[str, Any] = {
        "tokens": flat[ranges(piece_start, piece_length)],
        "token_offset": prefix_N + sums_from(length_A - prefix_A, first_N),
        "answer_offset": answers_N,
        "pair_offset": [len(row.pairs) for row in rows],
        "tie_offset": [len(row.ties) for row in rows],
        "prefix_length": prefix_N,
        "tail_length": length_A - prefix_A,
        "prompt_length": [len(row.prompt) for row in rows],
        "source_index": [row.source_index for row in rows],
        "prompt_hash": [row.prompt_hash for row in rows],
    }

    # The labels end to end; a pair of answers becomes two arrays.
    for label in LABEL_FIELDS:
        values = [value for row in rows for value in label.values(row, label.name, len(row.answers))]
        columns = np.array(values, dtype=label.dtype).reshape(-1, len(label.arrays)).T
        chunk |= dict(zip(label.arrays, columns, strict=True))
    return {name: np.asarray(chunk[name], dtype=dtype) for name, dtype in ARRAYS.items()}


def computed_tokens(data: TokenizedComparisons, share: bool) -> np.ndarray:
    """int64 [N]: tokens of each comparison in a packed row, with its prefix once (`share`) or before every tail."""
    return data.tokens_N if share else data.logical_tokens_N
