"""Files of a run directory: what is appended or written there never reaches another file through a link or a pipe."""

import json
import os
from pathlib import Path

import pytest

from rmcore.config import UserError, load_config
from rmcore.host.files import regular_file, write_text_atomically
from rmcore.parallel.world import running_world
from rmcore.tracking.moment import Moment
from rmcore.tracking.sinks import JsonLines
from rmcore.tracking.status import record_status
from rmcore.training.run_directory import own_directory


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    file = tmp_path / "precious"
    file.write_text("here")
    return file


def plant(path: Path, kind: str, target: Path) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(target if kind == "link" else target.with_name("dangling"))


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
@pytest.mark.parametrize("mode", ["a", "a+", "r+", "r"])
def test_only_regular_files_are_opened(tmp_path: Path, precious: Path, kind: str, mode: str) -> None:
    path = tmp_path / "samples.jsonl"
    plant(path, kind, precious)
    with pytest.raises(OSError, match=r"symbolic link|not a regular file|No such device"):
        open(path, mode, opener=regular_file).close()
    assert precious.read_text() == "here" and not (tmp_path / "dangling").exists()
    with open(precious, "a", opener=regular_file) as file:
        file.write(" still")
    assert precious.read_text() == "here still"


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
@pytest.mark.parametrize("step", [0, 4])
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_logs_do_not_follow_links(tmp_path: Path, precious: Path, name: str, step: int, kind: str) -> None:
    """A new run moves the link aside, as it does a former log; a resumed one refuses it."""
    run = tmp_path / "run"
    run.mkdir()
    plant(run / name, kind, precious)
    if step:
        with pytest.raises(UserError, match=rf"run\.dir {run}: {name} is (a symbolic link|not a regular file)"):
            JsonLines(run, Moment(step, 8, 0.5))
    else:
        lines = JsonLines(run, Moment(0, 0, 0.0))
        lines.metrics(Moment(1, 8, 0.5), {"loss": 1.0})
        lines.close()
        assert json.loads((run / "metrics.jsonl").read_text())["loss"] == 1.0 and not (run / name).is_symlink()
        assert os.path.lexists(run / name.replace(".", ".1."))
    assert precious.read_text() == "here" and not (tmp_path / "dangling").exists()


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
def test_the_lock_is_no_link(tmp_path: Path, precious: Path, kind: str) -> None:
    plant(tmp_path / ".lock", kind, precious)
    config = load_config(
        None, ["model.name=synthetic", "model.init=random", "data.train.path=synthetic", f"run.dir={tmp_path}"]
    )
    with (
        running_world() as world,
        pytest.raises(UserError, match=r"cannot be written: \.lock is (a symbolic link|not a regular file)"),
        own_directory(config, world),
    ):
        raise AssertionError
    assert precious.read_text() == "here" and not (tmp_path / "dangling").exists()


def test_a_link_with_the_name_of_the_temporary_file_is_not_written_through(tmp_path: Path, precious: Path) -> None:
    (tmp_path / f".a.json.{os.getpid()}").symlink_to(precious)
    write_text_atomically(tmp_path / "a.json", "{}")
    assert precious.read_text() == "here" and (tmp_path / "a.json").read_text() == "{}"


def test_a_status_is_not_written_through_a_link_on_a_full_disk(
    tmp_path: Path, precious: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rmcore.tracking.status.write_text_atomically", full)
    (tmp_path / "run_status.json").symlink_to(precious)
    record_status(tmp_path, "failed")
    assert precious.read_text() == "here" and "cannot be written" in capsys.readouterr().err
