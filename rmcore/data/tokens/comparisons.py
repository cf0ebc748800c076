"""Token ids of comparisons -> flat arrays with each prompt once: length policy, identical answers, common prefix.

In: `EncodedRow`s (ids of the rendered prompt and of each full text). Out: `TokenizedComparisons`, and how many rows
were dropped for which reason. Example: texts [5 6 7 8 9] and [5 6 7 4] leave tokens [5 6 7 | 8 9 | 4],
prefix_length [3], tail_length [2, 1]. One answer a prefix of the other ([5 6] and [5 6 7]): prefix 2, tails [0, 1].

Legend: N comparisons, A answers in all, P pairs in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rmcore.data.tokens.ragged_arrays import common_prefix_lengths, ranges, sums_between, sums_from

# name -> dtype; the offsets hold one entry more than there are comparisons
ARRAYS = {
    "tokens": np.int32, "token_offset": np.int64, "answer_offset": np.int64, "pair_offset": np.int64,
    "prefix_length": np.int32, "tail_length": np.int32, "winner": np.int32, "loser": np.int32, "margin": np.float32,
    "weight": np.float32, "prompt_length": np.int32, "source_index": np.int32, "prompt_hash": np.uint64,
    "score": np.float32, "tie_offset": np.int64, "tie_a": np.int32, "tie_b": np.int32, "tie_weight": np.float32,
}  # fmt: skip
OFFSET_OF = {
    "token_offset": "tokens", "answer_offset": "tail_length", "pair_offset": "winner", "tie_offset": "tie_a",
}  # fmt: skip


@dataclass
class EncodedRow:
    """One comparison as ids: int32 arrays of the rendered prompt and of each full text (prompt and answer, EOS)."""

    prompt: np.ndarray
    answers: list[np.ndarray]
    pairs: Sequence[tuple[int, int]]
    margin: Sequence[float]
    weight: Sequence[float]
    source_index: int = 0
    prompt_hash: int = 0
    rows: int = 1  # of the data, that became this comparison
    ties: Sequence[tuple[int, int]] = ()
    tie_weight: Sequence[float] = ()
    scores: Sequence[float] = ()  # one an answer, or none


@dataclass(frozen=True)
class TokenizedComparison:
    """One comparison: the shared prefix, the tail of each answer (int32), pairs [p, 2] int64 (winner, loser),
    margin [p] and weight [p] float32; ties [q, 2] int64 and tie_weight [q] float32; score [answers] float32, NaN where
    the data give none."""

    prefix: np.ndarray
    tails: list[np.ndarray]
    pairs: np.ndarray
    margin: np.ndarray
    weight: np.ndarray
    ties: np.ndarray
    tie_weight: np.ndarray
    score: np.ndarray

    def text(self, answer: int) -> np.ndarray:
        """All tokens of one answer's text, the shared prefix first."""
        return np.concatenate([self.prefix, self.tails[answer]])


