"""Checks lines, events, the console and the status file, and that a resumed run repeats none of them."""

import io
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rmcore.config import Config, UserError, load_config
from rmcore.evaluation.samples import SampleRow
from rmcore.host.files import write_text_atomically
from rmcore.parallel.world import World
from rmcore.tracking.console import Screen
from rmcore.tracking.moment import Moment
from rmcore.tracking.sinks import JsonLines
from rmcore.tracking.status import write_status
from rmcore.tracking.tracker import Tracker, start_tracker

MAIN = World(0, 2, 0, 2, torch.device("cpu"))
OTHER = World(1, 2, 1, 2, torch.device("cpu"))
TRAIN = {
    "train/rm/loss": 0.6931,
    "train/rm/accuracy": 0.5,
    "train/rm/lr": 3e-6,
    "grad_norm": 1.5,
    "tokens_per_second": 1e4,
}
EVAL = {"eval/rm/accuracy": 0.75, "eval/rm/loss": 0.5, "eval/rm/count": 8}
ROWS = [SampleRow(f"prompt {i} |", "yes\nindeed", "no [bold]", 1.25, -0.33333 + i) for i in range(12)]


def config(directory: Path, *overrides: str) -> Config:
    needed = ["model.name=synthetic", "model.init=random", "data.train.path=synthetic", f"run.dir={directory}"]
    return load_config(None, [*needed, *overrides])


def file_console(width: int = 200) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=False)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def moment(step: int) -> Moment:
    return Moment(step, 64 * step, step / 4)


def test_every_sink_gets_the_metrics(tmp_path: Path) -> None:
    console = file_console()
    with start_tracker(MAIN, config(tmp_path), steps=10, console=console) as tracker:
        tracker.step_done(1)
        tracker.log(moment(1), TRAIN)
        # Flushed at once: a run that is killed now has its line.
        assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "episode": 64, "epoch": 0.25, **TRAIN}]
        tracker.log(moment(2), {**TRAIN, "train/rm/loss": math.nan})
        tracker.log(moment(2), EVAL)
        tracker.log_samples(moment(2), ROWS)
        tracker.close()  # closing twice is harmless
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 2]
    assert metrics[1]["train/rm/loss"] is None, "NaN is no JSON"
    assert metrics[2]["eval/rm/accuracy"] == 0.75

    samples = lines(tmp_path / "samples.jsonl")
    assert len(samples) == 12 and samples[0]["chosen"] == "yes\nindeed"
    assert [row["correct"] for row in samples[:3]] == [True, True, False]

    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    loss = events.Scalars("train/rm/accuracy")
    assert [(event.step, round(event.value, 6)) for event in loss] == [(64, 0.5), (128, 0.5)], "x is the episode"
    assert [event.step for event in events.Scalars("eval/rm/accuracy")] == [128]
    text = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "path: synthetic" in text["config/text_summary"]
    table = text["eval/samples/text_summary"].splitlines()
    assert len(table) == 2 + 12 and table[2] == "| prompt 0 \\| | yes indeed | no \\[bold\\] | 1.2500 / -0.3333 | yes |"

    output = printed(console)
    assert "step 1/10 episode 64 epoch 0.250 loss 0.6931 accuracy 0.500 lr 3.00e-06" in output and "eta 0:" in output
    assert "evaluation at step 2: accuracy 0.7500 loss 0.5000 pairs 8" in output
    assert "\x1b" not in output, "a log file gets plain lines"


def test_the_samples_table_shows_texts_as_they_are() -> None:
    """Square brackets are not markup, an escape sequence does not reach the terminal, rewards have four decimals."""
    from rmcore.tracking.console import Screen

    console = file_console(width=80)
    long = "x" * 1000 + " the end"
    rows = [SampleRow("[red]q[/red]", "a\x1b[2Jb", long, 0.12345678, -2.0), *ROWS[:9]]
    Screen(console, 10, 0).samples(moment(3), rows, "rm")
    output = printed(console)
    assert "[red]q[/red]" in output and "no [bold]" in output
    assert "\x1b" not in output and "a\u241b[2Jb" in output
    assert "0.1235" in output and "-2.0000" in output
    assert max(map(len, output.splitlines())) == 160, "a log file has no edge at 80 columns"
    assert "the end" in output and "x" * 1000 not in output.replace("\n", "")
    assert all(f"prompt {i} |" in output for i in range(9))


