"""Stops a run by each signal: it saves, exits with 3 and resumes to the same bits."""

import signal
from pathlib import Path

import pytest

from rmcore.checkpoint.directory import steps
from rmcore.training.signals import CAUGHT, Signals
from tests.harness.crash import Fault, run
from tests.harness.small_run import arguments, reference, same


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("signals")


# tests/faults/rows_run.py has SIGTERM and SIGINT, at several points of a run of two ranks.
@pytest.mark.parametrize("name", ["hup", "quit", "usr1", "usr2"])
def test_a_signal_saves_and_stops(folder: Path, name: str) -> None:
    whole = reference(folder, size=1)
    stopped = run(folder / name, arguments(folder), 1, [Fault("compute", name, 0, 3)])
    assert stopped.codes == [3], stopped.text
    assert stopped.status["status"] == "preempted" and f"SIG{name.upper()}" in stopped.status["reason"]
    assert steps(stopped.directory / "checkpoints")[0] == stopped.status["step"] == 3
    resumed = run(stopped.directory, arguments(folder), 1)
    assert resumed.codes == [0] and same(resumed, whole), resumed.text


def test_nohup_is_respected() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals().watched():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            caught = {number for number in CAUGHT if signal.getsignal(number) is not signal.SIG_IGN}
            assert caught == {*CAUGHT} - {signal.SIGHUP}
    finally:
        signal.signal(signal.SIGHUP, former)
