"""Trains on two real hosts: torchrun on each, two ranks per host, a cable that is cut in the middle and mended.

The tests are skipped, with the reason, where network namespaces may not be made.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rmcore.checkpoint.directory import steps
from tests.harness.crash import Fault
from tests.harness.hosts import ADDRESSES, TwoHosts, two_hosts, why_not
from tests.harness.ranks import run_ranks, train_rank
from tests.harness.small_run import arguments, wait_for

REASON = why_not()
pytestmark = [pytest.mark.distributed, pytest.mark.skipif(REASON is not None, reason=REASON or "")]
MORE = ("log.every=1", "run.save_every=2", "parallel.timeout_seconds=12")


def launch(hosts: TwoHosts, folder: Path, strategy: str, slow: bool = False) -> list[subprocess.Popen[str]]:
    """Start the same command on both hosts, as launch/multinode.sh does."""
    faults = [vars(Fault("compute", "slow", 0, 1, every=True))] if slow else []
    settings = json.dumps({"directory": str(folder / "run"), "faults": faults})
    given = [*arguments(folder, *MORE, rows=72), f"parallel.strategy={strategy}"]
    jobs = []
    for host, address in enumerate(ADDRESSES):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29400", f"--local-addr={address}"]
        command += ["--rdzv-id=test", "-m", "tests.harness.crash_worker", settings, *given]
        jobs.append(
            hosts.start(host, command, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", TORCH_CPP_LOG_LEVEL="ERROR")
        )
    return jobs


def finished(jobs: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    """Exit codes and outputs; fails with the outputs if the jobs do not end."""
    end = time.monotonic() + 180
    while any(job.poll() is None for job in jobs) and time.monotonic() < end:
        time.sleep(0.1)
    late = [number for number, job in enumerate(jobs) if job.poll() is None]
    for number in late:
        os.killpg(jobs[number].pid, signal.SIGTERM)
    output = [job.communicate(timeout=60)[0] for job in jobs]
    assert not late, f"hosts {late} did not end:\n" + "\n----\n".join(output)
    return [job.returncode for job in jobs], output


def losses(folder: Path) -> dict[int, float]:
    """Step -> the loss that was logged last for it."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {step["step"]: step["train/rm/loss"] for step in map(json.loads, lines) if "train/rm/loss" in step}


def assert_as_alone(tmp_path: Path) -> None:
    """Compare with one process: fp32 sums in another order, see ROUNDING in tests/harness/small_run.py."""
    directory = tmp_path / "one-process"
    run_ranks(train_rank, 1, tmp_path / "ranks", [*arguments(tmp_path, *MORE, rows=72), f"run.dir={directory}"])
    ours, theirs = losses(tmp_path / "run"), losses(directory)
    assert len(theirs) == 12 and ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
def test_a_cut_cable_is_named_and_the_run_resumes_when_it_is_mended(tmp_path: Path) -> None:
    """hsdp over 2 x 2 ranks."""
    with two_hosts() as hosts:
        jobs = launch(hosts, tmp_path, "hsdp", slow=True)
        wait_for(lambda: steps(tmp_path / "run" / "checkpoints"), jobs[0], limit=150)
        hosts.cut()
        codes, output = finished(jobs)
        assert codes == [1, 1], output
        status = json.loads((tmp_path / "run" / "run_status.json").read_text(encoding="utf-8"))
        assert status["status"] == "failed" and "lost touch with other ranks" in status["reason"], status
        assert f"on {hosts.names[1]} is silent" in output[0], output[0]
        assert f"store at {ADDRESSES[0]} does not answer" in output[1], output[1]
        saved = steps(tmp_path / "run" / "checkpoints")[0]
        assert saved < 12, "it was cut in the middle"
        hosts.mend()
        codes, output = finished(launch(hosts, tmp_path, "hsdp"))
        assert codes == [0, 0], output
        assert f"continuing at step {saved}" in output[0], output[0]
    assert_as_alone(tmp_path)


# The test above trains hsdp on two hosts; tests/parallel/test_sharded.py compares zero2 with one process.
@pytest.mark.parametrize(
    "strategy", ["ddp", pytest.param("zero2", marks=pytest.mark.slow), pytest.param("hsdp", marks=pytest.mark.slow)]
)
def test_two_hosts_train_like_one_process(tmp_path: Path, strategy: str) -> None:
    with two_hosts() as hosts:
        codes, output = finished(launch(hosts, tmp_path, strategy))
        assert codes == [0, 0], output
    assert_as_alone(tmp_path)
