"""Tool calls, reasoning, variables and dates as templates render them, compared with transformers on the raw rows."""

import json
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers.utils.chat_template_utils
from transformers import PreTrainedTokenizerFast

from rmcore.config import UserError, load_config
from rmcore.data.formats.comparison import comparison_from_row, detect_format
from rmcore.data.prepare import prepare_data
from rmcore.data.reading.sources import load_sources
from rmcore.data.synthetic import byte_tokenizer
from rmcore.data.tokens.templates import NAMED_TEMPLATES, Template, TemplateRefused, load_template
from rmcore.hf_export.directory import exported_tokenizer

# In the manner of the templates of tool-calling models that think.
CALLS = """\
{%- if tools %}{{- '[tools]' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- eos_token }}{%- endif %}
{%- for message in messages %}
{{- '[' + message.role + (' ' + message.name if message.name is defined else '') + ']' }}
{%- if message.reasoning_content is string and enable_thinking is not false %}
{{- '<think>' + message.reasoning_content + '</think>' }}
{%- endif %}
{%- if message.content %}{{- message.content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '<call>' + call.function.name + (call.function.arguments | tojson) }}
{%- endfor %}
{{- eos_token }}
{%- endfor %}{%- if add_generation_prompt %}{{- '[assistant]' }}{%- endif %}"""
TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
DAY = "{{ 'Today: ' + strftime_now('%d %b %Y') }}\n" + TURNS
CLOCK = (
    "{%- if not date_string is defined %}"
    "{%- set date_string = strftime_now('%H:%M:%S.%f') if strftime_now is defined else '0' %}{%- endif %}"
    "{% macro head() %}{{ date_string }} {{ strftime_now('%Y') }}{% endmacro %}{{ head() }}" + TURNS
)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, **parameters: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


ASK = {"role": "user", "content": "How warm is it?"}
ROWS = [
    {
        "prompt": [{"role": "system", "content": "Use the tools."}, ASK],
        "chosen": [{"role": "assistant", "content": None, "tool_calls": [call("warmth", city="Rome")]},
                   {"role": "tool", "content": "20", "name": "warmth"},
                   {"role": "assistant", "content": "20 degrees.", "reasoning_content": "It is 20."}],
        "rejected": [{"role": "assistant", "content": "I cannot know.", "reasoning_content": "No."}],
        "tools": [tool("warmth", city="string"), tool("sum", a="number", b="number")],
    },
    {
        "prompt": [ASK],
        "chosen": [{"role": "assistant", "content": "So.", "tool_calls": [call("sum", a=1), call("warmth", b="x")]}],
        "rejected": [{"role": "assistant", "content": "", "tool_calls": [call("delete_all", sure=True)]}],
        "tools": [tool("sum", a="number")],
    },
    {"prompt": [ASK], "chosen": [{"role": "assistant", "content": "A."}],
     "rejected": [{"role": "assistant", "content": "B."}], "tools": []},
]  # fmt: skip


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    made = byte_tokenizer()
    made.chat_template = CALLS
    return made


def by_transformers(tokenizer: Any, row: dict[str, Any], side: str, **variables: Any) -> str:
    turns = [*row["prompt"], *row[side]]
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
    return str(tokenizer.apply_chat_template(turns, tools=row["tools"] or None, tokenize=False, **variables))


def rendered(row: Any, template: Template, head: list[Any] | None = None) -> tuple[str, ...]:
    format = detect_format(head or [row], {}, origin="x")
    reads = template.reads
    found = comparison_from_row(row, format, wants_text=template.wants_text, source="x", where="x", reads=reads)
    return template.render(found)[1]


def prepare(path: Path, tokenizer: Any, *more: str) -> Any:
    base = ["model.name=synthetic", f"data.train.path={path}", f"data.cache={path.parent / 'cache'}", "run.evals=0"]
    return prepare_data(load_config(None, [*base, "data.max_tokens=2000", *more]), tokenizer, None)


