"""Every row format gives the same comparison; every deviation is an error with place, field and value."""

import gzip
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore.config import UserError
from rmcore.data.formats.comparison import Comparison, comparison_from_row, detect_format, has_empty_answer
from tests.harness.paths import SHARED, needs_shared
from tests.harness.schema_rows import SCHEMAS, schema_rows


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(
    row: dict[str, Any], *, text: bool = False, columns: dict[str, str] | None = None, **options: Any
) -> Comparison:
    format = detect_format([row], columns or {}, origin="f.jsonl", **options)
    return comparison_from_row(row, format, wants_text=text, source="label", where="f.jsonl:1")


SKY, BLUE, GREEN = user("What color is the sky?"), assistant("It is blue."), assistant("It is green.")
HH = "\n\nHuman: What color is the sky?\n\nAssistant:"
ONE_COMPARISON = {
    "explicit prompt, conversational": {"prompt": [SKY], "chosen": [BLUE], "rejected": [GREEN]},
    "implicit prompt, conversational": {"chosen": [SKY, BLUE], "rejected": [SKY, GREEN]},
    "explicit prompt, conversational; prompt as text": {
        "prompt": SKY["content"],
        "chosen": [SKY, BLUE],
        "rejected": [SKY, GREEN],
    },
    "explicit prompt, text": {"prompt": SKY["content"], "chosen": " It is blue.", "rejected": " It is green."},
    "explicit prompt, text; Human/Assistant transcripts": {
        "prompt": HH,
        "chosen": " It is blue. \n",
        "rejected": "  It is green.",
    },
    "implicit prompt, text; Human/Assistant transcripts": {
        "chosen": f"{HH} It is blue.",
        "rejected": f"{HH} It is green.",
    },
    "explicit prompt, text; prompt as turns in messages": {
        "prompt": "The sky's color?",
        "messages": [SKY],
        "chosen": "It is blue.",
        "rejected": "It is green.",
    },
}


@pytest.mark.parametrize("description", ONE_COMPARISON)
def test_each_format_gives_the_same_turns(description: str) -> None:
    row = ONE_COMPARISON[description]
    assert str(detect_format([row], {}, origin="x")) == description
    assert read(row) == Comparison(
        prompt=[SKY],
        answers=([BLUE], [GREEN]),
        pairs=((0, 1),),
        margin=(0.0,),
        weight=(1.0,),
        source="label",
        prompt_key="user: What color is the sky?",
    )


@pytest.mark.parametrize("extra", [{"answers": "x", "idx": 3, "chosen_ids": [1, 2]}, {}])
def test_other_shapes_that_hold_the_same_turns(extra: dict[str, Any]) -> None:
    expected = read(ONE_COMPARISON["explicit prompt, conversational"])
    repeated = {"prompt": [SKY], "chosen": [SKY, BLUE], "rejected": [SKY, GREEN]}
    answers_only = {"prompt": SKY["content"], "chosen": [BLUE], "rejected": [GREEN]}
    text_answers = {"prompt": [SKY], "chosen": "It is blue.", "rejected": "It is green."}
    more_keys = {"chosen": [{**SKY, "id": 1}, {**BLUE, "tool_calls": None}], "rejected": [SKY, GREEN]}
    for row in (repeated, answers_only, text_answers, more_keys):
        assert read({**row, **extra}) == expected


def test_text_is_kept_byte_for_byte() -> None:
    row = {"prompt": " The sky\n", "chosen": "  is blue. \n", "rejected": ""}
    comparison = read(row, text=True)
    assert (comparison.prompt, comparison.answers) == (" The sky\n", ("  is blue. \n", ""))
    assert comparison.prompt_key == " The sky\n"
    assert has_empty_answer(comparison) and has_empty_answer(read(row))
    assert not has_empty_answer(read({**row, "rejected": "red"}))


words = st.text(alphabet="ab \n", max_size=30)


