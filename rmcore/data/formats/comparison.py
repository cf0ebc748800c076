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

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rmcore.config import UserError
from rmcore.data.formats import fields
from rmcore.data.formats.fields import printable, short
from rmcore.data.formats.judgements import judge
from rmcore.data.formats.row_format import CONTEXT, FIELDS, RowFormat, detect_format
from rmcore.data.formats.transcripts import (
    answer_turns,
    ends_with_cue,
    is_transcript,
    prompt_turns,
    split_texts,
    split_turns,
    transcript_turns,
)
from rmcore.data.formats.turns import (
    EVERYTHING,
    TemplateReads,
    TurnReader,
    Turns,
    all_texts,
    json_list,
    plain,
    prose,
    text_of_turn,
)
from rmcore.data.labels import Judgement

__all__ = ["FIELDS", "Comparison", "RowFormat", "Turns", "comparison_from_row", "detect_format", "has_empty_answer"]

# What a row may not hand to a template as a variable, because the rendering sets it.
_TAKEN = frozenset(("messages", "conversation", "tools", "documents", "chat_template", "tokenize",
                    "add_generation_prompt", "continue_final_message"))  # fmt: skip

# Two whole texts that share fewer characters than this agree by chance ("I think "), not because of a common prompt.
_SHORTEST_SHARED_PROMPT = 32


@dataclass(frozen=True)
class Comparison(Judgement):
    """A prompt, its answers, and what the row says of them. Turns and text are never mixed in one comparison."""

    prompt: Turns | str  # chat turns [{"role", "content", ...}, ...] without the answer's, or plain text
    answers: tuple[Turns | str, ...]  # each: the turns (or the text) that follow the prompt
    source: str  # for metrics by source
    prompt_key: str  # identifies the prompt (for holding out by prompt)
    rows: int = 1  # how many rows of the data this comparison was made of
    objective: int = 0  # the number of its objective, where a run has several; -1: none of them
    variables: Mapping[str, Any] = field(
        default_factory=dict
    )  # of the template, besides the turns: tools, documents, ...
    unread: frozenset[str] = field(default=frozenset(), compare=False)  # columns and message keys with unread content


def comparison_from_row(
    row: Mapping[str, Any],
    format: RowFormat,
    *,
    wants_text: bool,
    source: str,
    where: str,
    reads: TemplateReads = EVERYTHING,
) -> Comparison:
    """One row -> Comparison.

    `wants_text` (Template.wants_text): texts byte for byte instead of turns. `reads` (Template.reads): what of a row
    the template uses. `source`: the label of a row without one. `where` ("FILE:LINE") begins every error. An empty
    answer is legal (it becomes only EOS). A row of the layout `single` gives one answer, its score and no pairs
    (rmcore.data.formats.selection makes the pairs).
    Raises UserError for a missing, null or wrong-typed field, and for rows that cannot be read as text (or as turns).
    """
    try:
        return _Row(format.unpacked(row, where), format, where, reads).comparison(wants_text, source)
    except RecursionError:
        raise UserError(f"{where}: its lists and records are nested too deeply") from None