def texts_of(data: Any, tokenizer: Any) -> list[tuple[str, ...]]:
    items = [data.train.comparison(number) for number in range(len(data.train))]
    return [tuple(tokenizer.decode(item.text(answer)) for answer in range(len(item.tails))) for item in items]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text in cells"])
def test_rows_with_tools_render_as_transformers_renders_them(kind: str, tmp_path: Path, tokenizer) -> None:
    """A table fills the keys of all calls and tools with null, and HF data sets store what differs as JSON text."""
    path = tmp_path / ("rows.parquet" if kind == "parquet" else "rows.jsonl")
    if kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    else:
        rows = ROWS if kind == "jsonl" else [{name: json.dumps(value) for name, value in row.items()} for row in ROWS]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = prepare(path, tokenizer)
    wanted = [tuple(by_transformers(tokenizer, row, side) for side in ("chosen", "rejected")) for row in ROWS]
    assert texts_of(data, tokenizer) == wanted and not data.warnings
    assert (
        '[tools]{"type": "function", "function": {"name": "sum", "parameters": {"a": "number"}}}<eos>' in wanted[1][0]
    )
    assert '<call>delete_all{"sure": true}' in wanted[1][1]


def test_a_jinja_file_renders_the_same(tmp_path: Path, tokenizer) -> None:
    file = tmp_path / "calls.jinja"
    file.write_text(CALLS, encoding="utf-8")
    template = load_template(str(file), tokenizer)
    for row in ROWS:
        assert rendered(row, template) == tuple(
            by_transformers(tokenizer, row, side) for side in ("chosen", "rejected")
        )


@pytest.mark.parametrize("name", ["simple_chat", "zephyr"])
def test_a_template_that_needs_content_gets_an_empty_one(name: str, tokenizer) -> None:
    template = load_template(name, tokenizer)
    row = {"prompt": [ASK], "chosen": ROWS[0]["chosen"][:1], "rejected": [{"role": "assistant", "content": ""}]}
    chosen, rejected = rendered(row, template)
    assert chosen == rejected
    tokenizer.chat_template = NAMED_TEMPLATES[name]
    assert rendered(row, load_template("tokenizer", tokenizer)) == (chosen, rejected)
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(TemplateRefused, match="never"):
        rendered(row, load_template("tokenizer", tokenizer))


def test_variables_of_the_configuration_and_of_the_rows(tmp_path: Path, tokenizer) -> None:
    row = {"prompt": [ASK], "chosen": [{"role": "assistant", "content": "A.", "reasoning_content": "because"}],
           "rejected": [{"role": "assistant", "content": "B."}], "tools": None}  # fmt: skip
    rows = [row, {**row, "chat_template_kwargs": {"enable_thinking": True}}, {**row, "enable_thinking": True}]
    for path in (tmp_path / "a.jsonl", tmp_path / "b.parquet"):
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
        else:
            names = ("prompt", "chosen", "rejected", "chat_template_kwargs", "enable_thinking")
            datasets.Dataset.from_list([{name: each.get(name) for name in names} for each in rows]).to_parquet(
                str(path)
            )
        data = prepare(path, tokenizer, "data.chat_template_kwargs.enable_thinking=false")
        wanted = [by_transformers(tokenizer, row, "chosen", enable_thinking=on) for on in (False, True, True)]
        assert [chosen for chosen, _ in texts_of(data, tokenizer)] == wanted
        assert ("because" in wanted[0], "because" in wanted[1]) == (False, True)
    # The export has the same default, without the configuration.
    template = load_template("tokenizer", tokenizer, {"enable_thinking": False})
    export = exported_tokenizer(tokenizer, template)
    assert by_transformers(export, row, "chosen") == wanted[0]
    assert by_transformers(export, row, "chosen", enable_thinking=True) == wanted[1]
    again = load_template("tokenizer", export)
    assert rendered(rows[0], again)[0] == wanted[0] and rendered(rows[1], again)[0] == wanted[1]
    assert template.fingerprint != load_template("tokenizer", tokenizer).fingerprint


