"""Detects the layout of a source from its first rows. A later row that deviates is an error.

Input: the first rows of a source, and the user's `columns`.
Output: a RowFormat, which is printed.
Example: Nectar's rows {"prompt": "\\n\\nHuman: ...", "answers": [{"answer": "...", "rank": 1.0}, ...]} give
"7 answers with ranks (answers[].answer, answers[].rank), explicit prompt, text; Human/Assistant transcripts".

    layout  a row holds                                     judged by
    pair    chosen, rejected                                their names; or a probability, votes
    two     answer_a, answer_b                              score_a and score_b, winner, probability, votes
    many    answers: a list of texts, turns or records      ranks (1 is best) or scores (more is better)
    single  answer; rows of one prompt are gathered         score

All of them may have a system text, tools, documents and variables of the chat template next to the prompt. Turns and
lists may be stored as JSON text in a cell, as in a CSV file.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rmcore.config import UserError
from rmcore.data.formats.fields import kind_of, listed, parsed, records, short
from rmcore.data.formats.transcripts import is_transcript

Layout = Literal["pair", "two", "many", "single"]

# Our names, which `columns` may map, and names in published data that are understood without a mapping.
ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("instruction", "history", "question", "query", "input"),
    "chosen": (), "rejected": (), "messages": (),
    "margin": (), "score_chosen": (), "score_rejected": (),
    "probability": (), "votes": (), "preference": ("preference_strength", "overall_preference"), "weight": (),
    "answer_a": ("response_a", "response_0", "response_1", "response1", "human_ref_A", "answer_0", "conversation_a"),
    "answer_b": ("response_b", "response_1", "response_2", "response2", "human_ref_B", "answer_1", "conversation_b"),
    "score_a": ("score_A", "score_0", "score_1", "score1"), "score_b": ("score_B", "score_1", "score_2", "score2"),
    "winner": ("better_response_id", "preferred"),
    "answers": ("completions", "responses"), "ranks": ("rank", "rankings"), "scores": ("ratings",),
    "probabilities": (),
    "answer": ("response", "completion", "output"), "score": ("helpfulness", "reward", "rating"),
    "source": ("category", "subset", "domain"),
    "input": (), "system": ("system_prompt", "system_message"),
    "tools": (), "documents": (), "chat_template_kwargs": (),
}  # fmt: skip
FIELDS = tuple(ALIASES)
# Inside the records of a list of answers.
ITEM_TEXT = ("answer", "response", "completion", "text", "content", "messages")
ITEM_VALUE = {
    "ranks": ("rank",), "scores": ("score", "overall_score", "rating", "reward"), "probabilities": ("probability",),
}  # fmt: skip
# The fields that a layout must have, in the order in which layouts are tried. The first one holds an answer.
LAYOUTS: dict[Layout, tuple[str, ...]] = {
    "pair": ("chosen", "rejected"), "many": ("answers",), "two": ("answer_a", "answer_b"),
    "single": ("answer", "score"),
}  # fmt: skip
# The fields with a score of each answer. In a list of answers, the scores are in the list or in its records.
SCORES: dict[Layout, tuple[str, ...]] = {
    "pair": ("score_chosen", "score_rejected"), "two": ("score_a", "score_b"), "single": ("score",),
}  # fmt: skip
# What belongs to the prompt besides its text or turns; `input` is the second part of an `instruction` (Alpaca).
CONTEXT = ("input", "system", "tools", "documents", "chat_template_kwargs")
# All fields that a layout reads.
READ = {
    "pair": ("prompt", "chosen", "rejected", "messages", "margin", "score_chosen", "score_rejected", "probability",
             "votes", "source", "weight", *CONTEXT),
    "two": ("prompt", "answer_a", "answer_b", "margin", "score_a", "score_b", "winner", "probability", "votes",
            "preference", "source", "weight", *CONTEXT),
    "many": ("prompt", "answers", "ranks", "scores", "probabilities", "source", "weight", *CONTEXT),
    "single": ("prompt", "answer", "score", "source", *CONTEXT),
}  # fmt: skip
# Fields that may hold JSON text in place of turns, or of a list.
TURNS_FIELDS = ("prompt", "chosen", "rejected", "messages", "answer_a", "answer_b", "answer")
LIST_FIELDS = ("answers", "ranks", "scores", "votes", "probabilities")
# What the name of an attribute's column ends with for the first and the second answer of a row.
SIDES: dict[Layout, tuple[str, ...]] = {"pair": ("_chosen", "_rejected"), "two": ("_a", "_b")}
_TURNS_IN_TEXT = re.compile(r"""\s*[\[{].{,200}["'](role|from)["']\s*:""", re.DOTALL)


@dataclass(frozen=True)
class RowFormat:
    """How to read the rows of one source. str(format) is the description to print."""

    names: dict[str, str]  # our field -> their column, for the fields that the rows have
    prompt: Literal["text", "turns"] | None  # None: implicit
    answers: Literal["text", "turns"]
    messages: bool  # a column `messages` has the prompt as turns, next to its text
    transcript: bool  # the first rows are HH transcripts
    margin: Literal["margin", "scores"] | None  # what margins are read from
    layout: Layout = "pair"
    judged_by: str = ""  # the field (our name) that says which answer is better; "": chosen and rejected
    item_text: str = ""  # layout many: the key of the text in an answer's record; "": answers are not records
    item_value: str = ""  # layout many: the key of the rank or score in that record; "": a list in a column of its own
    json: frozenset[str] = frozenset()  # their columns of JSON text
    ties: bool = False  # the objective reads ties (set by rmcore.data.formats.requirements)
    scores: bool = False  # the objective reads the scores of the answers (likewise)
    targets: bool = False  # the objective reads them as probabilities of the answers (likewise)
    objective: int = 0  # the number of the objective, where a run has several (likewise)
    attributes: tuple[str, ...] = ()  # for each attribute that the run reads its column or key; "": not in these rows

    @property
    def gathers(self) -> bool:
        """True if a row is a part of a comparison, and rows of one prompt have to be merged."""
        return self.layout == "single"

    @property
    def has_scores(self) -> bool:
        """True if every answer of these rows has a score: a number that means more than a rank."""
        if self.layout == "many":
            return self.judged_by in ("scores", "probabilities")
        scores = SCORES.get(self.layout, ())
        return bool(scores) and {*scores} <= self.names.keys()

    def unpacked(self, row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """The row with the JSON text in its cells parsed. Raises UserError for a cell that is not JSON."""
        texts = {name: row[name] for name in self.json if isinstance(row.get(name), str)}
        return {**row, **{name: parsed(text, name, where) for name, text in texts.items()}} if texts else row

    def __str__(self) -> str:
        conversational = "conversational" if self.answers == "turns" else "text"
        notes = (
            self._judgement(),
            f"{'implicit' if self.prompt is None and not self.messages else 'explicit'} prompt, {conversational}",
            "prompt as text" if self.answers == "turns" and self.prompt == "text" else "",
            "Human/Assistant transcripts" if self.transcript else "",
            "prompt as turns in messages" if self.messages else "",
            {"margin": "margin", "scores": f"margin = {self._difference()}", None: ""}[self.margin],
            "ties" if self.ties else "",
            "scores" if self.scores else "",
            f"attributes {', '.join(filter(None, self.attributes))}" if any(self.attributes) else "",
            f"weight of a row in {self.names['weight']}" if "weight" in self.names else "",
            f"JSON text in {', '.join(sorted(self.json))}" if self.json else "",
        )
        return "; ".join(filter(None, notes))

    def _difference(self) -> str:
        if self.layout == "pair":
            return "score_chosen - score_rejected"
        if self.judged_by == "preference":
            return f"size of {self.names['preference']}"
        return "difference of " + ("ranks" if self.judged_by == "ranks" else "scores")

    def _judgement(self) -> str:
        by = self.names.get(self.judged_by, self.judged_by)
        if self.layout == "pair":
            return {"": "", "votes": f"votes in {by}"}.get(self.judged_by, f"probability in {by}")
        if self.layout == "single":
            return f"one answer a row, gathered by prompt, scored by {by}"
        if self.layout == "two":
            by = by if self.judged_by != "score_a" else f"{by} and {self.names['score_b']}"
            return f"two answers ({self.names['answer_a']}, {self.names['answer_b']}) judged by {by}"
        item = f"{self.names['answers']}[]"
        text = f"{item}.{self.item_text}" if self.item_text else self.names["answers"]
        return (
            f"lists of answers in {text}, {self.judged_by} in {f'{item}.{self.item_value}' if self.item_value else by}"
        )


def detect_format(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str],
    *,
    origin: str,
    key: str = "data.train",
    need_margin: bool = False,
    attributes: Sequence[str] = (),
    why: str = "loss.margin=data",
) -> RowFormat:
    """First rows of a source (some 20) -> RowFormat.

    `columns`: our name -> theirs. `origin` and `key` are for error messages. `need_margin` (loss.margin = data): read
    margins; `why`: the setting that needs them. `attributes`: the attributes of answers that the run reads, where the
    rows have them; `columns` may map them, too. Raises UserError for columns that do not make a format.
    """
    if attributes:
        known = {ours: theirs for ours, theirs in columns.items() if ours in FIELDS or ours not in attributes}
        format = detect_format(rows, known, origin=origin, key=key, need_margin=need_margin, why=why)
        return replace(format, attributes=tuple(_attribute(rows, format, columns.get(a, a)) for a in attributes))
    found = list(dict.fromkeys(name for row in rows for name in row))
    for ours, theirs in columns.items():
        if ours not in FIELDS:
            guess = difflib.get_close_matches(ours, FIELDS, n=1)
            hint = f" (did you mean {guess[0]}?)" if guess else ""
            raise UserError(f"{key}.columns: unknown name {ours!r}{hint}; known: {', '.join(FIELDS)}")
        inside = ours in ITEM_VALUE  # may be a key of the answers' records
        if theirs not in found and not inside:
            raise UserError(f"{key}.columns: {ours} is mapped to {theirs!r}, but {origin} has {listed(found)}")
    layout = find_layout(found, columns)
    if layout is None:
        raise UserError(_no_layout(found, columns, origin, key))
    names = names_of(found, columns, layout)
    if "weight" in columns and "weight" not in names:
        raise UserError(f"{key}.columns: weight is read of rows of several answers; these have one scored answer each")
    packed = _packed(rows, names, origin)
    if packed:
        rows = [RowFormat(names, None, "text", False, False, None, json=packed).unpacked(row, origin) for row in rows]
    if layout == "many":
        return replace(_many(rows, names, columns, origin, key, need_margin), json=packed)
    if layout == "pair" and "prompt" not in columns and not _is_prompt(rows, names):
        names = {ours: theirs for ours, theirs in names.items() if ours not in ("prompt", "input")}
    main = LAYOUTS[layout][0]
    kinds = {ours: _kind(rows, names[ours], origin) for ours in ("prompt", main, "messages") if ours in names}
    answers = kinds[main]
    if answers is None:
        raise UserError(f"{origin}: {names[main]} is null in each of the first {len(rows)} rows")
    judged_by = _judge(rows, names, layout, columns, origin, key)
    head = names["prompt" if kinds.get("prompt") else main]
    return RowFormat(
        names=names,
        prompt=kinds.get("prompt"),
        answers=answers,
        # Next to turns, `messages` is something else (ultrafeedback_binarized: the whole chosen conversation).
        messages=answers == "text" and kinds.get("messages") == "turns",
        transcript=answers == "text" and any(is_transcript(row.get(head)) for row in rows),
        margin=_margin_kind(names, layout, judged_by, origin, key, why) if need_margin else None,
        layout=layout,
        judged_by=judged_by,
        json=packed,
    )


def _is_prompt(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> bool:
    """Whether the column found for the prompt of a pair is its prompt, and not a copy of a part of whole texts."""
    name = names.get("prompt", "prompt")
    if name in ("prompt", "conversations"):
        return True
    both = [(row[name], row[names["chosen"]]) for row in rows if row.get(name) and row.get(names["chosen"])]
    if both and all(map(_are_turns, (prompt for prompt, _ in both))):
        return True
    if not both or not all(isinstance(prompt, str) for prompt, _ in both):
        return False
    return not any(
        isinstance(whole, str) and (is_transcript(whole) or prompt.strip() in whole) for prompt, whole in both
    )


def _packed(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], origin: str) -> frozenset[str]:
    """Their columns that hold turns or lists as JSON text in all of the first rows.

    Raises UserError for a column in which half of the rows or more do, or look like turns but are not JSON. A few such
    texts among others are taken for answers that happen to look like it.
    """
    packed = set()
    for ours in filter(names.__contains__, (*TURNS_FIELDS, *LIST_FIELDS)):
        name = names[ours]
        texts = [row[name] for row in rows if isinstance(row.get(name), str) and row[name].strip()]
        count = sum(_structure(text, ours) is not None for text in texts)
        odd = [text for text in texts if ours in TURNS_FIELDS and _TURNS_IN_TEXT.match(text) and not _is_json(text)]
        if texts and count == len(texts):
            packed.add(name)
        elif texts and 2 * count >= len(texts):
            raise UserError(
                f"{origin}: column {name} holds JSON text in {count} of its first {len(texts)} rows and other text in "
                "the others: write all rows alike"
            )
        elif odd and 2 * len(odd) >= len(texts):
            raise UserError(
                f"{origin}: column {name} holds chat turns as text that is not JSON: {short(odd[0])}; write lists of "
                "turns, or their JSON text"
            )
        elif ours == "prompt" and texts and all(map(_is_list_of_texts, texts)):
            raise UserError(
                f"{origin}: column {name} holds lists of texts as JSON text: {short(texts[0])}; write texts, or lists "
                "of chat turns"
            )
    return frozenset(packed)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _structure(text: str, ours: str) -> Any:
    """The turns or the list that the text of a cell holds as JSON, or None for other text."""
    if not text.lstrip().startswith("[" if ours in LIST_FIELDS else ("[", "{")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if ours in LIST_FIELDS:
        return value
    return value if _are_turns(value if isinstance(value, list) else [value]) else None


def _are_turns(value: Any) -> bool:
    """Whether a value is a list of records with the keys of turns."""
    needs = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, Mapping) and any(need <= turn.keys() for need in needs) for turn in value)
    )


def _is_list_of_texts(text: str) -> bool:
    if not text.lstrip().startswith("["):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return bool(value) and all(isinstance(item, str) for item in value)


def find_layout(found: Sequence[str], columns: Mapping[str, str]) -> Layout | None:
    """The first layout whose columns are present. Layouts with columns that the user maps come first."""

    def complete(layout: Layout, known: Mapping[str, str]) -> bool:
        return all(ours in known for ours in LAYOUTS[layout])

    named: Mapping[str, str] = {ours: columns.get(ours, ours) for ours in FIELDS if columns.get(ours, ours) in found}
    mapped = [layout for layout, fields in LAYOUTS.items() if any(ours in columns for ours in fields)]
    for layout in [*mapped, *LAYOUTS]:
        if complete(layout, named) or complete(layout, names_of(found, columns, layout)):
            return layout
    return None


def names_of(found: Sequence[str], columns: Mapping[str, str], layout: Layout) -> dict[str, str]:
    """Our name -> their column, for the fields that the layout reads.

    The prompt of a pair may be missing (implicit), so `detect_format` looks at the rows before it takes another column
    for the prompt. There `history` is something else: the turns before it, not the prompt.
    """
    names: dict[str, str] = {}
    for ours in READ[layout]:
        aliases = ALIASES[ours]
        if ours == "prompt" and layout == "pair":
            aliases = ("conversations", *(name for name in aliases if name != "history"))
        if ours == "input" and ours not in columns and names.get("prompt") != "instruction":
            continue
        candidates = [columns[ours]] if ours in columns else [ours, *aliases]
        if ours.endswith("_b") and f"{ours[:-1]}a" in names and ours not in columns:
            first = names[f"{ours[:-1]}a"]  # take the alias at the same place of the list as the one of the first
            place = (f"{ours[:-1]}a", *ALIASES[f"{ours[:-1]}a"])
            candidates = [(ours, *ALIASES[ours])[place.index(first)]] if first in place else candidates
        theirs = next((name for name in candidates if name in found), None)
        if theirs is not None:
            names[ours] = theirs
    if layout == "pair" and "votes" not in columns:
        names.pop("votes", None)  # published votes refer to the order before chosen and rejected were decided
    if "weight" not in columns:
        names.pop("weight", None)  # what a column of this name means is not known unless the user maps it
    return names


def attribute_columns(attributes: Sequence[str], columns: Mapping[str, str]) -> list[str]:
    """The columns that may hold these attributes, in any layout."""
    tops = [columns.get(attribute, attribute).split(".")[0] for attribute in attributes]
    return [top + side for top in tops for side in ("", *(side for both in SIDES.values() for side in both))]


def _attribute(rows: Sequence[Mapping[str, Any]], format: RowFormat, theirs: str) -> str:
    """Where the rows have an attribute: `theirs` (with the dots of nested records), or "" if they do not have it."""
    tops = {theirs.split(".")[0] + side for side in ("", *SIDES.get(format.layout, ()))}
    for row in rows:
        items = records(row.get(format.names["answers"])) if format.layout == "many" else []
        holders = [row, *(item for item in items or [] if isinstance(item, Mapping))]
        if any(tops & holder.keys() for holder in holders):
            return theirs
    return ""


def attribute_values(row: Mapping[str, Any], format: RowFormat, theirs: str) -> list[Any]:
    """The cells of an attribute for each answer of a row; None where it is missing.

    One answer per row: column `theirs`. Two answers: `theirs`_chosen and _rejected, or _a and _b. A list of answers:
    the key `theirs` of their records, or else a list in the column `theirs`. Dots lead into nested records.
    """
    if format.layout == "single":
        return [_nested(row, theirs)]
    if format.layout in SIDES:
        return [_nested(row, theirs + side) for side in SIDES[format.layout]]
    answers = records(row.get(format.names["answers"]))
    answers = answers if isinstance(answers, list) else []
    listed_values = _nested(row, theirs)
    if isinstance(listed_values, list) and len(listed_values) == len(answers):
        return listed_values
    return [_nested(answer, theirs) if isinstance(answer, Mapping) else None for answer in answers]


def _nested(record: Mapping[str, Any], path: str) -> Any:
    value: Any = record.get(path)
    if value is None and "." in path:
        value = record
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    return None if value in ("", "N/A") else value


def needed_columns(found: Sequence[str], columns: Mapping[str, str]) -> list[str]:
    """The columns that a comparison reads. All columns if no layout is complete, so that the error can list them."""
    layout = find_layout(found, columns)
    return [*found] if layout is None else [*dict.fromkeys(names_of(found, columns, layout).values())]


def _many(
    rows: Sequence[Mapping[str, Any]],
    names: dict[str, str],
    columns: Mapping[str, str],
    origin: str,
    key: str,
    need_margin: bool,
) -> RowFormat:
    """The format of lists of answers: texts, conversations, or records with one of them and maybe a rank or score."""
    name = names["answers"]
    lists = [records(row[name]) for row in rows if row.get(name) is not None]
    answers = next((found for found in lists if isinstance(found, list) and found), None)
    if answers is None:
        raise UserError(f"{origin}: {name} must be a list of answers; the first rows hold {short(lists[:1])}")
    first = answers[0]
    item_text = item_value = ""
    if isinstance(first, Mapping) and not {"role", "from"} & first.keys():
        item_text = next((part for part in ITEM_TEXT if part in first), "")
        if not item_text:
            known = ", ".join(ITEM_TEXT)
            raise UserError(f"{origin}: {name}[0] needs a text in one of {known}; found {listed([*first])}")
        first = first[item_text]
    kind = kind_of(first)
    if kind is None:
        raise UserError(f"{origin}: {name}[0] must be text or a list of chat turns, not {short(first)}")
    judged_by = next((by for by in (*(by for by in ITEM_VALUE if by in columns), *ITEM_VALUE) if by in names), "")
    if not judged_by and item_text:
        mapped = {by: (columns[by],) if by in columns else parts for by, parts in ITEM_VALUE.items()}
        options = [(by, part) for by, parts in mapped.items() for part in parts]
        judged_by, item_value = next(((by, part) for by, part in options if part in answers[0]), ("", ""))
    if not judged_by:
        where = f" or in {name}[].{{rank, score, ...}}" if item_text else ""
        raise UserError(
            f"{origin}: {name} is a list of answers, but nothing ranks or scores them: need ranks, scores or "
            f"probabilities{where}; "
            f"set {key}.columns={{scores: ...}} (our name: theirs)"
        )
    prompt = _kind(rows, names["prompt"], origin) if "prompt" in names else None
    head = [row.get(names["prompt"]) for row in rows] if prompt else [first]
    return RowFormat(
        names=names,
        prompt=prompt,
        answers=kind,  # type: ignore[arg-type]
        messages=False,
        transcript=kind == "text" and any(map(is_transcript, head)),
        margin="scores" if need_margin else None,
        layout="many",
        judged_by=judged_by,
        item_text=item_text,
        item_value=item_value,
    )


def _judge(
    rows: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    layout: Layout,
    columns: Mapping[str, str],
    origin: str,
    key: str,
) -> str:
    """The field that says which answer is better."""
    if layout == "single":
        return "score"
    order: tuple[str, ...] = ("probability", "votes")
    order += () if layout == "pair" else ("winner", "score_a", "preference")
    order = (*(by for by in order if by in columns), *order)
    by = next((by for by in order if by in names and (by != "score_a" or "score_b" in names)), "")
    if not by and layout == "two":
        found = listed([*dict.fromkeys(name for row in rows for name in row)])
        raise UserError(
            f"{origin}: two answers ({names['answer_a']}, {names['answer_b']}), but nothing says which is better: need "
            f"score_a and score_b, winner, preference, probability (of the first) or votes; found {found}; "
            f"set {key}.columns={{winner: ...}} (our name: theirs)"
        )
    return by


def _margin_kind(
    names: Mapping[str, str], layout: Layout, judged_by: str, origin: str, key: str, why: str
) -> Literal["margin", "scores"]:
    scores = SCORES.get(layout, ())
    if "margin" in names or judged_by == "preference" or (scores and {*scores} <= names.keys()):
        return "margin" if "margin" in names else "scores"
    raise UserError(
        f"{origin}: {why} needs a margin column, or {' and '.join(sorted(scores))}; set {key}.columns={{margin: ...}}"
        + (f" or {{preference: {names['preference']}}}, which then judges the rows" if "preference" in names else "")
        + (", or loss.margin=none" if why == "loss.margin=data" else "")
    )


def _kind(rows: Sequence[Mapping[str, Any]], name: str, origin: str) -> Literal["text", "turns"] | None:
    """The kind of a column in the first rows, None if it is always null. A later row that differs is an error."""
    first = next((row[name] for row in rows if row.get(name) is not None), None)
    if first is None:
        return None
    kind = kind_of(first)
    if kind is None:
        raise UserError(f"{origin}: {name} must be text or a list of chat turns, not {short(first)}")
    return kind  # type: ignore[return-value]


def _no_layout(found: Sequence[str], columns: Mapping[str, str], origin: str, key: str) -> str:
    names = {ours: columns.get(ours, ours) for ours in ("chosen", "rejected") if columns.get(ours, ours) in found}
    missing = [ours for ours in ("chosen", "rejected") if ours not in names]
    spare = [name for name in found if name not in names.values() and name not in ALIASES and name != "prompt"]
    example = ", ".join(f"{ours}: {name}" for ours, name in zip(missing, [*spare, "...", "..."], strict=False))
    return (
        f"{origin}: need chosen and rejected; found {listed(found)}; "
        f"set {key}.columns={{{example}}} (our name: theirs). "
        "Also understood: answers with ranks or scores, answer_a and answer_b with what judges them, answer with score"
    )
