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
from rmcore.data.formats.fields import listed, short
from rmcore.data.tokens.templates import Template

MANY = ("answers", "responses", "completions")  # the keys of a list of answers
ONE = ("answer", "response", "completion")  # the keys of one answer
KINDS = "prompt and answers (or answer), chosen and rejected, messages, text, or texts"
SENTENCE = ("The quick brown", "fox jumps", "over the lazy dog", "and, being asked,", "tells you", "why it did so.")


class Rendered(NamedTuple):
    """A row as the template writes it: one text per answer, and whether the row's form has only one text."""

    prompt: str
    texts: list[str]
    single: bool


def trial_rows() -> list[tuple[dict[str, Any], str]]:
    """Rows of two answers, from a few to some hundred words, for the self-test when there are no other rows."""
    rows = []
    for words in (1, 10, 60, 150):
        text = " ".join(SENTENCE * words)
        prompt = f"Why does it do so? {text[: 20 * words]}"
        rows.append(({"prompt": prompt, "answers": [" Yes.", f" No, since {text[: 9 * words]}"]}, "a trial"))
    return rows


def comparison_of(row: Mapping[str, Any], template: Template, where: str) -> tuple[Comparison, bool]:
    """A row as a comparison, and whether the row's form has only one answer.

    K answers are read as pairs of the first with each other one, so that the rules of training rows apply to them.
    Raises UserError with the row's place for a row that cannot be read.
    """
    if isinstance(row.get("messages"), list) and not any(name in row for name in (*MANY, *ONE, "chosen")):
        answers: list[Any] = [row["messages"]]
        prompt: dict[str, Any] = {}
        single = True
    elif "chosen" in row and "rejected" in row:
        return _pair(row, template, where), False
    else:
        found = next((name for name in (*MANY, *ONE) if name in row), None)
        if "prompt" not in row or found is None:
            raise UserError(f"{where}: a row needs {KINDS}; found {listed(list(row))}")
        single = found in ONE
        answers = [row[found]] if single else row[found]
        prompt = {"prompt": row["prompt"]}
        if not isinstance(answers, list) or not answers:
            raise UserError(f"{where}: {found} must be a list of answers, not {short(answers)}")
    others = answers[1:] or answers
    pairs = [_pair({**prompt, "chosen": answers[0], "rejected": other}, template, where) for other in others]
    first = pairs[0]
    if len(answers) == 1:
        return replace(first, answers=first.answers[:1], pairs=(), margin=(), weight=()), single
    every = (first.answers[0], *(pair.answers[1] for pair in pairs))
    return replace(first, answers=every, pairs=(), margin=(), weight=()), single


def _pair(row: Mapping[str, Any], template: Template, where: str) -> Comparison:
    read = {name: row[name] for name in ("prompt", "chosen", "rejected") if row.get(name) is not None}
    format = detect_format([read], {}, origin=where)
    return comparison_from_row(read, format, wants_text=template.wants_text, source="", where=where)