def test_a_variable_that_the_template_does_not_read_is_warned_of(tokenizer) -> None:
    for name in ("tokenizer", "simple_chat", "none"):
        template = load_template(name, tokenizer, {"enable_thinkng": False})
        assert template.warnings == (
            f"data.chat_template_kwargs.enable_thinkng has no effect: data.template={name} does not read it",
        )
        assert template.fingerprint == load_template(name, tokenizer).fingerprint
    with pytest.raises(UserError, match=r"data\.chat_template_kwargs: tools comes with the rows"):
        load_template("tokenizer", tokenizer, {"tools": []})


@pytest.mark.parametrize(
    "value", ["a 'b' \"c\" \\ {{ x }} %} é\n", True, None, -3, 1.5e-7, ["a", {"b": [None, False]}]]
)
def test_any_value_of_a_variable_reaches_the_export(value: Any, tokenizer) -> None:
    tokenizer.chat_template = "{{ v | tojson }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    export = exported_tokenizer(tokenizer, load_template("tokenizer", tokenizer, {"v": value}))
    assert export.apply_chat_template([ASK], tokenize=False) == tokenizer.apply_chat_template(
        [ASK], tokenize=False, v=value
    )


@pytest.fixture
def other_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of transformers' templates, 40 days and some hours later."""

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(days=40, hours=5, microseconds=3)

    transformers.utils.chat_template_utils._compile_jinja_template.cache_clear()
    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Later)