@dataclass(frozen=True)
class TokenizedComparisons:
    """N tokenised comparisons as flat arrays (memory-mapped when they come from the cache).

    For comparison i, `tokens[token_offset[i]:token_offset[i + 1]]` holds the shared prefix and then the tail of each
    answer in turn; its answers are `tail_length[answer_offset[i]:answer_offset[i + 1]]`, its pairs stand at
    `pair_offset[i]:pair_offset[i + 1]`. `winner` and `loser` count within the comparison, as do `tie_a` and `tie_b` of
    the pairs that tie, at `tie_offset[i]:tie_offset[i + 1]`. `score`: of each answer, NaN where none is read.
    `prompt_length`: tokens of the rendered prompt, after truncation. `source_index` points into `sources`.
    `fingerprint` is a hash of the content. `report`: rows, kept (rows), dropped {reason: rows}, pairs, warnings,
    formats (see rmcore.data.pipeline).
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

    def __len__(self) -> int:
        return len(self.prefix_length)

    def comparison(self, number: int) -> TokenizedComparison:
        """Comparison `number` as views into the arrays; IndexError outside 0 <= number < N."""
        if not 0 <= number < len(self):
            raise IndexError(f"comparison {number} of {len(self)}")
        start, end = self.token_offset[number], self.token_offset[number + 1]
        lengths = self.tail_length[self.answer_offset[number] : self.answer_offset[number + 1]]
        cuts = np.cumsum(np.concatenate([self.prefix_length[number : number + 1], lengths], dtype=np.int64))
        prefix, *tails = np.split(self.tokens[start:end], cuts[:-1])
        pairs = slice(self.pair_offset[number], self.pair_offset[number + 1])
        ties = slice(self.tie_offset[number], self.tie_offset[number + 1])
        return TokenizedComparison(
            prefix,
            tails,
            np.stack([self.winner[pairs], self.loser[pairs]], axis=1).astype(np.int64),
            self.margin[pairs],
            self.weight[pairs],
            np.stack([self.tie_a[ties], self.tie_b[ties]], axis=1).astype(np.int64),
            self.tie_weight[ties],
            self.score[self.answer_offset[number] : self.answer_offset[number + 1]],
        )

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
    """How many tokens two texts begin with in common."""
    shorter = min(len(a), len(b))
    differs = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differs[0]) if len(differs) else shorter


def lay_out(rows: Sequence[EncodedRow]) -> dict[str, np.ndarray]:
    """Rows -> the arrays of ARRAYS, with each text's shared prefix once; the offsets as lengths [n], not yet summed."""
    answers = [answer for row in rows for answer in row.answers]
    answers_N = np.array([len(row.answers) for row in rows], dtype=np.int64)
    pairs_N = np.array([len(row.pairs) for row in rows], dtype=np.int64)
    flat = np.concatenate([np.zeros(0, dtype=np.int32), *answers])
    length_A = np.array([len(answer) for answer in answers], dtype=np.int64)
    start_A = np.cumsum(length_A) - length_A
    first_N = np.cumsum(answers_N) - answers_N  # each comparison's first answer
    first_A = np.repeat(first_N, answers_N)
    shared_A = common_prefix_lengths(flat, start_A[first_A], start_A, np.minimum(length_A[first_A], length_A))
    prefix_N = np.minimum.reduceat(shared_A, first_N) if len(rows) else np.zeros(0, dtype=np.int64)
    prefix_A = np.repeat(prefix_N, answers_N)
    # The pieces in order: prefix of comparison 0, its tails, prefix of comparison 1, ...
    before = np.insert(start_A + prefix_A, first_N, start_A[first_N])
    pieces = np.insert(length_A - prefix_A, first_N, prefix_N)
    pairs, ties = (
        np.array([pair for row in rows for pair in getattr(row, kind)], dtype=np.int32).reshape(-1, 2)
        for kind in ("pairs", "ties")
    )
    chunk = {
        "tokens": flat[ranges(before, pieces)],
        "token_offset": prefix_N + sums_from(length_A - prefix_A, first_N),
        "answer_offset": answers_N,
        "pair_offset": pairs_N,
        "prefix_length": prefix_N,
        "tail_length": length_A - prefix_A,
        "winner": pairs[:, 0],
        "loser": pairs[:, 1],
        "margin": [m for row in rows for m in row.margin],
        "weight": [w for row in rows for w in row.weight],
        "prompt_length": [len(row.prompt) for row in rows],
        "source_index": [row.source_index for row in rows],
        "prompt_hash": [row.prompt_hash for row in rows],
        "score": [score for row in rows for score in row.scores or [np.nan] * len(row.answers)],
        "tie_offset": np.array([len(row.ties) for row in rows], dtype=np.int64),
        "tie_a": ties[:, 0],
        "tie_b": ties[:, 1],
        "tie_weight": [w for row in rows for w in row.tie_weight],
    }
    return {name: np.asarray(chunk[name], dtype=dtype) for name, dtype in ARRAYS.items()}


def computed_tokens(data: TokenizedComparisons, share: bool) -> np.ndarray:
    """Tokens that each comparison fills in a packed row, int64 [N]: its prefix once (share) or before every tail."""
    return data.tokens_N if share else data.logical_tokens_N
