"""Trains while output cannot be written: the run completes, and its status is true."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from rmcore.tracking.status import read_status, record_status
from tests.harness.paths import ROOT
from tests.harness.small_run import arguments
from tests.harness.tmpfs import small_disk


def closed_pipe() -> int:
    """The writing end of a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def train(folder: Path, output: int | IO[bytes], **environment: str) -> int:
    """The exit code of a run whose evaluation shows an emoji; both standard streams go to `output`."""
    data = folder / "emoji.jsonl"
    row = {"prompt": "A face?", "chosen": " \U0001f600", "rejected": " no"}
    data.write_text(f"{json.dumps(row)}\n" * 4, encoding="utf-8")
    given = arguments(folder, "run.max_steps=2", "run.evals=1", f"data.eval.path={data}", f"run.dir={folder / 'run'}")
    command = [sys.executable, "-m", "rmcore.train", *given]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=settings, stdout=output, stderr=output, timeout=240).returncode


@pytest.mark.parametrize("broken", [closed_pipe, full_disk])
def test_a_training_survives_its_output(tmp_path: Path, broken: Callable[[], int]) -> None:
    output = broken()
    try:
        assert train(tmp_path, output) == 0
    finally:
        os.close(output)
    assert read_status(tmp_path / "run")["status"] == "completed"
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_size > 0


def test_a_training_survives_a_console_that_has_no_emoji(tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb") as log:
        code = train(tmp_path, log, PYTHONIOENCODING="gbk")
    text = (tmp_path / "log").read_text(encoding="gbk")
    assert code == 0 and "\\U0001f600" in text, text[-2000:]
    assert read_status(tmp_path / "run")["status"] == "completed"


def test_the_status_is_true_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        record_status(disk, "running")
        with open(disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError):
            while True:
                filler.write(bytes(1 << 12))
        record_status(disk, "failed", step=7, reason="no space left")
        found = read_status(disk)
        assert (found["status"], found["step"], found["reason"]) == ("failed", 7, "no space left")
    assert capsys.readouterr().err == ""


def test_a_disk_that_is_full_at_the_start_is_one_line(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        with open(disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError):
            while True:
                filler.write(bytes(1 << 12))
        command = [sys.executable, "-m", "rmcore.train", *arguments(tmp_path, f"run.dir={disk / 'run'}")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"rmcore.train: run.dir {disk / 'run'} cannot be written: No space left on device\n"


def test_a_status_that_cannot_be_written_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    record_status(tmp_path / "file" / "run", "running")
    assert "run_status.json cannot be written: " in capsys.readouterr().err