@pytest.mark.parametrize("source", [DAY, CLOCK])
@pytest.mark.parametrize("kind", ["tokenizer", "file"])
def test_a_template_that_reads_the_clock_is_rendered_as_of_one_day(
    source: str, kind: str, tmp_path: Path, tokenizer, other_day
) -> None:
    tokenizer.chat_template = source
    (tmp_path / "clock.jinja").write_text(source, encoding="utf-8")
    name = "tokenizer" if kind == "tokenizer" else str(tmp_path / "clock.jinja")
    row = {
        "prompt": [ASK],
        "chosen": [{"role": "assistant", "content": "A."}],
        "rejected": [{"role": "assistant", "content": "B."}],
    }
    template = load_template(name, tokenizer, today="2026-02-03")
    head = "Today: 03 Feb 2026\n" if source == DAY else "00:00:00.000000 2026"
    (chosen, _) = rendered(row, template)
    assert chosen.startswith(head) and template.date == "2026-02-03"
    assert "reads the clock" in template.notes[0] and "data.date=2026-02-03" in template.notes[0]
    assert template.fingerprint != load_template(name, tokenizer, today="2027-02-03").fingerprint
    assert load_template(name, tokenizer).date == date.today().isoformat()

    # The exported template has the date in it: another day, and other programs, change nothing.
    export = exported_tokenizer(tokenizer, template)
    export.save_pretrained(tmp_path / "model")
    for reloaded in (export, PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")):
        assert reloaded.apply_chat_template([ASK, *row["chosen"]], tokenize=False) == chosen
        again = load_template("tokenizer", reloaded)
        assert again.date is None and not again.notes
        assert rendered(row, again)[0] == chosen


def test_a_template_without_a_clock_has_no_date(tokenizer) -> None:
    for name in ("tokenizer", "zephyr", "none"):
        template = load_template(name, tokenizer, today="2026-02-03")
        assert template.date is None and not template.notes
        assert template.fingerprint == load_template(name, tokenizer).fingerprint


def test_a_tokenizer_with_several_templates(tokenizer) -> None:
    row = ROWS[2]
    tokenizer.chat_template = {"rag": CALLS, "tool_use": DAY}
    with pytest.raises(UserError, match=r"data\.template=tokenizer: the tokenizer has the chat templates rag, tool_use"
                                        r"; choose one: data\.template=tokenizer:rag$"):  # fmt: skip
        load_template("tokenizer", tokenizer)
    with pytest.raises(UserError, match=r"data\.template=tokenizer:rga: .* rag, tool_use"):
        load_template("tokenizer:rga", tokenizer)
    chosen = rendered(row, load_template("tokenizer:rag", tokenizer))
    tokenizer.chat_template = {"default": CALLS, "tool_use": DAY}
    assert rendered(row, load_template("tokenizer", tokenizer)) == chosen
    tokenizer.chat_template = CALLS
    assert rendered(row, load_template("tokenizer", tokenizer)) == chosen
    with pytest.raises(UserError, match="has a single chat template"):
        load_template("tokenizer:rag", tokenizer)


def each(body: str) -> str:
    return "{% for m in messages %}" + body + "{% endfor %}"


LOSES = {
    "cuts": (each("{{ m.content.split('</think>')[-1] }}"), {"the content of assistant turns"}),
    "drops": (each("{% if m.role != 'system' %}{{ m.content }}{% endif %}"), {"the content of system turns"}),
    "last only": ("{{ messages[-1].content }}", {"the content of system turns", "the content of user turns"}),
    "strips": (each("{{ m.content | trim | replace(' ', '  ') }}"), set()),
    "escapes": (each("{{ m.content | tojson }}"), set()),
    "no calls": (each("{{ m.content if m.tool_calls != 1 }}"), {"tool calls of assistant turns"}),
    "no tools": (each("{{ m.content if tools != 1 }}"), {"tools"}),
    "no reasoning": (each("{{ m.content if m.thinking != 1 }}"), {"the reasoning_content of assistant turns"}),
}


@pytest.mark.parametrize("kind", LOSES)
def test_what_a_template_does_not_write_is_counted_and_shown(kind: str, tmp_path: Path, tokenizer) -> None:
    source, lost = LOSES[kind]
    tokenizer.chat_template = source + "{{ eos_token }}"
    answer = {
        "role": "assistant",
        "content": '<think>"why"</think>\n\nYes, so.',
        "tool_calls": [call("warmth")],
        "reasoning_content": "x y",
    }
    row = {
        "prompt": [{"role": "system", "content": " Be brief.\n"}, ASK],
        "chosen": [answer],
        "rejected": [{**answer, "content": "No."}],
    }
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "tools": [tool("warmth")]}) + "\n" for _ in range(3)), encoding="utf-8")
    told = [line for line in prepare(path, tokenizer).warnings if "rendered text" in line]
    assert {line.split("contain ")[1].split(", the first")[0] for line in told} == lost
    assert all("in 3 rows" in line for line in told)


def test_what_an_older_version_put_into_the_cache_is_built_again(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    first = prepare(path, tokenizer)
    [meta] = (tmp_path / "cache/tokens").glob("*/meta.json")
    stored = json.loads(meta.read_text(encoding="utf-8"))
    del stored["reader"]
    meta.write_text(json.dumps(stored), encoding="utf-8")
    assert prepare(path, tokenizer).train.fingerprint == first.train.fingerprint
    assert json.loads(meta.read_text(encoding="utf-8"))["reader"] == 1


def test_columns_of_tables_stay_if_they_hold_text(tmp_path: Path) -> None:
    row = {"chosen": "a", "rejected": "b", "vector": [0.5] * 4, "effort": "low", "info": {"title": "A title", "n": 3}}
    rows = [{**row, "note": None if i < 30 else "Read this.", "id": f"ab{i}"} for i in range(40)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    config = load_config(None, ["model.name=synthetic", f"data.train.path={tmp_path / 'a.parquet'}"])
    [source] = load_sources(config.data.train, seed=1, limit=None, cache_dir=tmp_path, also={"effort"})
    assert {*source.head()[0]} == {"chosen", "rejected", "note", "info", "effort"}
