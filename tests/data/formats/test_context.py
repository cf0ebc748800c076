"""System texts, tools, documents, template variables, Alpaca's columns, JSON in cells; columns that are not read."""

import json
from typing import Any

import pytest

from rmcore.config import UserError
from rmcore.data.formats.comparison import Comparison, comparison_from_row, detect_format
from rmcore.data.formats.turns import EVERYTHING, TemplateReads

ASK, YES, NO = ({"role": role, "content": text} for role, text in
                (("user", "Is it so?"), ("assistant", "Yes, it is."), ("assistant", "No, it is not.")))  # fmt: skip
TURNS = {"prompt": [ASK], "chosen": [YES], "rejected": [NO]}
TEXT = {"prompt": ASK["content"], "chosen": YES["content"], "rejected": NO["content"]}
WHOLE = {"chosen": [ASK, YES], "rejected": [ASK, NO]}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"city": {"type": "string"}}}}
KNOWS = TemplateReads(frozenset({"role", "content"}), frozenset(), frozenset({"tools", "enable_thinking", "effort"}))


def read(
    row: dict[str, Any], *, text: bool = False, reads: TemplateReads = EVERYTHING, first: Any = None, **columns: str
) -> Comparison:
    format = detect_format(first or [row], columns, origin="f.jsonl")
    return comparison_from_row(row, format, wants_text=text, source="x", where="f.jsonl:1", reads=reads)


@pytest.mark.parametrize("row", [TURNS, TEXT, WHOLE])
def test_a_system_column_is_the_first_turn(row: dict[str, Any]) -> None:
    system = {"role": "system", "content": "Be brief."}
    for name in ("system", "system_prompt", "system_message"):
        assert read({**row, name: "Be brief."}).prompt == [system, ASK]
    assert read({**row, "system": None}) == read({**row, "system": " "}) == read(row)
    as_turns = read({"prompt": [system, ASK], "chosen": [YES], "rejected": [NO]})
    assert read({**row, "system": "Be brief."}) == as_turns  # also in what identifies the prompt
    with pytest.raises(UserError, match=r"^f\.jsonl:1: system must be text"):
        read({**row, "system": 7})


def test_a_system_turn_of_the_conversation_comes_first() -> None:
    row = {**TURNS, "prompt": [{"role": "system", "content": "Be brief."}, ASK]}
    assert read({**row, "system": "Be brief.\n"}) == read(row) and not read({**row, "system": "Be brief."}).unread
    other = read({**row, "system": "Be long."})
    assert other == read(row)
    assert other.unread == {"column system (the conversations have other system turns)"}


def test_tools_reach_the_template_as_records() -> None:
    filled = {
        **TOOL,
        "function": {**TOOL["function"], "strict": None, "parameters": {"city": {"type": "string"}, "x": None}},
    }
    for tools in ([TOOL], TOOL, json.dumps([TOOL]), [json.dumps(TOOL)], [filled]):
        found = read({**TURNS, "tools": tools})
        assert found.variables == {"tools": [TOOL]} and found.prompt == [ASK]
    for none in (None, [], "", "[]"):
        assert read({**TURNS, "tools": none}) == read(TURNS)
    assert read({**TURNS, "tools": [TOOL]}).prompt_key != read(TURNS).prompt_key
    assert read({**TURNS, "documents": [{"title": "T", "text": "t"}]}).variables["documents"] == [
        {"title": "T", "text": "t"}
    ]
    for wrong in ("look_up()", 7, [7], '["look_up"]'):
        with pytest.raises(UserError, match=r"^f\.jsonl:1: tools(\[0\])? must be "):
            read({**TURNS, "tools": wrong})
    plain = TemplateReads(frozenset({"role", "content"}), frozenset(), frozenset())
    assert read({**TURNS, "tools": [TOOL]}, reads=plain).unread == {"column tools (the template does not read it)"}


def test_variables_of_the_template_come_from_a_record_or_from_columns() -> None:
    both = {"enable_thinking": False, "effort": "high"}
    for given in (both, json.dumps(both), {**both, "other": None}):
        found = read({**TURNS, "chat_template_kwargs": given}, reads=KNOWS)
        assert found.variables == both and not found.unread
    row = {**TURNS, "enable_thinking": True, "effort": "two words", "chat_template_kwargs": {"enable_thinking": False}}
    assert read(row, reads=KNOWS).variables == {"enable_thinking": False}  # and `effort` is not a word
    assert read({**TURNS, "enable_thinking": True, "effort": "low"}, reads=KNOWS).variables == {
        "effort": "low", "enable_thinking": True
    }  # fmt: skip
    unknown = read({**TURNS, "chat_template_kwargs": {"thinkng": True}}, reads=KNOWS)
    assert unknown.unread == {"chat_template_kwargs.thinkng (the template does not read it)"}
    for wrong in ("on", [1], {"messages": []}, {"tools": []}, {"chat_template": "x"}):
        with pytest.raises(UserError, match=r"^f\.jsonl:1: chat_template_kwargs must be "):
            read({**TURNS, "chat_template_kwargs": wrong}, reads=KNOWS)


