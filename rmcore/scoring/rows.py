"""Reads the rows of `rmcore score`: any form of prompt and answers becomes a comparison.

Input: a row as a dict, the template. Output: a `Comparison` and whether the row's form has only one answer.
Example: {"prompt": "2+2?", "answer": "4"} -> a comparison of one answer, True; {"prompt": "2+2?", "answers": ["4"]} ->
the same comparison, False.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from rmcore.config import UserError
from rmcore.data.formats.comparison import Comparison, comparison_from_row, detect_format
from rmcore.data.formats.fields import listed, parsed, short
from rmcore.data.formats.row_format import ALIASES, CONTEXT
from rmcore.data.tokens.templates import Template

MANY = ("answers", "responses", "completions")  # the keys of a list of answers
ONE = ("answer", "response", "completion")  # the keys of one answer
PROMPT = ("prompt", *ALIASES["prompt"])  # the keys of a prompt, in order of preference
# The keys of answers, and of what a judge says of them, which has no effect on rewards.
JUDGED = {name for ours, names in ALIASES.items() if ours not in ("prompt", *CONTEXT) for name in (ours, *names)}
KINDS = "prompt and answers (or answer), chosen and rejected, messages, text, or texts"
SENTENCE = ("The quick brown", "fox jumps", "over the lazy dog", "and, being asked,", "tells you", "why it did so.")


class Rendered(NamedTuple):
    """A row as the template writes it: one text per answer, and whether the row's form has only one text, or two."""

    prompt: str
    texts: list[str]
    single: bool
    unread: frozenset[str] = frozenset()  # what of the row's content is not in the texts
    pair: bool = False  # the row has chosen and rejected


def trial_rows() -> list[tuple[dict[str, Any], str]]:
    """Rows of two answers, from a few to some hundred words, for the self-test when there are no other rows."""
    rows = []
    for words in (1, 10, 60, 150):
        text = " ".join(SENTENCE * words)
        prompt = f"Why does it do so? {text[: 20 * words]}"
        rows.append(({"prompt": prompt, "answers": [" Yes.", f" No, since {text[: 9 * words]}"]}, "a trial"))
    return rows


def comparison_of(
    row: Mapping[str, Any], template: Template, where: str, *, typed: bool = False
) -> tuple[Comparison, bool]:
    """A row as a comparison, and whether the row's form has only one answer.

    K answers are read as pairs of the first with each other one, so that the rules of training rows apply to them.
    typed: the row does not come from a file: a text is text, also if it looks like the JSON text of turns.
    Raises UserError with the row's place for a row that cannot be read.
    """
    further = {name: value for name, value in row.items() if name not in JUDGED}
    has_turns = "messages" in row and not any(name in row for name in (*MANY, *ONE, "chosen"))
    if has_turns:
        found, answers = "messages", [row["messages"]]
        further = {name: value for name, value in further.items() if name not in PROMPT}
        single = True
    elif "chosen" in row and "rejected" in row:
        further |= {name: row[name] for name in ("chosen", "rejected")}
        return _pair(further, template, where, typed), False
    else:
        found = next((name for name in (*MANY, *ONE) if name in row), "")
        if not found or not any(name in row for name in PROMPT):
            raise UserError(f"{where}: a row needs {KINDS}; found {listed(list(row))}")
        single = found in ONE
        answers = [row[found]] if single else row[found]
        if isinstance(answers, str):
            answers = parsed(answers, found, where)
        if not isinstance(answers, list) or not answers:
            raise UserError(f"{where}: {found} must be a list of answers, not {short(answers)}")
    pairs = []
    for place, other in enumerate(answers[1:] or answers, start=1):
        try:
            pairs.append(_pair({**further, "chosen": answers[0], "rejected": other}, template, where, typed))
        except UserError as error:
            names = (found, found) if single else (f"{found}[0]", f"{found}[{place}]")
            raise UserError(_as_given(str(error), where, *names)) from None
    first_pair = pairs[0]
    if len(answers) == 1:
        return replace(first_pair, answers=first_pair.answers[:1], pairs=(), margin=(), weight=()), single
    every = (first_pair.answers[0], *(pair.answers[1] for pair in pairs))
    return replace(first_pair, answers=every, pairs=(), margin=(), weight=()), single


def _as_given(message: str, where: str, first: str, other: str) -> str:
    """A message about a pair in the words of the row: `answers[1]` is read as `rejected`, next to `answers[0]`."""
    for ours, theirs in (("chosen", first), ("rejected", other)):
        if message.startswith(f"{where}: {ours}"):
            rest = message.removeprefix(f"{where}: {ours}").replace(" in each of the first 1 rows", "")
            return f"{where}: {theirs}{rest.replace('as in the first rows', f'as {first} is')}"
    return message


def _pair(row: Mapping[str, Any], template: Template, where: str, typed: bool) -> Comparison:
    prompt = next((name for name in PROMPT if name in row), None)
    columns = {} if prompt is None else {"prompt": prompt}
    # A typed text counts as such; in a file's cell, text may be the JSON text of turns.
    kinds = {name: "text" if typed and isinstance(value, str) else value for name, value in row.items()}
    format = detect_format([kinds], columns, origin=where)
    return comparison_from_row(
        row, format, wants_text=template.wants_text, source="", where=where, reads=template.reads
    )
