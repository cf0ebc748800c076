"""Selects the rows to use: finds repeated and contradicted rows, holds out prompts, merges rows of one prompt.

Input: the comparisons of all rows, one after the other. Only hashes of them are kept, 8 bytes each, never the rows.
Output: the row numbers in reading order, and comparisons merged from rows of one prompt.
Example: the rows (q, a > b), (r, c > d), (q, b > e) grouped by prompt are read in the order 0, 2, 1. They give the
comparisons q: [a, b, e] with pairs (0, 1), (1, 2), and r: [c, d] with (0, 1). Each pair keeps the weight that it has
without merging, so gradients are the same; only the prompt is computed less often.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
import xxhash

from rmcore.config import UserError
from rmcore.data.drop_reasons import CONTRADICTED, REPEATED
from rmcore.data.formats.comparison import Comparison
from rmcore.data.formats.judgements import all_pairs
from rmcore.data.formats.turns import Turns, text_of_turn
from rmcore.data.labels import LABEL_FIELDS

MOST_ANSWERS = 16  # of a merged comparison: it is never cut, so it must stay short enough for a micro batch


@dataclass
class RowHashes:
    """64-bit hashes of every row. `prompt` is seeded, so that the held-out prompts depend on the seed of the run."""

    seed: int = 0
    prompt: array = field(default_factory=lambda: array("Q"))
    group: array = field(default_factory=lambda: array("Q"))  # of source and prompt
    answers: array = field(default_factory=lambda: array("Q"))  # of the prompt, and the answers in any order
    judged: array = field(default_factory=lambda: array("Q"))  # of prompt, answers and judgement

    def add(self, comparison: Comparison, source_number: int) -> None:
        key = hash_text(comparison.prompt_key, self.seed)
        self.prompt.append(key)
        self.group.append(xxhash.xxh3_64_intdigest(f"{key} {source_number} {comparison.source}".encode()))
        self.add_judged(comparison)

    def add_judged(self, comparison: Comparison) -> None:
        """Adds only `answers` and `judged`, which are enough to find repeated and contradicted rows."""
        key = hash_text(comparison.prompt_key, 0)
        each = [hash_text(_content(answer), key) for answer in comparison.answers]
        # Pairs and ties by the hashes of their answers, sorted: their order in the row does not matter.
        weighted_pairs = zip(comparison.pairs, comparison.weight, strict=True)
        pairs = sorted((each[winner], each[loser], weight) for (winner, loser), weight in weighted_pairs)
        weighted_ties = zip(comparison.ties, comparison.tie_weight, strict=True)
        ties = sorted((*sorted((each[a], each[b])), weight) for (a, b), weight in weighted_ties)
        same = xxhash.xxh3_64_intdigest(repr((key, sorted(each))).encode())
        self.answers.append(same)
        labels = (pairs, ties, comparison.scores, *([comparison.attributes] if comparison.attributes else []))
        self.judged.append(xxhash.xxh3_64_intdigest(repr((same, *labels)).encode()))


@dataclass(frozen=True)
class Selection:
    """The rows to read. The default is all rows in their order, each a comparison of its own."""

    order: np.ndarray | None = None  # numbers of the rows to read
    group: np.ndarray | None = None  # for each row to read: neighbours with the same group are merged
    dropped: tuple[tuple[str, int], ...] = ()  # (reason, rows)
    repeated: int = 0
    contradicted: int = 0


def select(
    hashes: RowHashes, wanted: np.ndarray | None, stored: np.ndarray | None, *, drop: Iterable[str], gather: bool
) -> Selection:
    """Selects among the rows in `wanted` (bool [rows]; None: all).

    `stored` (int64 [rows]; None: each row once) has equal numbers for copies of one stored row; copies do not count as
    repeated. `drop`: REPEATED, CONTRADICTED or both. `gather`: rows of one prompt follow each other, to be merged.
    """
    # Count both kinds of duplicates among the wanted rows, and drop what is to be dropped.
    rows = np.arange(len(hashes.prompt)) if wanted is None else np.flatnonzero(wanted)
    answers, judged = (np.frombuffer(column, dtype=np.uint64)[rows] for column in (hashes.answers, hashes.judged))
    found = duplicates(answers, judged, None if stored is None else stored[rows])
    dropped = []
    gone = np.zeros(len(rows), dtype=bool)
    for reason in drop:
        more = found[reason] & ~gone
        dropped.append((reason, int(more.sum())))
        gone |= more
    rows = rows[~gone]

    # Rows of one group move to the place of the group's first row; the sort is stable, so their order stays.
    group = None
    if gather:
        group = np.frombuffer(hashes.group, dtype=np.uint64)[rows]
        _, first, which = np.unique(group, return_index=True, return_inverse=True)
        order = np.argsort(first[which], kind="stable")
        rows, group = rows[order], group[order]
    counts = {reason: int(mask.sum()) for reason, mask in found.items()}
    return Selection(rows, group, tuple((r, n) for r, n in dropped if n), counts[REPEATED], counts[CONTRADICTED])


def held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """bool [rows]: the rows to hold out. `hashes` (uint64 [rows]): of the prompts, seeded.

    Prompts are held out in the order of their hashes, as many as bring the rows closest to `fraction`, and at least one
    prompt stays on each side. Raises UserError if all rows have the same prompt.
    """
    prompts, which, rows = np.unique(hashes, return_inverse=True, return_counts=True)
    if len(prompts) < 2:
        raise UserError("data.eval_fraction: all rows have the same prompt, so none can be held out by prompt")
    held = np.abs(np.cumsum(rows) - fraction * len(hashes)).argmin() + 1
    return which < min(held, len(prompts) - 1)


def duplicates(answers: np.ndarray, judged: np.ndarray, stored: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """bool [rows] each for REPEATED (not the first of its kind) and CONTRADICTED. `answers`, `judged`: of RowHashes."""
    if stored is not None:
        # Find duplicates among the stored rows, each taken once, in their order; copies get the result of their row.
        _, first, which = np.unique(stored, return_index=True, return_inverse=True)
        by_first = np.argsort(first)
        rank = np.empty_like(by_first)
        rank[by_first] = np.arange(len(by_first))
        once = duplicates(answers[first[by_first]], judged[first[by_first]])
        return {reason: mask[rank[which]] for reason, mask in once.items()}

    # Repeated: all rows but the first with the same prompt, answers and judgement.
    repeated = np.ones(len(judged), dtype=bool)
    repeated[np.unique(judged, return_index=True)[1]] = False

    # Contradicted: sort rows by answers, then judgement. If two neighbours have the same answers and another judgement,
    # all rows with these answers are contradicted. `number` counts the different answers along the sorted rows.
    order = np.lexsort((judged, answers))
    same_answers = answers[order][1:] == answers[order][:-1]
    differs = same_answers & (judged[order][1:] != judged[order][:-1])
    number = np.concatenate([[0], np.cumsum(~same_answers)]) if len(order) else order
    contradicted = np.zeros(len(judged), dtype=bool)
    contradicted[order] = np.isin(number, number[1:][differs])
    return {CONTRADICTED: contradicted, REPEATED: repeated}


class Reads(NamedTuple):
    """What the objective reads of scored answers besides their order."""

    margins: bool = False  # the difference of two scores is the margin of the pair
    ties: bool = False  # pairs of equal scores
    scores: bool = False  # the scores themselves
    targets: bool = False  # as probabilities


def gathered(comparisons: Iterable[tuple[Comparison, int]], reads: Reads, *more: Reads) -> Iterator[Comparison]:
    """Merges neighbours with the same group (the int) into comparisons of at most MOST_ANSWERS answers.

    `reads`, `more`: what each of a run's objectives reads.
    """
    every = (reads, *more)

    def reads_of(comparison: Comparison) -> Reads:
        return every[comparison.objective] if comparison.objective >= 0 else Reads()

    run: list[Comparison] = []
    run_group: int | None = None
    answers: set[str] = set()
    for comparison, group in comparisons:
        found = answers | set(map(_content, comparison.answers))
        if run and (group != run_group or len(found) > MOST_ANSWERS or not _same_prompt(comparison, run[0])):
            yield merged(run, reads_of(run[0]))
            run, found = [], set(map(_content, comparison.answers))
        run.append(comparison)
        run_group, answers = group, found
    if run:
        yield merged(run, reads_of(run[0]))


def merged(run: Sequence[Comparison], reads: Reads) -> Comparison:
    """Merges rows of one prompt: their different answers and all their labels. Scored answers are paired here."""
    first, rows = run[0], sum(one.rows for one in run)
    if first.scores:
        answers = tuple(answer for one in run for answer in one.answers)
        of_answers: dict[str, Any] = {
            label.name: tuple(value for one in run for value in getattr(one, label.name))
            for label in LABEL_FIELDS
            if label.of == "answers"
        }
        labels = {**vars(all_pairs(of_answers["scores"], margins=reads.margins, ties=reads.ties)), **of_answers}
        if not reads.scores:
            labels["scores"] = ()
        elif reads.targets:  # the softmax of the scores (ListNet)
            weights = np.exp(np.array(labels["scores"]) - max(labels["scores"]))
            labels["scores"] = tuple((weights / weights.sum()).tolist())
        return replace(first, answers=answers, rows=rows, **labels)
    if len(run) == 1:
        return first
    # Answers that several rows share are kept once, at their first place; pairs and ties are renumbered to it.
    place: dict[str, int] = {}
    different: list[Turns | str] = []
    joined: dict[str, list[Any]] = {label.name: [] for label in LABEL_FIELDS}
    for one in run:
        is_new = []
        for answer in one.answers:
            is_new.append(_content(answer) not in place)
            if is_new[-1]:
                place[_content(answer)] = len(different)
                different.append(answer)
        own = [place[_content(answer)] for answer in one.answers]
        for label in LABEL_FIELDS:
            values = getattr(one, label.name)
            if label.is_pair:
                values = [(own[a], own[b]) for a, b in values]
            elif label.of == "answers":
                values = compress(values, is_new)
            joined[label.name] += values
    labels = {name: tuple(values) for name, values in joined.items()}
    return replace(first, answers=tuple(different), rows=rows, **labels)


def _same_prompt(one: Comparison, other: Comparison) -> bool:
    return one.prompt == other.prompt and one.variables == other.variables


def hash_text(text: str, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), seed)


def _content(answer: Turns | str) -> str:
    if isinstance(answer, str):
        return answer
    return "\x1e".join(text_of_turn(turn, "\x1f") for turn in answer)