@given(words, words, words)
def test_whole_texts_stay_whole(head: str, first: str, second: str) -> None:
    for start in ("", "\n\nHuman: x\n\nAssistant:"):
        row = {"chosen": start + head + first, "rejected": start + head + second}
        comparison = read(row, text=True)
        assert isinstance(comparison.prompt, str)
        assert tuple(comparison.prompt + str(answer) for answer in comparison.answers) == (
            row["chosen"],
            row["rejected"],
        )
        assert not start or comparison.prompt == start


def test_the_prompt_of_whole_texts_ends_between_words() -> None:
    comparison = read(
        {"chosen": "A long question about the sky is blue", "rejected": "A long question about the sky is black"},
        text=True,
    )
    assert comparison.prompt == comparison.prompt_key == "A long question about the sky is "
    by_chance = read({"chosen": "I think so", "rejected": "I doubt it"}, text=True)
    assert (by_chance.prompt, by_chance.prompt_key) == ("I ", "I think so")


def test_transcripts_of_several_rounds() -> None:
    start = "\n\nHuman: a\n\nstill a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    turns = [user("a\n\nstill a"), assistant("b"), user("c")]
    whole = read({"chosen": start + " d", "rejected": start + " e"})
    cut = read({"prompt": start, "chosen": " d", "rejected": " e"})
    assert whole == cut
    assert (whole.prompt, whole.answers) == (turns, ([assistant("d")], [assistant("e")]))
    # Dialogues that part ways earlier: the answers are what follows the last common turn.
    parted = read({"chosen": start + " d", "rejected": start.replace("b\n", "B\n") + " d"})
    assert parted.prompt == turns[:1]
    assert parted.answers == ([assistant("b"), user("c"), assistant("d")], [assistant("B"), user("c"), assistant("d")])
    # An answer with a cue of its own (16 such sides in 3,773 real rows) reads the same, whole or cut.
    odd = " d\n\nHuman: f\n\nAssistant: g"
    assert read({"chosen": start + odd, "rejected": start + " e"}) == read(
        {"prompt": start, "chosen": odd, "rejected": " e"}
    )


def test_equal_answers_keep_a_turn_each() -> None:
    comparison = read({"chosen": [SKY, BLUE], "rejected": [SKY, BLUE]})
    assert (comparison.prompt, comparison.answers) == ([SKY], ([BLUE], [BLUE]))


def test_one_joining_space_is_no_part_of_a_turn_but_indentation_is() -> None:
    row = {"prompt": "def f():\n", "chosen": "    return 1", "rejected": " x"}
    assert read(row).answers == ([assistant("    return 1")], [assistant("x")])


def test_columns_map_our_names_to_theirs() -> None:
    row = {"good": [SKY, BLUE], "bad": [SKY, GREEN], "set": "mine", "chosen": 3}
    columns = {"chosen": "good", "rejected": "bad", "source": "set"}
    comparison = read(row, columns=columns)
    assert comparison.answers == ([BLUE], [GREEN]) and comparison.source == "mine"


def test_source_of_a_row_falls_back_to_the_label() -> None:
    row = ONE_COMPARISON["explicit prompt, text"]
    assert [read({**row, "source": s}).source for s in ("wiki", None, "")] == ["wiki", "label", "label"]
    assert read({**row, "": "7"}).source == "label"  # a CSV file's nameless index column


def test_margins() -> None:
    row = {**ONE_COMPARISON["explicit prompt, text"], "score_chosen": 8.5, "score_rejected": 7}
    assert read(row).margin == (0.0,)  # loss.margin is not data: not even looked at
    assert read({**row, "score_chosen": None}).margin == (0.0,)
    assert read(row, need_margin=True).margin == (1.5,)
    assert read({**row, "margin": "2"}, need_margin=True).margin == (2.0,)  # as a CSV file has it
    for wrong in (None, "much", float("nan"), True, []):
        with pytest.raises(UserError, match=r"^f\.jsonl:1: score_rejected (is null|must be a finite number)"):
            read({**row, "score_rejected": wrong}, need_margin=True)
    with pytest.raises(UserError, match=r"f\.jsonl: loss\.margin=data needs a margin column.*data\.eval\[1\]\.columns"):
        read(ONE_COMPARISON["explicit prompt, text"], need_margin=True, key="data.eval[1]")


