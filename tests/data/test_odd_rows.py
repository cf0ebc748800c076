"""Files with odd rows, drawn by a seed: every row is kept whole, dropped and counted, or refused in one message.

Each draw is a file of good rows of one format, of which one or two are made odd: keys of messages, nulls, parts, other
roles, JSON in cells, system texts, tools, encodings, wrapped documents. Every text that a draw writes has a marker of
its own. A marker that is neither in a kept text nor in a dropped row must be covered by a warning.
"""

import csv
import io
import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rmcore.config import UserError, load_config
from rmcore.data.prepare import prepare_data
from rmcore.data.synthetic import byte_tokenizer
from tests.harness.seed import random_seed

# Writes contents, reasoning, calls and tools, as the templates of tool-calling models do.
TOOLS = (
    "{% for t in tools or [] %}[tool {{ t | tojson }}]{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}<think>{{ m.reasoning_content }}{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
CUTS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endfor %}"
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] + eos_token }}{% endfor %}"
)
TEMPLATES = {"tools": TOOLS, "cuts": CUTS, "strict": STRICT, "simple_chat": "", "zephyr": "", "none": ""}


class Draw:
    """One file and its template, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.markers = 0
        self.template = self.random.choice([*TEMPLATES])
        kind = self.random.choice(["pair", "whole", "text", "alpaca", "many", "two", "single"])
        self.prompt = self.text()  # of all rows of scored answers, which are gathered by it
        self.rows = [self.row(kind) for _ in range(6)]
        for _ in range(self.random.choice([1, 1, 2])):
            change = self.random.choice(self.changes())
            for number in self.random.sample(range(6), self.random.choice([1, 2, 6])):
                change(self.rows[number])

    def text(self) -> str:
        """A text of two words that no other text contains."""
        self.markers += 1
        return f"mark{self.markers:03d}x said"

    def turn(self, role: str, **more: Any) -> dict[str, Any]:
        return {"role": role, "content": self.text(), **more}

    def row(self, kind: str) -> dict[str, Any]:
        user, answers = self.turn("user"), [self.turn("assistant"), self.turn("assistant")]
        texts = [turn["content"] for turn in answers]
        if kind == "pair":
            return {"prompt": [user], "chosen": answers[:1], "rejected": answers[1:]}
        if kind == "whole":
            return {"chosen": [user, answers[0]], "rejected": [user, answers[1]]}
        if kind == "alpaca":
            return {"instruction": user["content"], "input": self.text(), "chosen": texts[0], "rejected": texts[1]}
        if kind == "many":
            return {"prompt": user["content"], "answers": texts, "scores": [2, 1]}
        if kind == "two":
            return {"prompt": user["content"], "response_a": texts[0], "response_b": texts[1], "winner": "a"}
        if kind == "single":
            return {"prompt": self.prompt, "response": texts[0], "score": self.random.random()}
        return {"prompt": user["content"], "chosen": texts[0], "rejected": texts[1]}

    def changes(self) -> list[Any]:
        """Functions that make a row odd."""
        draw = self.random

        def turns_of(row: dict[str, Any]) -> list[dict[str, Any]]:
            lists = [value for value in row.values() if isinstance(value, list)]
            return [turn for turns in lists for turn in turns if isinstance(turn, dict)]

        def in_a_turn(change: Any) -> Any:
            def apply(row: dict[str, Any]) -> None:
                if found := turns_of(row):
                    change(draw.choice(found))

            return apply

        def calls() -> list[dict[str, Any]]:
            return [
                {"type": "function", "function": {"name": self.text().split()[0], "arguments": {"a": None, "b": 1}}}
            ]

        def rename(turn: dict[str, Any]) -> None:
            if "content" in turn:
                turn["from"], turn["value"] = turn.pop("role"), turn.pop("content")

        def parts(turn: dict[str, Any]) -> None:
            turn["content"] = [
                {"type": "text", "text": self.text(), "image": None},
                {"type": "text", "text": "more so"},
            ]

        def picture(turn: dict[str, Any]) -> None:
            turn["content"] = [{"type": "image_url", "image_url": {"url": "file:///x"}}]

        def to_json(row: dict[str, Any]) -> None:
            name = draw.choice([*row])
            row[name] = json.dumps(row[name]) if draw.random() < 0.8 else str(row[name])

        def odd_value(row: dict[str, Any]) -> None:
            odd = (None, "", [], {}, 7, True, [[]], [None], "\x00 \x1b[31m", "\u202e", [{"role": "user"}], {"role": []})
            row[draw.choice([*row])] = draw.choice(odd)

        def lose(row: dict[str, Any]) -> None:
            row.pop(draw.choice([*row]))

        def deep(row: dict[str, Any]) -> None:
            inner: Any = self.text()
            for _ in range(draw.choice([5, 300])):
                inner = {"a": [inner]}
            row[draw.choice(["tools", "extra", *row])] = inner

        return [
            in_a_turn(lambda turn: turn.update(tool_calls=calls())),
            in_a_turn(lambda turn: turn.update(tool_calls=calls(), content=None)),
            in_a_turn(lambda turn: turn.update(tool_calls=json.dumps(calls()))),
            in_a_turn(lambda turn: turn.update(tool_calls="no JSON")),
            in_a_turn(lambda turn: turn.update(reasoning_content=self.text())),
            in_a_turn(lambda turn: turn.update(thinking=self.text(), id=3, weight=None)),
            in_a_turn(lambda turn: turn.update(content=f"<think>{self.text()}</think>{self.text()}")),
            in_a_turn(lambda turn: turn.update(role=draw.choice(["Human", "bot", "model", "function", "zeus", ""]))),
            in_a_turn(lambda turn: turn.update(note=self.text())),
            in_a_turn(lambda turn: turn.update(content=None)),
            in_a_turn(rename),
            in_a_turn(parts),
            in_a_turn(picture),
            to_json,
            odd_value,
            lose,
            deep,
            lambda row: row.update(system=self.text()),
            lambda row: row.update(system_prompt=[self.text()]),
            lambda row: row.update(tools=[{"type": "function", "function": {"name": self.text().split()[0]}}]),
            lambda row: row.update(tools=json.dumps([{"name": self.text().split()[0]}])),
            lambda row: row.update(tools="no JSON"),
            lambda row: row.update(documents=[{"title": self.text(), "text": self.text()}]),
            lambda row: row.update(chat_template_kwargs={"enable_thinking": False}),
            lambda row: row.update(chat_template_kwargs=draw.choice(["{}", "[]", [1], {"messages": []}])),
            lambda row: row.update(context=self.text()),
            lambda row: row.update(extra={"deep": [{"text": self.text()}]}),
        ]

    def write(self, folder: Path) -> Path:
        """The rows as a file of some kind and encoding; rows that no table holds become JSON lines."""
        kind = self.random.choice(
            ["jsonl", "jsonl", "json", "pretty", "wrapped", "parquet", "parquet", "csv", "utf-16"]
        )
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        if kind == "parquet":
            try:
                table = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in self.rows])
                pyarrow.parquet.write_table(table, folder / "rows.parquet")
                return folder / "rows.parquet"
            except (pyarrow.ArrowException, RecursionError):
                kind = "jsonl"
        if kind == "csv":
            text = io.StringIO()
            writer = csv.writer(text)
            writer.writerow(names)
            for row in self.rows:
                cells = [row.get(name, "") for name in names]
                writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
            (folder / "rows.csv").write_text(text.getvalue(), encoding="utf-8")
            return folder / "rows.csv"
        if kind in ("json", "pretty", "wrapped"):
            whole = {"version": "1", "data": self.rows} if kind == "wrapped" else self.rows
            (folder / "rows.json").write_text(json.dumps(whole, indent=2 if kind == "pretty" else None))
            return folder / "rows.json"
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        (folder / "rows.jsonl").write_text(lines, encoding="utf-16" if kind == "utf-16" else "utf-8")
        return folder / "rows.jsonl"


def outcome(seed: int, folder: Path) -> str:
    """`kept`, `dropped` or `refused`, after every check on one draw."""
    draw = Draw(seed)
    folder.mkdir()
    path = draw.write(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[draw.template] or None
    name = "tokenizer" if TEMPLATES[draw.template] else draw.template
    needed = ["model.name=synthetic", f"data.train.path={path}", f"data.cache={folder / 'cache'}", "run.evals=0"]
    config = load_config(None, [*needed, f"data.template={name}", "data.max_tokens=4000"])
    try:
        data = prepare_data(config, tokenizer, None)
    except UserError as error:
        message = str(error)
        assert "Traceback" not in message and len(message) < 1200 + 4 * len(str(folder)), message
        assert "rows" in message or "data." in message, message
        return "refused"
    report = data.train.report
    assert report["rows"] == 6 == report["kept"] + sum(report["dropped"].values()), report

    # The markers of texts that were read, or could have been: each is in a kept text, or a warning or a drop covers it.
    comparisons = [data.train.comparison(number) for number in range(len(data.train))]
    texts = [tokenizer.decode(one.text(answer)) for one in comparisons for answer in range(len(one.tails))]
    kept = "".join(texts)
    written = set(re.findall(r"mark\d+x", json.dumps(draw.rows)))
    lost = written - set(re.findall(r"mark\d+x", kept))
    assert not lost or report["dropped"] or data.warnings, (lost, draw.rows)
    return "dropped" if report["dropped"] else "kept"


def draws(count: int, folder: Path) -> dict[str, int]:
    first = random_seed()
    counts = {"kept": 0, "dropped": 0, "refused": 0}
    for seed in range(first, first + count):
        print(f"draw {seed}", flush=True)
        counts[outcome(seed, folder / str(seed))] += 1
    print(counts)
    return counts


def test_odd_rows_are_kept_counted_or_refused(tmp_path: Path) -> None:
    draws(30, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_odd_rows(tmp_path: Path) -> None:
    counts = draws(1000, tmp_path)
    assert min(counts.values()) > 3  # the draws reach every outcome