@pytest.mark.parametrize("name", ["instruction", "question", "query", "input"])
def test_a_pair_may_call_its_prompt_otherwise(name: str) -> None:
    row = {name: "Is it so?", "chosen": "Yes, it is.", "rejected": "No, it is not."}
    assert read(row) == read(TEXT)
    assert read({name: "Is it so?", "chosen": [YES], "rejected": [NO]}) == read(TEXT)
    assert read({**row, name: [ASK]}) == read({**row, name: json.dumps([ASK])}) == read(TEXT)
    assert read(row, text=True).prompt == "Is it so?"
    # Whole texts that contain the question already have their prompt.
    whole = {name: "Is it so?", "chosen": "Q: Is it so? A: Yes", "rejected": "Q: Is it so? A: No"}
    assert read(whole, text=True).answers == read({**whole, name: ""}, text=True).answers == ("Yes", "No")
    transcript = {
        name: "About it",
        "chosen": "\n\nHuman: a\n\nAssistant: b",
        "rejected": "\n\nHuman: a\n\nAssistant: c",
    }
    assert read(transcript).prompt == [{"role": "user", "content": "a"}]


def test_alpaca_has_the_prompt_in_two_parts() -> None:
    row = {"instruction": "Translate.", "input": "Guten Tag", "chosen": "Good day", "rejected": "Goodbye"}
    joined = [{"role": "user", "content": "Translate.\nGuten Tag"}]
    assert read(row).prompt == joined and not read(row).unread
    assert (
        read({**row, "input": ""}).prompt
        == read({**row, "input": None}).prompt
        == [{"role": "user", "content": "Translate."}]
    )
    two = {"instruction": "Translate.", "input": "Guten Tag", "response_a": "Hi", "response_b": "Bye", "winner": "a"}
    one = {"instruction": "Translate.", "input": "Guten Tag", "output": "Hi", "score": 1}
    assert read(two).prompt == read(one).prompt == joined
    own = read({"prompt": "Translate this.", "input": "Guten Tag", "chosen": "Good day", "rejected": "Goodbye"})
    assert own.prompt == [{"role": "user", "content": "Translate this."}] and own.unread == {"column input"}


def test_turns_and_lists_in_cells_are_parsed() -> None:
    cells = {name: json.dumps(turns) for name, turns in TURNS.items()}
    assert read(cells) == read(TURNS) and "JSON text in chosen, prompt, rejected" in str(
        detect_format([cells], {}, origin="x")
    )
    assert read({**TEXT, "chosen": json.dumps([ASK, YES]), "rejected": json.dumps([ASK, NO])}) == read(TEXT)
    assert read({"prompt": "Is it so?", "answers": json.dumps(["Yes.", "No."]), "scores": "[2, 1]"}).pairs == ((0, 1),)
    answers = json.dumps([{"text": "Yes.", "rank": 1}, {"text": "No.", "rank": 2}])
    assert read({"prompt": "Is it so?", "answers": answers}).pairs == ((0, 1),)
    with pytest.raises(UserError, match=r"^f\.jsonl:1: chosen must be JSON text, not 'Yes\.'"):
        read({**cells, "chosen": "Yes."}, first=[cells])
    with pytest.raises(UserError, match=r"data\.template=none needs texts, but the rows hold chat turns"):
        read(cells, text=True)


def test_text_that_happens_to_be_json_stays_text() -> None:
    for answer in ('{"a": 1}', "[1, 2]", '["x"]', '[{"role": "engineer"}]', "[not JSON", "[", "{"):
        row = {**TEXT, "chosen": answer}
        assert read(row).answers[0] == [{"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ([json.dumps([YES]), "Yes, it is."], "column chosen holds JSON text in 1 of its first 2 rows and other text"),
        ([str([YES])] * 2, "column chosen holds chat turns as text that is not JSON: "),
        ([json.dumps([YES])[:-5]] * 2, "column chosen holds chat turns as text that is not JSON: "),
    ],
)
def test_cells_that_cannot_be_parsed_are_refused(first: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^f.jsonl: {message}"):
        detect_format([{**TEXT, "chosen": cell} for cell in first], {}, origin="f.jsonl")
    with pytest.raises(UserError, match="column prompt holds lists of texts as JSON text"):
        detect_format([{**TEXT, "prompt": '["Is it so?", "And this?"]'}], {}, origin="f.jsonl")


def test_columns_with_content_that_is_nowhere_read_are_reported() -> None:
    more = {
        "context": "The sky is blue.",
        "tags": ["long", "hard one"],
        "id": "ab-12",
        "n": 3,
        "model": "gpt-4",
        "date": "2025-01-01 10:00",
    }
    for row in (TURNS, TEXT, WHOLE):
        assert read({**row, **more}).unread == {"column context", "column tags"}
    assert not read({**WHOLE, "messages": [ASK, YES], "prompt": "Is it so?", "full": "No, it is not."}).unread
    assert read({**WHOLE, "prompt": "What is so?"}).unread == {"column prompt"}
    assert read({**TEXT, "system": "Brief", "tools": [TOOL]}, text=True).unread == {"column system", "column tools"}
    listed = {"prompt": "Is it so?", "completions": [
        {"response": "Yes.", "overall_score": 2, "custom_system_prompt": "Be kind and brief.", "model": "m"},
        {"response": "No.", "overall_score": 1, "critique": None},
    ]}  # fmt: skip
    assert read(listed).unread == {"column completions[].custom_system_prompt"}


def test_deep_values_are_refused_in_one_line() -> None:
    deep: Any = "x y"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(UserError, match=r"^f\.jsonl:1: its lists and records are nested too deeply$"):
        read({**TURNS, "tools": deep, "extra": deep}, first=[TURNS])
