"""How `rmcore score` and `rmcore serve` group texts, and which path they compute them by."""

import json
from typing import Any

import numpy as np
import pytest

from rmcore.config import UserError
from rmcore.data.formats.comparison import Comparison
from rmcore.data.synthetic import byte_tokenizer
from rmcore.data.tokens.templates import load_template
from rmcore.scoring.rows import comparison_of
from rmcore.scoring.scorer import Scorer, Text, grouped
from tests.harness.paths import SHARED, needs_shared


def test_groups_share_a_prompt_and_keep_to_the_budget():
    def text(head, tail, prompt):
        return Text(np.array([*range(head), *range(100, 100 + tail)], dtype=np.int32), prompt)

    three = [text(30, 20, "p"), text(30, 30, "p"), text(30, 10, "p")]
    assert [len(group) for group in grouped(three, 70, share=True)] == [3], "they share 40: 40 + 10 + 20 + 0"
    for number, one in enumerate(three):
        one.ids[30] = 200 + number
    assert [len(group) for group in grouped(three, 90, share=True)] == [3]  # 30 + 20 + 30 + 10
    assert [len(group) for group in grouped(three, 89, share=True)] == [2, 1]
    assert [len(group) for group in grouped(three, 110, share=False)] == [2, 1]
    assert [len(group) for group in grouped([*three, *three], 90, share=True)] == [3], "each text once"
    assert [len(group) for group in grouped([three[0], three[1]._replace(prompt="q")], 90, share=True)] == [1, 1]


@needs_shared
def test_one_choice_of_path_for_all_rows():
    """The first chunk decides, so that a resumed run computes as the stopped one."""
    scorer = Scorer(str(SHARED / "oracle" / "model"), ["data.template=none", "parallel.precision=fp32"])
    scorer.choose_path([({"text": "a b c"}, "")])
    assert scorer.path.startswith("attention shared")


ASK, ANSWER = {"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "Yes, it is."}
TOOLS = "{% for t in tools or [] %}[{{ t | tojson }}]{% endfor %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
TOOLS += "{% for c in m.tool_calls or [] %}<{{ c.function.name }}>{% endfor %}{{ eos_token }}{% endfor %}"
TOOL = {"type": "function", "function": {"name": "look_up"}}


def rendered(row: dict[str, Any]) -> Comparison:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOLS
    template = load_template("tokenizer", tokenizer)
    comparison, _ = comparison_of(row, template, "row 1")
    assert template.render(comparison)[1][0] == tokenizer.apply_chat_template(
        [*comparison.prompt, *comparison.answers[0]], tools=comparison.variables.get("tools"), tokenize=False
    )
    return comparison


@pytest.mark.parametrize("turns", [[ASK, ANSWER], json.dumps([ASK, ANSWER])])
def test_rows_of_turns_are_scored_with_their_tools(turns: Any) -> None:
    called = {**ANSWER, "content": None, "tool_calls": [TOOL]}
    for row in ({"messages": [ASK, called]}, {"prompt": [ASK], "answers": [[called], [ANSWER]]}):
        found = rendered({**row, "tools": json.dumps([TOOL]), "system": "Be brief."})
        assert found.variables == {"tools": [TOOL]} and found.prompt[0] == {"role": "system", "content": "Be brief."}
        assert found.answers[0][-1] == {"role": "assistant", "tool_calls": [TOOL]} and not found.unread
    assert rendered({"messages": turns}).answers == ([ANSWER],)
    assert rendered({"messages": [ASK, ANSWER], "prompt": "Is it so?"}).answers == ([ANSWER],)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "answer": 5}, "answer must be text or a list of chat turns, not 5"),
        ({"prompt": "a", "response": [{"role": "user"}]}, "response[0] needs a content that is text"),
        ({"messages": 5}, "messages must be text or a list of chat turns, not 5"),
        ({"prompt": "a", "responses": [5, "b"]}, "responses[0] must be text or a list of chat turns, not 5"),
        ({"prompt": "a", "answers": ["b", "c", [ANSWER]]}, "answers[2] must be text, as answers[0] is, not [{"),
        ({"prompt": "a", "answers": [[ANSWER], "b"]}, "answers[1] must be a list of chat turns, as answers[0] is, not"),
        ({"prompt": "a", "answers": [None, None]}, "answers[0] is null"),
        ({"prompt": "a", "chosen": "b", "rejected": 5}, "rejected must be text"),
        ({"prompt": 5, "answer": "b"}, "prompt must be text or a list of chat turns, not 5"),
    ],
)
def test_messages_use_the_keys_of_the_row(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        rendered(row)
    assert str(error.value).startswith(f"row 1: {message}")


def test_other_columns_of_a_row_are_no_labels_but_content() -> None:
    row = {
        "prompt": "Is it so?",
        "answers": ["Yes.", "No."],
        "scores": "none",
        "margin": "x",
        "probability": 7,
        "id": 3,
    }
    assert rendered(row).answers[1] == [{"role": "assistant", "content": "No."}] and not rendered(row).unread
    assert rendered({**row, "context": "It is late."}).unread == {"column context"}
    alpaca = {"instruction": "Is it so?", "input": "Look out.", "answer": "Yes."}
    assert rendered(alpaca).prompt == [{"role": "user", "content": "Is it so?\nLook out."}]
    question = {"question": "Is it so?", "completions": ["Is it so? Yes.", "No."]}
    assert rendered(question).prompt == [{"role": "user", "content": "Is it so?"}]
