"""A chat template that reads the clock: a run keeps the day on which it began, also resumed, exported and scored."""

import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rmcore.checkpoint.changes import changes
from rmcore.config import UserError, load_config
from rmcore.data.synthetic import synthetic_rows
from rmcore.evaluation.trained import on_one_day
from rmcore.parallel.world import running_world
from tests.harness.paths import ROOT
from tests.harness.small_run import arguments

CLOCK = (
    "{{ strftime_now('%d %b %Y') }}\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ eos_token }}"
)
NEEDED = ["model.name=synthetic", "data.train.path=synthetic"]


def test_the_date_of_the_config_comes_first_then_that_of_the_run_then_today() -> None:
    with running_world() as world:
        found = [
            on_one_day(load_config(None, [*NEEDED, *more]), world, before).data.date
            for more, before in ((["data.date=2026-01-02"], "2026-01-01"), ([], "2026-01-01"), ([], None))
        ]
    assert found == ["2026-01-02", "2026-01-01", date.today().isoformat()]


def test_a_run_without_the_key_is_resumed_on_another_day() -> None:
    before = load_config(None, [*NEEDED, "data.date=2026-01-02"]).model_dump(mode="json")
    assert changes(before, load_config(None, NEEDED)) == []
    [change] = changes(before, load_config(None, [*NEEDED, "data.date=2026-01-03"]))
    assert str(change) == 'data.date: "2026-01-02" -> "2026-01-03"'
    with pytest.raises(UserError, match=r"data\.date: expected text.*got `2026-02-30`"):
        load_config(None, [*NEEDED, "data.date=2026-02-30"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_goes_on_the_next_day_and_its_export(tmp_path: Path) -> None:
    """Two time zones that lie 26 hours apart never have the same date."""

    def python(zone: str, *words: str) -> str:
        told = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=300,
                              env={**os.environ, "TZ": zone})  # fmt: skip
        assert told.returncode == 0, told.stdout + told.stderr
        return told.stdout

    template = tmp_path / "clock.jinja"
    template.write_text(CLOCK, encoding="utf-8")
    directory = tmp_path / "run"
    words = arguments(tmp_path, f"data.template={template}", f"run.dir={directory}", f"data.cache={tmp_path / 'cache'}")
    python("A+12", "rmcore.train", *words, "run.max_steps=2")
    [day] = [line for line in (directory / "config.yaml").read_text(encoding="utf-8").splitlines() if "  date:" in line]
    later = python("A-14", "rmcore.train", *words, "run.max_steps=4")
    assert "continuing at step 2" in later and day.split("'")[1] in later
    assert day in (directory / "config.yaml").read_text(encoding="utf-8")

    # `rmcore score` and plain transformers render the same text on both days.
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in synthetic_rows(4, 7, "test")), encoding="utf-8")
    scored = [python(zone, "rmcore.score", str(directory / "model"), str(rows), "-o", "-") for zone in ("A+12", "A-14")]
    assert scored[0] == scored[1] and '"rewards"' in scored[0]
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    year, month, number = day.split("'")[1].split("-")
    assert text.startswith(f"{number} {date(int(year), int(month), int(number)):%b} {year}\nuser: x\n")
