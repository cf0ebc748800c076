"""Drops or cuts comparisons that are too long, and drops pairs of identical answers.

Input: `EncodedRow`s and `LengthLimits`.
Output: the rows that are kept, and how many rows were dropped for which reason.
Example: with max_tokens 8, a prompt of 5 tokens and texts of 7 and 9: dropped as "text too long"; with truncate_left,
the oldest prompt token goes, and the texts have 6 and 8 tokens.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np

from rmcore.data.drop_reasons import ANSWER_TOO_LONG, EMPTY, IDENTICAL, PROMPT_TOO_LONG, TEXT_TOO_LONG
from rmcore.data.labels import LABEL_FIELDS, is_labelled
from rmcore.data.tokens.comparisons import EncodedRow, TokenizedComparisons, common_prefix


@dataclass(frozen=True)
class LengthLimits:
    """Inclusive limits in tokens. `truncate_left` cuts the oldest prompt tokens of a row instead of dropping it.

    The first `keep_first` tokens are never cut (1 if the tokenizer or the template puts BOS in front).
    """

    max_tokens: int
    max_prompt_tokens: int | None = None
    truncate_left: bool = False
    keep_first: int = 0


def in_memory(rows: Sequence[EncodedRow], limits: LengthLimits, sources: Sequence[str] = ("",)) -> TokenizedComparisons:
    """Rows -> TokenizedComparisons without a cache, for a few rows. `report` has the counts rows, kept, dropped."""
    kept, dropped = apply_limits(rows, limits)
    given, left = (sum(row.rows for row in some) for some in (rows, kept))
    return TokenizedComparisons.of(kept, sources, {"rows": given, "kept": left, "dropped": dict(dropped)})


def apply_limits(rows: Sequence[EncodedRow], limits: LengthLimits) -> tuple[list[EncodedRow], Counter[str]]:
    """-> (rows that are kept, number of dropped rows by reason). Rows that are cut are changed in place."""
    kept: list[EncodedRow] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        reason = _length_reason(row, limits)
        if reason in (PROMPT_TOO_LONG, TEXT_TOO_LONG) and limits.truncate_left:
            reason = _truncate_left(row, limits)
        if reason is None and not _drop_identical(row):
            reason = IDENTICAL
        if reason is None:
            kept.append(row)
        else:
            dropped[reason] += row.rows
    return kept, dropped


def _length_reason(row: EncodedRow, limits: LengthLimits) -> str | None:
    if not all(map(len, row.answers)):
        return EMPTY  # there is no last token whose score could be read
    if limits.max_prompt_tokens is not None and len(row.prompt) > limits.max_prompt_tokens:
        return PROMPT_TOO_LONG
    return TEXT_TOO_LONG if max(map(len, row.answers)) > limits.max_tokens else None


def _truncate_left(row: EncodedRow, limits: LengthLimits) -> str | None:
    """Cuts the same number of the oldest prompt tokens from the prompt and from every text. Returns a reason to drop
    the row if that is not possible."""
    prompt_limit = len(row.prompt) if limits.max_prompt_tokens is None else limits.max_prompt_tokens
    cut = max(len(row.prompt) - prompt_limit, max(map(len, row.answers)) - limits.max_tokens)
    # Only tokens that every text shares with the prompt may go. A token that spans prompt and answer stays.
    own = min(common_prefix(row.prompt, answer) for answer in row.answers)
    if limits.keep_first + cut > own:
        return ANSWER_TOO_LONG
    head, rest = slice(0, limits.keep_first), slice(limits.keep_first + cut, None)
    row.prompt = np.concatenate([row.prompt[head], row.prompt[rest]])
    row.answers = [np.concatenate([answer[head], answer[rest]]) for answer in row.answers]
    return None if all(map(len, row.answers)) else EMPTY


def _drop_identical(row: EncodedRow) -> bool:
    """Removes pairs and ties whose two texts are the same tokens, then answers that nothing reads any more. Answers
    with labels of their own (scores) stay. False if nothing is left."""
    differ = {
        of: [not np.array_equal(row.answers[a], row.answers[b]) for a, b in pairs]
        for of, pairs in (("pairs", row.pairs), ("ties", row.ties))
    }
    labelled = is_labelled(row)
    if not (any(differ["pairs"]) or any(differ["ties"]) or labelled):
        return False
    for label in LABEL_FIELDS:
        if label.of in differ:
            setattr(row, label.name, list(compress(getattr(row, label.name), differ[label.of])))
    if not labelled:
        row.attributes = ()  # all unknown
        used = sorted({answer for pair in (*row.pairs, *row.ties) for answer in pair})
        place = {answer: i for i, answer in enumerate(used)}
        row.answers = [row.answers[answer] for answer in used]
        row.pairs, row.ties = ([(place[a], place[b]) for a, b in pairs] for pairs in (row.pairs, row.ties))
    return True
