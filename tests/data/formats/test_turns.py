"""Chat turns are read whole: tool calls, reasoning, parts, other names of roles; what is left out is reported."""

import json
from typing import Any

import pytest

from rmcore.config import UserError
from rmcore.data.formats.turns import EVERYTHING, TemplateReads, TurnReader

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
WITHOUT_NULL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
PLAIN = TemplateReads(frozenset({"role", "content"}), frozenset({"user"}), frozenset())
READS_CALLS = TemplateReads(frozenset({"role", "content", "tool_calls", "name"}), frozenset({"function"}), frozenset())


def read(*turns: Any, reads: TemplateReads = EVERYTHING) -> tuple[list[dict[str, Any]], set[str]]:
    reader = TurnReader("f.jsonl:7", reads)
    return reader.turns(list(turns), "chosen"), reader.unread


def test_the_keys_that_the_template_reads_are_kept_and_the_others_reported() -> None:
    turn = {
        "role": "assistant",
        "content": "Yes.",
        "tool_calls": [CALL],
        "reasoning_content": "so",
        "id": "a b",
        "n": 3,
    }
    kept, unread = read(turn, reads=READS_CALLS)
    assert kept == [{"role": "assistant", "content": "Yes.", "tool_calls": [WITHOUT_NULL]}]
    assert unread == {f"message key {key} (the template does not read it)" for key in ("reasoning_content", "id")}
    assert read(turn, reads=PLAIN)[0] == [{"role": "assistant", "content": "Yes."}]
    assert list(read(turn)[0][0]) == ["role", "content", "tool_calls", "reasoning_content", "id"]  # n is no content


@pytest.mark.parametrize("empty", [None, [], {}])
def test_a_key_that_is_null_or_empty_is_absent(empty: Any) -> None:
    turn = {"role": "user", "content": "Hi", "tool_calls": empty, "name": None, "from": None, "value": None}
    assert read(turn) == ([{"role": "user", "content": "Hi"}], set())
    shared = {"role": None, "content": None, "from": "human", "value": "Hi"}  # the columns of a table of both forms
    assert read(shared) == ([{"role": "user", "content": "Hi"}], set())


def test_content_may_be_missing_next_to_tool_calls_and_only_there() -> None:
    for content in ({"content": None}, {}):
        assert read({"role": "assistant", **content, "tool_calls": [CALL]})[0] == [
            {"role": "assistant", "tool_calls": [WITHOUT_NULL]}
        ]
        with pytest.raises(UserError, match=r"^f\.jsonl:7: chosen\[0\] needs a content that is text"):
            read({"role": "assistant", **content, "id": 3, "tool_calls": []})


def test_tool_calls_may_be_json_text() -> None:
    wanted = [{"role": "assistant", "content": "", "tool_calls": [WITHOUT_NULL]}]
    for calls in ([CALL], CALL, json.dumps([CALL]), [json.dumps(CALL)], {key: [value] for key, value in CALL.items()}):
        assert read({"role": "assistant", "content": "", "tool_calls": calls})[0] == wanted
    for wrong in ("add(1)", "7", [7], 7):
        with pytest.raises(UserError, match=r"^f\.jsonl:7: chosen\[0\]\.tool_calls(\[0\])? must be "):
            read({"role": "assistant", "content": "", "tool_calls": wrong})


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "text", "text": "A b"}, {"type": "text", "text": " c"}],
        [{"type": "text", "text": "A b", "image_url": None}, " c"],
        {"type": ["text", "text"], "text": ["A b", " c"]},
        {"type": "text", "text": "A b c"},
        [{"type": "input_text", "text": "A b"}, {"text": " c"}],
    ],
)
def test_parts_of_text_are_joined(parts: Any) -> None:
    assert read({"role": "user", "content": parts})[0] == [{"role": "user", "content": "A b c"}]


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}, {"type": "image"}, 7]
)
def test_parts_that_are_not_text_are_refused(part: Any) -> None:
    with pytest.raises(UserError, match=r"^f\.jsonl:7: chosen\[0\]: content has a part .*rmcore reads text only$"):
        read({"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]})


def test_roles_of_published_data_become_those_of_templates() -> None:
    pairs = [("human", "user"), ("Bot", "assistant"), ("model", "assistant"), ("function", "tool"), ("AI", "assistant"),
             ("observation", "tool"), ("tool-response", "tool"), ("prompter", "user"), ("SYSTEM", "system"),
             ("developer", "developer"), ("critic", "critic")]  # fmt: skip
    turns, _ = read(*({"role": role, "content": "x"} for role, _ in pairs))
    assert [turn["role"] for turn in turns] == [usual for _, usual in pairs]
    # A role that the template knows by this name stays: GLM's templates write turns of `observation`.
    knows = TemplateReads(frozenset({"role", "content"}), frozenset({"observation"}), frozenset())
    turns, _ = read({"role": "observation", "content": "x"}, {"from": "observation", "value": "x"}, reads=knows)
    assert [turn["role"] for turn in turns] == ["observation", "tool"]