def test_a_terminal_gets_a_progress_bar(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    with start_tracker(MAIN, config(tmp_path, "log.tensorboard=false"), steps=10, console=console) as tracker:
        tracker.step_done(3)
        tracker.log(moment(3), TRAIN)
        tracker.say("a line between")
    output = printed(console)
    assert "3/10" in output and "loss 0.6931 accuracy 0.500" in output and "eta" in output
    assert "a line between" in output and "step 3/10 episode" not in output


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    console = file_console()
    with start_tracker(OTHER, config(tmp_path / "run"), steps=10, console=console) as tracker:
        tracker.say("hello")
        tracker.step_done(1)
        tracker.log(moment(1), TRAIN)
        tracker.log_samples(moment(1), ROWS)
    write_status(OTHER, tmp_path / "run", "running")
    assert printed(console) == "" and list(tmp_path.iterdir()) == []


def test_a_resumed_run_repeats_no_line(tmp_path: Path) -> None:
    """Killed at step 3 with half a line written, resumed from the checkpoint of step 2."""
    run = config(tmp_path)
    with start_tracker(MAIN, run, steps=10, console=file_console()) as tracker:
        for step in (1, 2, 3):
            tracker.log(moment(step), {**TRAIN, "train/rm/loss": float(step)})
            tracker.log_samples(moment(step), ROWS[:1])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "epi')
    with start_tracker(MAIN, run, steps=10, start=moment(2), console=file_console()) as tracker:
        tracker.log(moment(3), {**TRAIN, "train/rm/loss": 33.0})
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["train/rm/loss"]) for line in metrics] == [(1, 1.0), (2, 2.0), (3, 33.0)]
    assert [row["step"] for row in lines(tmp_path / "samples.jsonl")] == [1, 2]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/rm/loss")] == [(64, 1.0), (128, 2.0), (192, 33.0)]


def test_a_fresh_run_keeps_the_logs_of_the_former(tmp_path: Path) -> None:
    for loss in (1.0, 2.0, 3.0):
        with start_tracker(MAIN, config(tmp_path), steps=10, console=file_console()) as tracker:
            tracker.log(moment(1), {"train/rm/loss": loss})
    names = {
        path: lines(tmp_path / path)[0]["train/rm/loss"]
        for path in ("metrics.jsonl", "metrics.1.jsonl", "metrics.2.jsonl")
    }
    assert names == {"metrics.1.jsonl": 1.0, "metrics.2.jsonl": 2.0, "metrics.jsonl": 3.0}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("train/rm/loss")] == [3.0]
    assert (tmp_path / "tensorboard.1").is_dir()


@pytest.mark.parametrize(
    ("key", "package"),
    [
        ("log.tensorboard", "torch.utils.tensorboard"),
        ("log.wandb", "wandb"),
        ("log.trackio", "trackio"),
        ("log.mlflow", "mlflow"),
    ],
)
def test_a_tracker_that_is_not_installed(
    key: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)  # importing it now raises ImportError
    with pytest.raises(UserError, match=rf"{key} is on .* not installed: pip install"):
        start_tracker(MAIN, config(tmp_path, f"{key}=true"), steps=1, console=file_console())


def test_the_status_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "run" / "run_status.json"
    write_status(MAIN, tmp_path / "run", "running")
    assert json.loads(path.read_text())["status"] == "running"
    write_status(
        MAIN, tmp_path / "run", "failed", step=3, episode=192, reason="no space", evaluation={"accuracy": math.inf}
    )
    status = json.loads(path.read_text())
    assert status.pop("time").endswith("Z")
    assert status == {"status": "failed", "step": 3, "episode": 192, "reason": "no space", "eval": {"accuracy": None}}
    assert [child.name for child in path.parent.iterdir()] == ["run_status.json"], "no temporary file is left"


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(path, "new \ud800")
    assert path.read_text() == "old" and [child.name for child in tmp_path.iterdir()] == ["file"]


class Broken:
    """A sink on a disk that is full."""

    def metrics(self, at: Moment, metrics: object) -> None:
        raise OSError(28, "No space left on device")

    def samples(self, at: Moment, rows: object, name: str) -> None: ...
    def close(self) -> None: ...


def test_a_sink_that_fails_is_reported_once_and_stops_no_other(tmp_path: Path) -> None:
    console = file_console()
    good = JsonLines(tmp_path, Moment(0, 0, 0.0))
    with Tracker([Broken(), good], Screen(console, 10, 0)) as tracker:
        for step in (1, 2, 3):
            tracker.log(moment(step), TRAIN)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    warnings = [line for line in printed(console).splitlines() if "warning" in line]
    assert warnings == [
        "warning: Broken: OSError: [Errno 28] No space left on device; the training continues",
        "warning: Broken failed 3 times",
    ]


@pytest.mark.parametrize("installed", [True, False])
def test_a_notebook_shows_a_bar_where_it_can_and_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    """Rich takes a notebook for no terminal; its bar needs ipywidgets there."""
    monkeypatch.setattr("rmcore.tracking.console.find_spec", lambda name: object() if installed else None)
    console = Console(file=io.StringIO(), force_jupyter=True, width=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package itself is not installed here
        screen = Screen(console, 10, 0)
        screen.metrics(moment(1), TRAIN)
        screen.close()
    assert (screen._progress is not None) == installed
