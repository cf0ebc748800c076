"""Which rows are used, and which of them become one comparison: repeated and contradicted rows, groups by prompt.

In: the comparisons of all rows, one after the other (their hashes are kept, 8 bytes each, never the rows). Out: row
numbers in reading order, and comparisons merged from rows of one prompt.
Example: rows (q, a > b), (r, c > d), (q, b > e) grouped by prompt are read in the order 0, 2, 1 and give the
comparisons q: [a, b, e] with pairs (0, 1), (1, 2), and r: [c, d] with (0, 1). Each pair keeps the weight it has alone,
so gradients are the same as without gathering; only the prompt is computed less often.
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
from rmcore.data.labels import LABEL_FIELDS

MOST_ANSWERS = 16  # of a gathered comparison: it is never cut, so it must stay short enough for a micro batch


@dataclass
class RowHashes:
    """64-bit hashes of every row: its prompt; its source and prompt; its answers in any order; these and the judgement.

    `prompt` is seeded, so that what is held out by prompt depends on the run's seed.
    """

    seed: int = 0
    prompt: array = field(default_factory=lambda: array("Q"))
    group: array = field(default_factory=lambda: array("Q"))
    answers: array = field(default_factory=lambda: array("Q"))
    judged: array = field(default_factory=lambda: array("Q"))

    def add(self, comparison: Comparison, source_number: int) -> None:
        key = hash_text(comparison.prompt_key, self.seed)
        self.prompt.append(key)
        self.group.append(xxhash.xxh3_64_intdigest(f"{key} {source_number} {comparison.source}".encode()))
        self.add_judged(comparison)

    def add_judged(self, comparison: Comparison) -> None:
        """Only what tells repeated and contradicted rows."""
        key = hash_text(comparison.prompt_key, 0)
        each = [hash_text(_content(answer), key) for answer in comparison.answers]
        told = zip(comparison.pairs, comparison.weight, strict=True)
        pairs = sorted((each[winner], each[loser], weight) for (winner, loser), weight in told)
        equal = zip(comparison.ties, comparison.tie_weight, strict=True)
        ties = sorted((*sorted((each[a], each[b])), weight) for (a, b), weight in equal)
        same = xxhash.xxh3_64_intdigest(repr((key, sorted(each))).encode())
        self.answers.append(same)
        self.judged.append(xxhash.xxh3_64_intdigest(repr((same, pairs, ties, comparison.scores)).encode()))


@dataclass(frozen=True)
class Selection:
    """`order`: the numbers of the rows to read; `group` [rows read]: rows that follow each other with the same group
    are to be gathered; None for either: all rows as they stand, each for itself."""

    order: np.ndarray | None = None
    group: np.ndarray | None = None
    dropped: tuple[tuple[str, int], ...] = ()
    repeated: int = 0
    contradicted: int = 0


def select(
    hashes: RowHashes, wanted: np.ndarray | None, stored: np.ndarray | None, *, drop: Iterable[str], gather: bool
) -> Selection:
    """The rows to read, of those in `wanted` (bool [rows]; None: all).

    `stored` (int64 [rows], None: each row once) names equal numbers for copies of one row, which are no repetitions.
    `drop`: REPEATED, CONTRADICTED or both.
    """
    rows = np.arange(len(hashes.prompt)) if wanted is None else np.flatnonzero(wanted)
    answers, judged = (np.frombuffer(column, dtype=np.uint64)[rows] for column in (hashes.answers, hashes.judged))
    found = told_apart(answers, judged, None if stored is None else stored[rows])
    dropped = []
    gone = np.zeros(len(rows), dtype=bool)
    for reason in drop:
        more = found[reason] & ~gone
        dropped.append((reason, int(more.sum())))
        gone |= more
    rows = rows[~gone]
    group = None
    if gather:
        group = np.frombuffer(hashes.group, dtype=np.uint64)[rows]
        _, first, which = np.unique(group, return_index=True, return_inverse=True)
        order = np.argsort(first[which], kind="stable")
        rows, group = rows[order], group[order]
    counts = {reason: int(mask.sum()) for reason, mask in found.items()}
    return Selection(
        rows, group, tuple((r, n) for r, n in dropped if n), counts[REPEATED], counts[CONTRADICTED]
    )  # fmt: skip


def held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """bool [rows]: the rows of those prompts that come first in the order of their hashes, as near to `fraction` of the
    rows as whole prompts allow, and at least one prompt on each side. `hashes` (uint64 [rows]): of the prompts, seeded.

    Raises UserError when all rows have one prompt.
    """
    prompts, which, rows = np.unique(hashes, return_inverse=True, return_counts=True)
    if len(prompts) < 2:
        raise UserError("data.eval_fraction: all rows have the same prompt, so none can be held out by prompt")
    held = np.abs(np.cumsum(rows) - fraction * len(hashes)).argmin() + 1
    return which < min(held, len(prompts) - 1)


def told_apart(answers: np.ndarray, judged: np.ndarray, stored: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """bool [rows] for REPEATED (not the first of its kind) and CONTRADICTED, from the hashes of RowHashes."""
    if stored is not None:  # judged on the stored rows; copies share their fate
        _, first, which = np.unique(stored, return_index=True, return_inverse=True)
        by_first = np.argsort(first)  # repetition is counted in the order of the rows
        rank = np.empty_like(by_first)
        rank[by_first] = np.arange(len(by_first))
        once = told_apart(answers[first[by_first]], judged[first[by_first]])
        return {reason: mask[rank[which]] for reason, mask in once.items()}
    repeated = np.ones(len(judged), dtype=bool)
    repeated[np.unique(judged, return_index=True)[1]] = False
    order = np.lexsort((judged, answers))
    same_answers = answers[order][1:] == answers[order][:-1]
    differs = same_answers & (judged[order][1:] != judged[order][:-1])
    number = np.concatenate([[0], np.cumsum(~same_answers)]) if len(order) else order
    contradicted = np.zeros(len(judged), dtype=bool)
    contradicted[order] = np.isin(number, number[1:][differs])
    return {CONTRADICTED: contradicted, REPEATED: repeated}


class Reads(NamedTuple):
    """What is read of scored answers besides the order: `margins`: the difference of their scores is a pair's margin;
    `ties`: pairs of equal scores; `scores`: the scores."""

    margins: bool = False
    ties: bool = False
    scores: bool = False


def gathered(comparisons: Iterable[tuple[Comparison, int]], reads: Reads) -> Iterator[Comparison]:
    """Merges runs of comparisons with the same group (the int) into comparisons of at most MOST_ANSWERS answers."""
    run: list[Comparison] = []
    run_group: int | None = None
    answers: set[str] = set()
    for comparison, group in comparisons:
        more = answers | set(map(_content, comparison.answers))
        if run and (group != run_group or len(more) > MOST_ANSWERS or comparison.prompt != run[0].prompt):
            yield merged(run, reads)
            run, more = [], set(map(_content, comparison.answers))
        run.append(comparison)
        run_group, answers = group, more
    if run:
        yield merged(run, reads)


def merged(run: Sequence[Comparison], reads: Reads) -> Comparison:
    """One comparison of rows with one prompt: their different answers, all their pairs; scored answers are paired."""
    first, rows = run[0], sum(one.rows for one in run)
    if first.scores:
        answers = tuple(answer for one in run for answer in one.answers)
        scores = tuple(score for one in run for score in one.scores)
        judgement = all_pairs(scores, margins=reads.margins, ties=reads.ties)
        return replace(
            first, **vars(replace(judgement, scores=scores if reads.scores else ())), answers=answers, rows=rows
        )
    if len(run) == 1:
        return first
    # Answers that several rows share are kept once, at their first place; pairs and ties are renumbered to it.
    place: dict[str, int] = {}
    different: list[list[dict[str, str]] | str] = []
    joined: dict[str, list[Any]] = {label.name: [] for label in LABEL_FIELDS}
    for one in run:
        is_new = []
        for answer in one.answers:
            is_new.append(place.setdefault(_content(answer), len(different)) == len(different))
            different += [answer] * is_new[-1]
        own = [place[_content(answer)] for answer in one.answers]
        for label in LABEL_FIELDS:
            values = getattr(one, label.name)
            if label.is_pair:
                values = [(own[a], own[b]) for a, b in values]
            elif label.of == "answers":
                values = compress(values, is_new)
            joined[label.name] += values
    labels: dict[str, Any] = {name: tuple(values) for name, values in joined.items()}
    return replace(first, answers=tuple(different), rows=rows, **labels)


def hash_text(text: str, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), seed)


def _content(answer: list[dict[str, str]] | str) -> str:
    if isinstance(answer, str):
        return answer
    return "\x1e".join(f"{turn['role']}\x1f{turn['content']}" for turn in answer)
