"""Compares each template with hand-written text and with transformers' own renderer, on every real pair."""

import gzip
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rmcore.config import UserError
from rmcore.data.formats.comparison import Comparison, Turns, comparison_from_row, detect_format
from rmcore.data.tokens.templates import NAMED_TEMPLATES, TemplateRefused, load_template
from tests.harness.paths import SHARED, needs_shared

CHAT = [
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "U2"},
    {"role": "assistant", "content": "A2"},
]
SYSTEM = {"role": "system", "content": "S"}

# name -> (prompt, full, what a system turn S puts in front of both)
EXPECTED = {
    "simple_concat_with_space": ("U1 A1 U2", "U1 A1 U2 A2</s>", "S "),
    "simple_concat_with_new_line": ("U1\nA1\nU2", "U1\nA1\nU2\nA2</s>", "S\n"),
    "simple_chat": (
        "User: U1\n\nAssistant: A1\n\nUser: U2",
        "User: U1\n\nAssistant: A1\n\nUser: U2\n\nAssistant: A2</s>",
        "System: S\n\n",
    ),
    "assistant_message_only": ("A1", "A1A2", ""),
    "zephyr": (
        "<|user|>\nU1</s>\n<|assistant|>\nA1</s>\n<|user|>\nU2</s>\n<|assistant|>\n",
        "<|user|>\nU1</s>\n<|assistant|>\nA1</s>\n<|user|>\nU2</s>\n<|assistant|>\nA2</s>\n",
        "<|system|>\nS</s>\n",
    ),
    "tulu": (
        "<|user|>\nU1\n<|assistant|>\nA1</s>\n<|user|>\nU2\n<|assistant|>\n",
        "<|user|>\nU1\n<|assistant|>\nA1</s>\n<|user|>\nU2\n<|assistant|>\nA2</s>",
        "<|system|>\nS\n",
    ),
}


def tokenizer_with(**special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **special)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer_with(bos_token="<s>", eos_token="</s>")


def comparison(prompt: Turns | str, *answers: Turns | str) -> Comparison:
    return Comparison(prompt, answers, "test", "key", pairs=((0, 1),), margin=(0.0,), weight=(1.0,))


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", EXPECTED)
def test_named_template_writes_the_text_of_the_reference(name: str, system: bool, tokenizer) -> None:
    prompt, full, front = EXPECTED[name]
    front = front if system else ""
    template = load_template(name, tokenizer)
    turns = [SYSTEM, *CHAT] if system else CHAT
    other = [{"role": "assistant", "content": "B2"}]
    assert template.render(comparison(turns[:-1], turns[-1:], other)) == (
        front + prompt,
        (front + full, front + full.replace("A2", "B2")),
    )
    assert not template.wants_text


def by_hand(name: str, turns: Turns, is_prompt: bool = False) -> str:
    """The templates again, in plain Python."""
    texts, eos = [turn["content"] for turn in turns], "" if is_prompt else "</s>"
    if name == "simple_concat_with_space":
        return " ".join(texts) + eos
    if name == "simple_concat_with_new_line":
        return "\n".join(texts) + eos
    if name == "simple_chat":
        return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns) + eos
    if name == "assistant_message_only":
        return "".join(turn["content"] for turn in turns if turn["role"] == "assistant")
    if name == "zephyr":
        return "".join(f"<|{t['role']}|>\n{t['content']}</s>\n" for t in turns) + "<|assistant|>\n" * is_prompt
    ended = [f"<|{t['role']}|>\n{t['content']}{'</s>' * (t['role'] == 'assistant')}" for t in turns]
    return "\n".join(ended) + ("\n<|assistant|>\n" if is_prompt else "\n" * (turns[-1]["role"] != "assistant"))


@pytest.mark.parametrize("name", EXPECTED)
def test_the_python_oracle_agrees_with_the_hand_written_text(name: str) -> None:
    assert (by_hand(name, CHAT[:-1], True), by_hand(name, CHAT)) == EXPECTED[name][:2]


def test_every_named_template_is_tested() -> None:
    assert set(EXPECTED) == set(NAMED_TEMPLATES)


