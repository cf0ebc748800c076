"""Reads chat turns whole, in the one form that templates take: tool calls, reasoning, names and other keys included.

Input: what a row has where it should have turns, and what the chat template reads (`TemplateReads`).
Output: a list of {"role", "content", ...}, and the keys of messages that hold content which the template does not read.
Example: [{"from": "gpt", "value": null, "tool_calls": [{"function": {"name": "add"}}], "id": 7}] -> [{"role":
"assistant", "tool_calls": [{"function": {"name": "add"}}]}] for a template that reads tool_calls.

Chat turns are {"role", "content"} or, as in ShareGPT, {"from", "value"}. A single turn may come without a list, and a
list of records may be stored as a record of lists (as older versions of `datasets` wrote it). Content may be a list of
text parts, which are joined. A key that is null or empty is absent, also inside tool calls, because a table stores
every key that any row has.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rmcore.config import UserError
from rmcore.data.formats.fields import parsed, printable, records, short

Turns = list[dict[str, Any]]

# Names of speakers in published data, and what chat templates call them.
ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "chatbot", "ai", "function_call", "tool_call"),
        "assistant",
    ),
    "system": "system",
    **dict.fromkeys(("tool", "tools", "function", "observation", "function_response", "tool_response"), "tool"),
}
_PLAIN_ROLES = frozenset(ROLES.values())
# One text under three names; a template that reads any of them is given all of them (rmcore.data.tokens.templates).
REASONING = ("reasoning_content", "thinking", "reasoning")
# Keys that hold content whatever their values look like.
_CONTENT_KEYS = frozenset((*REASONING, "tool_calls", "function_call", "tool_plan", "name", "documents", "tools"))
_TEXT_PARTS = (None, "text", "input_text", "output_text")


@dataclass(frozen=True)
class TemplateReads:
    """What a chat template reads of a row: keys of messages, roles that it knows by name, and its own variables."""

    keys: frozenset[str] | None = None  # None: every key that holds content
    roles: frozenset[str] = frozenset()  # a role among them must not be replaced by a more usual one
    variables: frozenset[str] | None = None  # None: not known


EVERYTHING = TemplateReads()


class TurnReader:
    """Reads the turns of one row. `unread` collects the keys with content that the template does not read."""

    def __init__(self, where: str, reads: TemplateReads = EVERYTHING) -> None:
        self._where, self._reads = where, reads
        self.unread: set[str] = set()

    def turns(self, found: Any, name: str) -> Turns:
        """The turns in a column, at least one. Raises UserError with the place of the row."""
        found = records(found)
        if not isinstance(found, list) or not found:
            raise UserError(
                f"{self._where}: {name} must be a list of chat turns, as in the first rows, not {short(found)}"
            )
        return [self._turn(turn, f"{name}[{number}]") for number, turn in enumerate(found)]

    def _turn(self, found: Any, place: str) -> dict[str, Any]:
        role_key, content_key = ("role", "content")
        if isinstance(found, Mapping) and found.get("role") is None and "from" in found:
            role_key, content_key = ("from", "value")
        if not isinstance(found, Mapping) or not isinstance(found.get(role_key), str):
            raise self._wrong(place, f"needs a {role_key} that is text: {short(found)}")
        made = {"role": self._role(found[role_key], role_key, place)}
        content = found.get(content_key)
        if isinstance(content, str):
            made["content"] = content
        elif content is not None:
            made["content"] = self._joined(content, content_key, place)
        if len(found) > 2 or content is None:
            has_more = self._add_keys(made, found, (role_key, content_key), place)
            if content is None and not has_more:
                raise self._wrong(place, f"needs a {content_key} that is text: {short(found)}")
        return made

    def _role(self, speaker: str, key: str, place: str) -> str:
        if speaker in _PLAIN_ROLES:
            return speaker
        usual = ROLES.get(speaker.strip().lower().replace("-", "_").replace(" ", "_"))
        if key == "from":
            if usual is None:
                raise self._wrong(place, f": unknown speaker {short(speaker)}; known: {', '.join(ROLES)}")
            return usual
        return speaker if usual is None or speaker in self._reads.roles else usual

    def _joined(self, content: Any, key: str, place: str) -> str:
        """The text of a list of parts (one part may come without a list)."""
        parts = records(content)
        if not isinstance(parts, list):
            raise self._wrong(place, f"needs a {key} that is text: {short(content)}")
        texts = []
        for part in parts:
            kind, text = (part.get("type"), part.get("text")) if isinstance(part, Mapping) else (None, part)
            if kind not in _TEXT_PARTS or not isinstance(text, str):
                what = f"of type {short(kind)}" if kind not in _TEXT_PARTS else f"without text: {short(part)}"
                raise self._wrong(place, f": {key} has a part {what}; rmcore reads text only")
            texts.append(text)
        return "".join(texts)

    def _add_keys(self, made: dict[str, Any], found: Mapping[str, Any], main: Sequence[str], place: str) -> bool:
        """Adds the further keys that the template reads. Returns whether the turn holds content in any of them."""
        more = {key: plain(value) for key, value in found.items() if key not in main}
        more = {key: value for key, value in more.items() if value is not None and value != [] and value != {}}
        if "tool_calls" in more:
            more["tool_calls"] = json_list(more["tool_calls"], f"{place}.tool_calls", self._where)
        has_content = any(holds_content(key, value) for key, value in more.items())
        for key, value in more.items():
            is_content = holds_content(key, value)
            if key in self._reads.keys if self._reads.keys is not None else is_content:
                made[key] = value
            elif is_content:
                self.unread.add(f"message key {printable(key, 40)} (the template does not read it)")
        return has_content

    def _wrong(self, place: str, what: str) -> UserError:
        return UserError(f"{self._where}: {place}{what if what.startswith(':') else f' {what}'}")


def holds_content(key: str, value: Any) -> bool:
    """Whether a value under this key is content that a reader of the data would miss."""
    return bool(value) if key in _CONTENT_KEYS else bool(prose(value))


def all_texts(value: Any) -> list[str]:
    """The texts in a value, at any depth."""
    if isinstance(value, str):
        return [value]
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [text for inner in inside for text in all_texts(inner)]


def prose(value: Any) -> list[str]:
    """The texts of two or more words in a value: what looks like content, not like an id or a label."""
    return [
        text for text in all_texts(value) if sum(any(map(str.isalpha, word)) for word in text[:400].split(None, 8)) > 1
    ]


def plain(value: Any) -> Any:
    """The value as JSON can hold it, without the keys that are null, at any depth.

    A table fills a key with null where another row has a value for it.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def json_list(found: Any, name: str, where: str) -> list[Any]:
    """A list of records such as tools: also as JSON text, whole or each of them, and a single record without a list."""
    found = records(parsed(found, name, where) if isinstance(found, str) else found)
    if not isinstance(found, list):
        raise UserError(f"{where}: {name} must be a list of records, or the JSON text of one, not {short(found)}")
    made = [parsed(item, f"{name}[{i}]", where) if isinstance(item, str) else item for i, item in enumerate(found)]
    wrong = next((item for item in made if not isinstance(item, Mapping)), None)
    if wrong is not None:
        raise UserError(f"{where}: {name} must be a list of records, not of {short(wrong)}")
    return [plain(item) for item in made]


def text_of_turn(turn: Mapping[str, Any], between: str) -> str:
    """A turn as text that identifies it: role and content, and its further keys as JSON."""
    text = f"{turn['role']}{between}{turn.get('content') or ''}"
    if len(turn) <= 2 and "content" in turn:
        return text
    more = {key: value for key, value in turn.items() if key not in ("role", "content")}
    return f"{text}\x1f{json.dumps(more, sort_keys=True)}" if more else text
