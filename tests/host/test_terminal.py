"""Whatever data, models and templates contain, the terminal receives text and no commands."""

import io
import json
import unicodedata

import pytest

from rmcore.config import UserError
from rmcore.evaluation.samples import SampleRow
from rmcore.host.command import run_command
from rmcore.host.terminal import one_line, print_text, visible
from rmcore.inspect_data import main as inspect
from rmcore.report.content import Report
from rmcore.report.page import page

# What a terminal obeys or what reorders a line: C0 but newline and tab, DEL, C1, and the classes of the Unicode
# bidirectional algorithm that override, embed or isolate.
DANGEROUS = [chr(c) for c in [*range(9), *range(11, 32), *range(127, 160)]]
DANGEROUS += [c for c in map(chr, range(0x10000)) if unicodedata.bidirectional(c) in
              {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}]  # fmt: skip
DANGEROUS += ["\u2028", "\u2029"]


def is_clean(text: str) -> bool:
    return not set(DANGEROUS) & set(text)


def test_every_control_character_becomes_visible_and_all_else_stays() -> None:
    assert len(DANGEROUS) == 30 + 33 + 9 + 2
    for character in DANGEROUS:
        shown = visible(f"a{character}b")
        assert is_clean(shown) and len(shown) > 2 and shown[0] == "a" and shown[-1] == "b", repr(character)
    plain = "".join(c for c in map(chr, range(0x10000)) if c not in DANGEROUS and not "\ud800" <= c <= "\udfff")
    unseen = {chr(c) for c in range(0x206A, 0x2070)}  # deprecated formatting characters
    assert visible("".join(c for c in plain if c not in unseen)) == "".join(c for c in plain if c not in unseen)


def test_messages_of_commands_are_cleaned(capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join(DANGEROUS)

    def work() -> None:
        print_text(f"name {text}")
        raise UserError(f"rows.jsonl:1: {text} is wrong")

    assert run_command("rmcore score", work) == 2
    said = capsys.readouterr()
    assert is_clean(said.out + said.err) and said.out.startswith("name ") and "is wrong" in said.err
    assert one_line("a\n\x1b[2J" + "b" * 1000, 20) == "a \u241b[2Jbbbbbbbbbb ..."
    stream = io.StringIO()
    print_text("x\x9b2J", stream)
    assert stream.getvalue() == "x\\x9b2J\n"


def test_a_hostile_column_name_reaches_the_terminal_as_text(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"promt\x1b]0;owned\x07\x9b2J\u202e": "a", "x": 1}) + "\n", encoding="utf-8")
    assert (
        inspect(
            [
                "model.name=synthetic",
                f"data.train.path={rows}",
                "data.max_tokens=64",
                "data.template=none",
                f"run.dir={tmp_path}",
            ]
        )
        == 2
    )
    said = capsys.readouterr()
    assert "promt" in said.err and is_clean(said.out + said.err), said.err


def test_the_report_shows_control_characters(tmp_path) -> None:
    text = "".join(DANGEROUS)
    report = Report(
        title=text, facts={text: text}, metrics={}, pairs=None, answers=None, drops={}, notes=[text],
        samples=[SampleRow(text, text, text, 1.0, 0.0)], config_yaml=text, environment={text: text},
    )  # fmt: skip
    html = page(report, {})
    assert is_clean(html) and html.count("\\u202e") >= 9