@pytest.mark.parametrize("name", EXPECTED)
def test_exported_chat_template_renders_the_same_in_transformers(name: str, tokenizer) -> None:
    template = load_template(name, tokenizer)
    odd = [{"role": "user", "content": " <b>&'\"\n{{ x }} {% y %}é "}, {"role": "assistant", "content": ""}]
    for turns in (CHAT, [SYSTEM, *CHAT], odd):
        _, (full, _) = template.render(comparison(turns[:-1], turns[-1:], turns[-1:]))
        assert full == tokenizer.apply_chat_template(turns, chat_template=template.chat_template, tokenize=False)
        prompt, _ = template.render(comparison(turns[:-1], turns[-1:], turns[-1:]))
        assert prompt == tokenizer.apply_chat_template(
            turns[:-1], chat_template=template.chat_template, tokenize=False, add_generation_prompt=True
        )
    tokenizer.chat_template = template.chat_template
    assert load_template("tokenizer", tokenizer).render(comparison(CHAT[:-1], CHAT[-1:])) == template.render(
        comparison(CHAT[:-1], CHAT[-1:])
    )


def test_none_is_the_text_as_it_stands_and_eos(tokenizer) -> None:
    template = load_template("none", tokenizer)
    assert template.wants_text and template.chat_template is None
    assert template.render(comparison("a: ", " b\n", "")) == ("a: ", ("a:  b\n</s>", "a: </s>"))


def test_an_answer_of_several_turns_and_an_empty_prompt(tokenizer) -> None:
    template = load_template("simple_chat", tokenizer)
    assert template.render(comparison(CHAT[:1], CHAT[1:], CHAT[1:2])) == (
        "User: U1\n\nAssistant: A1\n\nUser: U2",
        ("User: U1\n\nAssistant: A1\n\nUser: U2\n\nAssistant: A2</s>", "User: U1\n\nAssistant: A1</s>"),
    )
    assert template.render(comparison([], CHAT[1:2], CHAT[3:])) == ("", ("Assistant: A1</s>", "Assistant: A2</s>"))


def test_texts_and_turns_are_not_mixed_up(tokenizer) -> None:
    with pytest.raises(ValueError, match="wants_text=False"):
        load_template("zephyr", tokenizer).render(comparison("text", "a", "b"))
    with pytest.raises(ValueError, match="wants_text=True"):
        load_template("none", tokenizer).render(comparison(CHAT[:-1], CHAT[-1:], CHAT[-1:]))


def test_unknown_name_is_an_error_with_a_suggestion(tokenizer) -> None:
    with pytest.raises(
        UserError, match=r"data\.template: unknown name 'zephir' \(did you mean zephyr\?\).*simple_chat"
    ):
        load_template("zephir", tokenizer)


def test_no_chat_template_names_the_key(tokenizer) -> None:
    with pytest.raises(UserError, match=r"data\.template=tokenizer: the tokenizer has no chat template"):
        load_template("tokenizer", tokenizer)


@pytest.mark.parametrize("name", ["none", "zephyr", "simple_chat"])
def test_a_tokenizer_without_eos_is_refused_where_eos_is_written(name: str) -> None:
    bare = tokenizer_with(pad_token="<pad>")
    with pytest.raises(UserError, match=f"{name} writes the EOS token, but the tokenizer has none"):
        load_template(name, bare)
    assert load_template("assistant_message_only", bare).render(comparison(CHAT[:-1], CHAT[-1:]))[1] == ("A1A2",)


def test_jinja_file_equals_transformers(tmp_path: Path, tokenizer) -> None:
    source = (
        "{{ bos_token }}{%- for m in messages %}\n  {%- if m.role == 'system' %}{% continue %}{% endif %}\n"
        "{% generation %}[{{ m.role | upper }}] {{ m.content | trim }} {{ {'a': '<é>'} | tojson }}{% endgeneration %}\n"
        "{% endfor %}\n{% if add_generation_prompt %}[ASSISTANT]{% endif %}{{ eos_token }}\n"
    )
    file = tmp_path / "mine.jinja"
    file.write_text(source, encoding="utf-8")
    template = load_template(str(file), tokenizer)
    turns = [SYSTEM, *CHAT]
    prompt, (full, _) = template.render(comparison(turns[:-1], turns[-1:], turns[-1:]))
    assert full == tokenizer.apply_chat_template(turns, chat_template=source, tokenize=False)
    assert prompt == tokenizer.apply_chat_template(
        turns[:-1], chat_template=source, tokenize=False, add_generation_prompt=True
    )
    assert "[USER] U1" in full and "<s>" in full and "S" not in full.replace("[ASSISTANT]", "").replace("[USER]", "")