def test_wrong_columns() -> None:
    with pytest.raises(UserError) as error:
        read({"good": "a", "bad": "b"})
    assert str(error.value).startswith(
        "f.jsonl: need chosen and rejected; found good, bad; "
        "set data.train.columns={chosen: good, rejected: bad} (our name: theirs). Also understood: answers with "
    )
    with pytest.raises(UserError, match=r"found no columns"):
        detect_format([], {}, origin="f.jsonl")
    with pytest.raises(UserError, match=r"data\.train\.columns: unknown name 'choosen' \(did you mean chosen\?\)"):
        read({"good": "a", "rejected": "b"}, columns={"choosen": "good"})
    with pytest.raises(
        UserError, match=r"data\.train\.columns: chosen is mapped to 'god', but f\.jsonl has good, rejected"
    ):
        read({"good": "a", "rejected": "b"}, columns={"chosen": "god"})
    with pytest.raises(UserError, match=r"chosen must be text or a list of chat turns, not 5"):
        read({"chosen": 5, "rejected": "b"})
    with pytest.raises(UserError, match=r"chosen is null in each of the first 1 rows"):
        read({"chosen": None, "rejected": "b"})


TEXT = ONE_COMPARISON["explicit prompt, text"]
TURNS = ONE_COMPARISON["implicit prompt, conversational"]
WRONG_ROWS = [
    (TEXT, {"chosen": None}, r"chosen is null"),
    (TEXT, {"prompt": None}, r"prompt is null"),
    (TEXT, {"rejected": 7}, r"rejected must be text, as in the first rows, not 7"),
    (TEXT, {"rejected": [BLUE]}, r"rejected must be text, as in the first rows, not \[\{'role'"),
    (TURNS, {"rejected": "It is green."}, r"rejected must be a list of chat turns, as in the first rows, not 'It is"),
    (TURNS, {"rejected": []}, r"rejected must be a list of chat turns, as in the first rows, not \[\]"),
    (TURNS, {"chosen": [SKY, {"role": "assistant"}]}, r"chosen\[1\] needs a content that is text"),
    (TURNS, {"chosen": [SKY, {"role": "assistant", "content": None}]}, r"chosen\[1\] needs a content that is text"),
    (TURNS, {"chosen": [{"from": "zeus", "value": "hi"}]}, r"chosen\[0\]: unknown speaker 'zeus'; known: human, "),
    (TURNS, {"chosen": [{"from": "human", "text": "hi"}]}, r"chosen\[0\] needs a value that is text: \{'from'"),
    (TURNS, {"chosen": ["hi"]}, r"chosen\[0\] needs a role that is text: 'hi'"),
    (TURNS, {"prompt": "now a prompt"}, r"prompt was null in the first rows, and here is 'now a prompt'"),
    (
        ONE_COMPARISON["explicit prompt, text; prompt as turns in messages"],
        {"messages": [SKY, BLUE]},
        r"messages must be the prompt's turns, but it ends with an assistant's turn",
    ),
]


@pytest.mark.parametrize(("good", "change", "message"), WRONG_ROWS)
def test_a_wrong_row_is_named_with_place_field_and_value(good: dict, change: dict, message: str) -> None:
    first = {"prompt": None, **good} if "prompt" in change else good
    format = detect_format([first], {}, origin="f.jsonl")
    comparison_from_row(first, format, wants_text=False, source="x", where="f.jsonl:1")
    with pytest.raises(UserError, match=rf"^f\.jsonl:12: {message}") as error:
        comparison_from_row({**good, **change}, format, wants_text=False, source="x", where="f.jsonl:12")
    assert len(str(error.value)) < 300


