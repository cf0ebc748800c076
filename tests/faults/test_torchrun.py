"""Faults that look different under a real torchrun: signals that it forwards, disks, and two jobs at once.

Restarts (row 29), the raced cache (row 30) and the lock (row 12) are in tests/faults/test_run.py, also under torchrun.
"""

import json
import os
import signal
from pathlib import Path

import pytest

from rmcore.checkpoint.directory import steps
from tests.harness.crash import Fault, outcome_of, run, torchrun
from tests.harness.small_run import arguments, reference, same, wait_for
from tests.harness.tmpfs import small_disk

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_sigterm_to_torchrun_saves_and_records_preempted(tmp_path: Path) -> None:
    """torchrun forwards the signal, waits, and exits with its own code 1; run_status.json has the true status."""
    slow = [Fault("compute", "slow", rank, 1, every=True) for rank in range(2)]
    job = torchrun(tmp_path / "run", arguments(tmp_path), 2, slow)
    wait_for(lambda: steps(tmp_path / "run" / "checkpoints"), job)
    job.send_signal(signal.SIGTERM)
    ended = outcome_of(job, tmp_path / "run")
    assert ended.seconds < 25, "before torchrun kills, 30 s after the signal"
    assert ended.status["status"] == "preempted" and ended.status["reason"] == "stopped by SIGTERM", ended.text
    assert ended.status["step"] == steps(tmp_path / "run" / "checkpoints")[0]
    resumed = run(tmp_path / "run", arguments(tmp_path), 2)
    assert resumed.codes == [0, 0] and same(resumed, reference(tmp_path)), resumed.text


def test_disk_full_and_read_only(tmp_path: Path) -> None:
    with small_disk(tmp_path / "full", int(3.6 * 4_346_880)) as disk:
        full = outcome_of(
            torchrun(disk / "run", arguments(tmp_path), 2, [Fault("save.open", "fill", 0, 2)]), disk / "run"
        )
        assert full.codes == [1] and "checkpoint step 4 failed on rank" in full.text, full.text
        assert full.text.count("rmcore.train:") == 1 and full.status["status"] == "failed"
        assert steps(disk / "run" / "checkpoints") == [2]
    with small_disk(tmp_path / "locked", 1 << 20, read_only=True) as disk:
        given = arguments(tmp_path, f"run.dir={disk}/run")
        refused = outcome_of(torchrun(tmp_path / "elsewhere", given, 2), tmp_path / "elsewhere")
        assert refused.codes == [1], "torchrun's own exit code"
        assert f"run.dir {disk}/run cannot be written: Read-only file system" in refused.text, refused.text
        assert "exitcode  : 2" in refused.text


def test_two_jobs_in_one_directory(tmp_path: Path) -> None:
    first = torchrun(tmp_path / "run", arguments(tmp_path), 2, [Fault("compute", "hang", 0, 5)])
    lock = tmp_path / "run" / ".lock"
    wait_for(lambda: lock.exists() and lock.read_text(encoding="utf-8"), first)
    holder = json.loads(lock.read_text(encoding="utf-8"))
    try:
        second = outcome_of(torchrun(tmp_path / "run", arguments(tmp_path), 2), tmp_path / "run")
    finally:
        os.kill(holder["pid"], signal.SIGKILL)
        outcome_of(first, tmp_path / "run")
    message = f"is in use by pid {holder['pid']} on host {holder['host']} since {holder['since']}"
    assert message in second.text and "exitcode  : 2" in second.text, second.text
    assert second.text.count("rmcore.train:") == 1
