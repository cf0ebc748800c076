"""Turns rows of any known format into `Comparison`s: a prompt, its answers, which of them are preferred.

Input: the rows of a source (dicts), and the RowFormat that its first rows have.
Output: one Comparison per row.
Example: {"prompt": "2+2?", "chosen": "4", "rejected": "5"} -> prompt [user "2+2?"],
answers ([assistant "4"], [assistant "5"]), pairs ((0, 1),); with wants_text: prompt "2+2?", answers ("4", "5").
Answers with the ranks 1, 3, 2 -> pairs (0, 1), (0, 2), (2, 1) of weight 1/3 each.

Formats: text or chat turns; the prompt in a column of its own (explicit) or at the beginning of all answers (implicit);
HH's transcripts (rmcore.data.formats.transcripts); the layouts of rmcore.data.formats.row_format. A row that deviates
from the format of its source is an error, never a guess.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rmcore.config import UserError
from rmcore.data.formats import fields
from rmcore.data.formats.fields import Turns, short
from rmcore.data.formats.judgements import judge
from rmcore.data.formats.row_format import FIELDS, RowFormat, detect_format
from rmcore.data.formats.transcripts import (
    answer_turns,
    ends_with_cue,
    is_transcript,
    prompt_turns,
    split_texts,
    split_turns,
    transcript_turns,
)
from rmcore.data.labels import Judgement

__all__ = ["FIELDS", "Comparison", "RowFormat", "Turns", "comparison_from_row", "detect_format", "has_empty_answer"]

# Two whole texts that share fewer characters than this agree by chance ("I think "), not because of a common prompt.
_SHORTEST_SHARED_PROMPT = 32


@dataclass(frozen=True)
class Comparison(Judgement):
    """A prompt, its answers, and what the row says of them. Turns and text are never mixed in one comparison."""

    prompt: Turns | str  # chat turns [{"role", "content"}, ...] without the answer's, or plain text
    answers: tuple[Turns | str, ...]  # each: the turns (or the text) that follow the prompt
    source: str  # for metrics by source
    prompt_key: str  # identifies the prompt (for holding out by prompt)
    rows: int = 1  # how many rows of the data this comparison was made of


def comparison_from_row(
    row: Mapping[str, Any], format: RowFormat, *, wants_text: bool, source: str, where: str
) -> Comparison:
    """One row -> Comparison.

    `wants_text` (Template.wants_text): texts byte for byte instead of turns. `source`: the label of a row without one.
    `where` ("FILE:LINE") begins every error. An empty answer is legal (it becomes only EOS). A row of the layout
    `single` gives one answer, its score and no pairs (rmcore.data.formats.selection makes the pairs).
    Raises UserError for a missing, null or wrong-typed field, and for rows that cannot be read as text (or as turns).
    """
    names = format.names
    unread = row.get(names["prompt"]) if format.prompt is None and "prompt" in names else None
    if unread is not None:
        raise UserError(f"{where}: {names['prompt']} was null in the first rows, and here is {short(unread)}")
    raw, judgement = judge(row, format, where)
    if not raw:  # no answer at all: nothing can be preferred
        return Comparison("", (), source, "")
    prompt: Turns | str
    answers: Sequence[Turns | str]
    if wants_text:
        prompt, answers = text = _as_text(row, format, raw, where)
        by_chance = format.prompt is None and len(text[0]) < _SHORTEST_SHARED_PROMPT and not is_transcript(text[0])
        key = text[0] + text[1][0] if by_chance else text[0]
    else:
        prompt, answers = turns = _as_turns(row, format, raw, where)
        key = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns[0] or turns[1][0])
    return Comparison(
        prompt=prompt,
        answers=tuple(answers),
        source=_label(row.get(names["source"]) if "source" in names else None, source),
        prompt_key=key,
        **vars(judgement),
    )


def has_empty_answer(comparison: Comparison) -> bool:
    """True if an answer has no text but white space, which is legal and counted."""
    texts = (a if isinstance(a, str) else "".join(turn["content"] for turn in a) for a in comparison.answers)
    return any(not text.strip() for text in texts)


def _label(own: Any, fallback: str) -> str:
    """The row's own source if it has one. Nectar has lists of several sources."""
    if isinstance(own, list):
        own = "+".join(map(str, own))
    return fallback if own is None or own == "" else fields.printable(str(own))


def _as_text(
    row: Mapping[str, Any], format: RowFormat, raw: Sequence[tuple[Any, str]], where: str
) -> tuple[str, list[str]]:
    """-> prompt and answers, such that prompt + answer is the unchanged text of the row."""
    if format.answers == "turns" or format.prompt == "turns" or (format.prompt is None and format.messages):
        raise UserError(
            f"{where}: data.template=none needs texts, but the rows hold chat turns; "
            "set data.template to a chat template (simple_chat, tokenizer, ...)"
        )
    texts = [_text_of(value, name, where) for value, name in raw]
    if format.prompt == "text":
        return fields.text(row, format.names["prompt"], where), texts
    return split_texts(texts) if len(texts) > 1 else ("", texts)


def _as_turns(
    row: Mapping[str, Any], format: RowFormat, raw: Sequence[tuple[Any, str]], where: str
) -> tuple[Turns, list[Turns]]:
    """-> the turns of the prompt, and for each answer the turns that follow it (at least one)."""
    if format.answers == "turns":
        return _turn_answers(row, format, [fields.turns_of(value, name, where) for value, name in raw], where)
    texts = [_text_of(value, name, where) for value, name in raw]
    prompt_text = fields.text(row, format.names["prompt"], where) if format.prompt == "text" else ""
    if format.prompt is None and not format.messages:
        if not all(map(is_transcript, texts)):
            raise UserError(
                f"{where}: {' and '.join(name for _, name in raw[:2])} are whole texts without turns, which a chat "
                f"template cannot take: {short(texts[0])}; set data.template=none, or give the prompt in a column of "
                "its own"
            )
        return split_turns([transcript_turns(text) for text in texts])
    if format.messages or format.prompt == "turns":
        field = "messages" if format.messages else "prompt"
        prompt = fields.turns(row, name := format.names[field], where)
        if prompt[-1]["role"] == "assistant":
            raise UserError(f"{where}: {name} must be the prompt's turns, but it ends with an assistant's turn")
    else:
        prompt = prompt_turns(prompt_text)
    if ends_with_cue(prompt_text):
        return prompt, [answer_turns(prompt_text, text) for text in texts]
    return prompt, [answer_turns("", text) for text in texts]


def _turn_answers(
    row: Mapping[str, Any], format: RowFormat, answers: list[Turns], where: str
) -> tuple[Turns, list[Turns]]:
    prompt: Turns = []
    if format.prompt == "turns":
        prompt = fields.turns(row, name := format.names["prompt"], where)
        if name == "conversations" and prompt[-1]["role"] == "assistant":
            raise UserError(f"{where}: {name} must be the prompt's turns, but it ends with an assistant's turn")
    elif format.prompt == "text" and all(turns[0]["role"] == "assistant" for turns in answers):
        prompt = prompt_turns(fields.text(row, format.names["prompt"], where))
    if prompt and not all(turns[: len(prompt)] == prompt for turns in answers):
        return prompt, answers
    return split_turns(answers)


def _text_of(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} must be text, as in the first rows, not {short(value)}")
    return value