def test_a_missing_field_and_a_long_value() -> None:
    format = detect_format([TEXT], {}, origin="f.jsonl")
    with pytest.raises(UserError, match=r"^f\.jsonl:3: rejected is missing; found prompt, chosen$"):
        comparison_from_row({"prompt": "a", "chosen": "b"}, format, wants_text=True, source="x", where="f.jsonl:3")
    with pytest.raises(UserError) as error:
        comparison_from_row({**TEXT, "chosen": ["x" * 9999]}, format, wants_text=True, source="x", where="f.jsonl:3")
    assert len(str(error.value)) < 200


def test_texts_that_have_no_turns_and_turns_that_have_no_text() -> None:
    with pytest.raises(
        UserError, match=r"^f\.jsonl:1: chosen and rejected are whole texts without turns.*set data\.template=none"
    ):
        read({"chosen": "The sky is blue.", "rejected": "The sky is green."})
    rows = [row for name, row in ONE_COMPARISON.items() if "conversational" in name]
    rows.append({"messages": [SKY], "chosen": "It is blue.", "rejected": "It is green."})  # its prompt has no text
    for row in rows:
        read(row)
        with pytest.raises(UserError, match=r"^f\.jsonl:1: data\.template=none needs texts"):
            read(row, text=True)


@pytest.mark.parametrize("name", SCHEMAS)
def test_published_schemas(name: str) -> None:
    rows = schema_rows(name, 50, seed=3)
    need_margin = name == "ultrafeedback_binarized"
    format = detect_format(rows[:20], {}, origin=name, need_margin=need_margin)
    margin = "; margin = score_chosen - score_rejected" if need_margin else ""
    assert str(format) == "explicit prompt, conversational; prompt as text" + margin
    for number, row in enumerate(rows):
        comparison = comparison_from_row(row, format, wants_text=False, source=name, where=f"{name} row {number + 1}")
        whole = [[*comparison.prompt, *answer] for answer in comparison.answers]
        assert whole == [row["chosen"], row["rejected"]]
        assert all(len(answer) == 1 for answer in comparison.answers)
        assert comparison.margin == ((row["score_chosen"] - row["score_rejected"]) if need_margin else 0.0,)
    assert schema_rows(name, 50, seed=3) == rows != schema_rows(name, 50, seed=4)


@needs_shared
def test_real_transcripts_parse_to_the_turns_published_with_them() -> None:
    empty = 0
    for name in ("hh_harmless_base", "hh_helpful_base"):
        with gzip.open(SHARED / "data" / "pairs" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        format = detect_format(rows[:20], {}, origin=name)
        raw = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
        raw_format = detect_format(raw[:20], {}, origin=name)
        assert str(raw_format) == "implicit prompt, text; Human/Assistant transcripts"
        for row, whole in zip(rows, raw, strict=True):
            given = comparison_from_row(row, format, wants_text=False, source=name, where="x")
            parsed = comparison_from_row(whole, raw_format, wants_text=False, source=row["source"], where="x")
            assert parsed.prompt == row["messages"] and parsed == given
            cut = {key: value for key, value in row.items() if key != "messages"}
            assert read(cut).prompt == row["messages"]
            empty += has_empty_answer(given)
            if "\n\nAssistant:" not in row["chosen"] + row["rejected"]:
                text = comparison_from_row(whole, raw_format, wants_text=True, source=name, where="x")
                assert (text.prompt, text.answers) == (row["prompt"], (row["chosen"], row["rejected"]))
    assert empty == 8


@needs_shared
def test_whole_texts_of_the_external_oracle() -> None:
    with gzip.open(SHARED / "oracle" / "rows160.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    format = detect_format(rows[:20], {}, origin="rows160")
    for row in rows:
        comparison = comparison_from_row(row, format, wants_text=True, source="x", where="x")
        assert [f"{comparison.prompt}{answer}" for answer in comparison.answers] == [row["chosen"], row["rejected"]]
        assert re.search(r"\n\nAssistant:$", str(comparison.prompt))
    assert len(rows) == 160