class _Row:
    """One row while it is read."""

    def __init__(self, row: Mapping[str, Any], format: RowFormat, where: str, reads: TemplateReads) -> None:
        self.row, self.format, self.where, self.reads = row, format, where, reads
        self.reader = TurnReader(where, reads)
        self.prompt_is_read = False

    def comparison(self, wants_text: bool, source: str) -> Comparison:
        row, format, where = self.row, self.format, self.where
        names = format.names
        unread = row.get(names["prompt"]) if format.prompt is None and "prompt" in names else None
        if unread is not None:
            raise UserError(f"{where}: {names['prompt']} was null in the first rows, and here is {short(unread)}")
        raw, judgement = judge(row, format, where)
        if not raw:  # no answer at all: nothing can be preferred
            return Comparison("", (), source, "", objective=format.objective)
        prompt: Turns | str
        answers: Sequence[Turns | str]
        variables: dict[str, Any] = {}
        if wants_text:
            prompt, answers = text = self.as_text(raw)
            by_chance = format.prompt is None and len(text[0]) < _SHORTEST_SHARED_PROMPT and not is_transcript(text[0])
            key = text[0] + text[1][0] if by_chance else text[0]
        else:
            prompt, answers = turns = self.as_turns(raw)
            key = "\n".join(text_of_turn(turn, ": ") for turn in turns[0] or turns[1][0])
            system = self.system(turns[0] or turns[1][0])
            if system:
                prompt, key = [system, *turns[0]], f"{text_of_turn(system, ': ')}\n{key}"
            variables = self.variables()
            if variables:
                key += f"\x1f{json.dumps(variables, sort_keys=True)}"
        return Comparison(
            prompt=prompt,
            answers=tuple(answers),
            source=_label(row.get(names["source"]) if "source" in names else None, source),
            prompt_key=key,
            variables=variables,
            objective=format.objective,
            unread=frozenset(self.reader.unread | self.unread_columns(wants_text)),
            **vars(judgement),
        )

    def as_text(self, raw: Sequence[tuple[Any, str]]) -> tuple[str, list[str]]:
        """-> prompt and answers, such that prompt + answer is the unchanged text of the row."""
        format = self.format
        if format.answers == "turns" or format.prompt == "turns" or (format.prompt is None and format.messages):
            raise UserError(
                f"{self.where}: data.template=none needs texts, but the rows hold chat turns; "
                "set data.template to a chat template (simple_chat, tokenizer, ...)"
            )
        texts = [_text_of(value, name, self.where) for value, name in raw]
        if format.prompt == "text":
            return self.prompt_text(), texts
        return split_texts(texts) if len(texts) > 1 else ("", texts)

    def as_turns(self, raw: Sequence[tuple[Any, str]]) -> tuple[Turns, list[Turns]]:
        """-> the turns of the prompt, and for each answer the turns that follow it (at least one)."""
        format, where = self.format, self.where
        if format.answers == "turns":
            return self.turn_answers([self.reader.turns(value, name) for value, name in raw])
        texts = [_text_of(value, name, where) for value, name in raw]
        prompt_text = self.prompt_text() if format.prompt == "text" else ""
        if format.prompt is None and not format.messages:
            if not all(map(is_transcript, texts)):
                raise UserError(
                    f"{where}: {' and '.join(name for _, name in raw[:2])} are whole texts without turns, which a chat "
                    f"template cannot take: {short(texts[0])}; set data.template=none, or give the prompt in a column "
                    "of its own"
                )
            return split_turns([transcript_turns(text) for text in texts])
        if format.messages or format.prompt == "turns":
            field = "messages" if format.messages else "prompt"
            self.prompt_is_read = field == "prompt"
            prompt = self.turns_in(name := format.names[field])
            if prompt[-1]["role"] == "assistant":
                raise UserError(f"{where}: {name} must be the prompt's turns, but it ends with an assistant's turn")
        else:
            prompt = prompt_turns(prompt_text)
        if ends_with_cue(prompt_text):
            return prompt, [answer_turns(prompt_text, text) for text in texts]
        return prompt, [answer_turns("", text) for text in texts]

    def turn_answers(self, answers: list[Turns]) -> tuple[Turns, list[Turns]]:
        format, prompt = self.format, []
        if format.prompt == "turns":
            self.prompt_is_read = True
            prompt = self.turns_in(name := format.names["prompt"])
            if name == "conversations" and prompt[-1]["role"] == "assistant":
                raise UserError(
                    f"{self.where}: {name} must be the prompt's turns, but it ends with an assistant's turn"
                )
        elif format.prompt == "text" and all(turns[0]["role"] == "assistant" for turns in answers):
            prompt = prompt_turns(self.prompt_text())
        if prompt and not all(turns[: len(prompt)] == prompt for turns in answers):
            return prompt, answers
        return split_turns(answers)

    def turns_in(self, name: str) -> Turns:
        return self.reader.turns(fields.value(self.row, name, self.where), name)

    def prompt_text(self) -> str:
        """The text of the prompt; an Alpaca row has it in two parts."""
        self.prompt_is_read = True
        text = fields.text(self.row, self.format.names["prompt"], self.where)
        second = self.text_or_nothing("input")
        return f"{text}\n{second}" if second else text

    def text_or_nothing(self, ours: str) -> str:
        return "" if self.value(ours) is None else fields.text(self.row, self.format.names[ours], self.where)

    def value(self, ours: str) -> Any:
        """What the row has in the column of one of our fields, None if the rows have no such column."""
        names = self.format.names
        return self.row.get(names[ours]) if ours in names else None

    def system(self, conversation: Turns) -> dict[str, Any] | None:
        """The turn of the system column, unless the conversation has a system turn of its own."""
        text = self.text_or_nothing("system")
        if not text.strip():
            return None
        own = [turn for turn in conversation[:1] if turn["role"] in ("system", "developer")]
        if own and own[0].get("content", "").strip() != text.strip():
            self.reader.unread.add(f"column {self.format.names['system']} (the conversations have other system turns)")
        return None if own else {"role": "system", "content": text}

    def variables(self) -> dict[str, Any]:
        """What the row hands to the template besides the turns: tools, documents, variables such as enable_thinking.

        Columns that are called as a variable of the template count, if they hold a number, a boolean or a word.
        """
        row, names, where = self.row, self.format.names, self.where
        found: dict[str, Any] = {}
        known = self.reads.variables
        for name in (known or frozenset()).difference(names.values(), _TAKEN):
            value = row.get(name)
            if isinstance(value, int | float) or (isinstance(value, str) and len(value.split()) == 1):
                found[name] = value
        given = self.value("chat_template_kwargs")
        if given:
            name = names["chat_template_kwargs"]
            given = fields.parsed(given, name, where) if isinstance(given, str) else given
            if not isinstance(given, Mapping) or _TAKEN & given.keys():
                raise UserError(f"{where}: {name} must be a record of the template's own variables, not {short(given)}")
            found.update(plain(given))
        for ours in ("tools", "documents"):
            given = self.value(ours)
            if given is not None and given != "" and (listed := json_list(given, names[ours], where)):
                found[ours] = listed
        for name in [name for name in found if known is not None and name not in known]:
            del found[name]
            if name in ("tools", "documents"):
                self.reader.unread.add(f"column {names[name]} (the template does not read it)")
            elif name not in row:
                place = f"{names['chat_template_kwargs']}.{printable(name, 40)}"
                self.reader.unread.add(f"{place} (the template does not read it)")
        return dict(sorted(found.items()))

    def unread_columns(self, wants_text: bool) -> set[str]:
        """Columns whose content is in no column that is read."""
        format = self.format
        spare = {*(CONTEXT[1:] if wants_text else ()), *(() if format.messages else ("messages",))}
        spare |= set() if self.prompt_is_read or format.messages else {"prompt"}
        names = {theirs for ours, theirs in format.names.items() if ours not in spare}
        candidates = {f"column {printable(name, 40)}": self.row[name] for name in self.row.keys() - names}
        read = {name: self.row.get(name) for name in names}
        if format.item_text:  # the other keys of the answers' records
            name = format.names["answers"]
            items = [item for item in fields.records(read[name]) if isinstance(item, Mapping)]
            read[name] = [item.get(format.item_text) for item in items]
            for item in items:
                for key in item.keys() - {format.item_text, format.item_value}:
                    candidates.setdefault(f"column {name}[].{printable(key, 40)}", []).append(item[key])
        texts = {label: prose(value) for label, value in candidates.items()}
        if wants_text:  # all that belongs to the prompt is content, also a single word
            spare_names = [theirs for ours, theirs in format.names.items() if ours in CONTEXT[1:]]
            texts |= {f"column {printable(name, 40)}": all_texts(self.row.get(name)) for name in spare_names}
        texts = {label: found for label, found in texts.items() if any(found)}
        if not texts:
            return set()
        whole = "\n".join(text.strip() for text in all_texts(list(read.values())))
        return {label for label, found in texts.items() if not all(text.strip() in whole for text in found)}


def has_empty_answer(comparison: Comparison) -> bool:
    """True if an answer has no text but white space, which is legal and counted."""
    return any(
        not answer.strip()
        if isinstance(answer, str)
        else not any(turn.get("content", "").strip() or len(turn) > 2 for turn in answer)
        for answer in comparison.answers
    )


def _label(own: Any, fallback: str) -> str:
    """The row's own source if it has one. Nectar has lists of several sources."""
    if isinstance(own, list):
        own = "+".join(map(str, own))
    return fallback if own is None or own == "" else fields.printable(str(own))


def _text_of(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} must be text, as in the first rows, not {short(value)}")
    return value