def test_jinja_errors_carry_file_and_line(tmp_path: Path, tokenizer) -> None:
    file = tmp_path / "bad.jinja"
    file.write_text("{{ bos_token }}\n{% for m in messages %}\n{{ m. }}\n{% endfor %}", encoding="utf-8")
    with pytest.raises(UserError, match=r"bad\.jinja:3: "):
        load_template(str(file), tokenizer)
    file.write_text(
        "x\n{% if messages[0].role != 'system' %}\n{{ raise_exception('want a system turn') }}\n{% endif %}"
    )
    with pytest.raises(TemplateRefused, match=r"bad\.jinja:3: .*want a system turn"):
        load_template(str(file), tokenizer).render(comparison(CHAT[:-1], CHAT[-1:]))
    file.write_text("\n\n\n{{ 1 // 0 }}")
    with pytest.raises(TemplateRefused, match=r"bad\.jinja:4: ZeroDivisionError"):
        load_template(str(file), tokenizer).render(comparison(CHAT[:-1], CHAT[-1:]))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        load_template(str(file), tokenizer)
    with pytest.raises(UserError, match=r"cannot read .*absent\.jinja: No such file"):
        load_template(str(tmp_path / "absent.jinja"), tokenizer)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ messages[0].__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    ],
)
def test_templates_run_in_a_sandbox(attack: str, tmp_path: Path, tokenizer) -> None:
    file = tmp_path / "attack.jinja"
    file.write_text(attack, encoding="utf-8")
    turns = [dict(turn) for turn in CHAT]
    with pytest.raises(TemplateRefused, match=r"SecurityError|UndefinedError"):
        load_template(str(file), tokenizer).render(comparison(turns[:-1], turns[-1:]))
    assert turns == CHAT


def test_a_conversation_that_the_tokenizers_template_rejects(tokenizer) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    )
    template = load_template("tokenizer", tokenizer)
    with pytest.raises(TemplateRefused, match="no tools"):
        template.render(comparison([{"role": "tool", "content": "x"}], CHAT[-1:]))


def test_fingerprint_tells_templates_and_eos_apart(tokenizer, tmp_path: Path) -> None:
    same = tmp_path / "copy.jinja"
    same.write_text(NAMED_TEMPLATES["zephyr"], encoding="utf-8")
    names = [*NAMED_TEMPLATES, "none"]
    prints = {load_template(name, tokenizer).fingerprint for name in names}
    assert len(prints) == len(names)
    assert load_template(str(same), tokenizer).fingerprint == load_template("zephyr", tokenizer).fingerprint
    other = load_template("zephyr", tokenizer_with(bos_token="<s>", eos_token="<end>"))
    assert other.fingerprint not in prints


@needs_shared
@pytest.mark.parametrize(
    "file", sorted((SHARED / "data" / "pairs").glob("*.gz")), ids=lambda file: file.name.split(".")[0]
)
def test_every_real_pair_renders_under_every_template(file: Path, tokenizer) -> None:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    format = detect_format(rows[:20], {}, origin=file.name)
    templates = {name: load_template(name, tokenizer) for name in [*NAMED_TEMPLATES, "none"]}
    for number, row in enumerate(rows, start=1):
        where = f"{file.name}:{number}"
        text = comparison_from_row(row, format, wants_text=True, source="x", where=where)
        turns = comparison_from_row(row, format, wants_text=False, source="x", where=where)
        prompt, full = templates["none"].render(text)
        assert prompt == row["prompt"]
        assert full == tuple(row["prompt"] + row[side] + "</s>" for side in ("chosen", "rejected"))
        assert turns.prompt == row["messages"] and turns.source == row["source"]
        for name, template in templates.items():
            if name != "none":
                conversations = [[*turns.prompt, *answer] for answer in turns.answers]
                expected = by_hand(name, conversations[0][:-1], True), tuple(by_hand(name, c) for c in conversations)
                assert template.render(turns) == expected, (where, name)
