"""A hang under NCCL, which raises nothing, is reported by the heartbeat's thread before NCCL ends the process."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from rmcore.parallel.world import World
from rmcore.training import heartbeat as module
from rmcore.training.heartbeat import Heartbeat

SOON = 20.0  # seconds for a thread that acts after a fraction of one


def started(monkeypatch: pytest.MonkeyPatch, device: str, timeout: float) -> tuple[Heartbeat, dist.Store]:
    """Rank 0 of two, at step 7; rank 1 waits for data."""
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(module, "LISTEN_SECONDS", 0.05)
    store = dist.HashStore()
    beat = Heartbeat(World(0, 1, 0, 1, torch.device(device), timeout))
    beat._world, beat._store = World(0, 2, 0, 2, torch.device(device), timeout), store
    store.set("place/1", json.dumps([5, 7, "data", 3.0, "other"]))
    return beat, store


def test_a_stuck_step_on_gpus_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beat, store = started(monkeypatch, "cuda", timeout=0.2)
    beat.run_dir = str(tmp_path)
    with beat:
        beat.at("backward", step=7)
        end = time.monotonic() + SOON
        while not (tmp_path / "run_status.json").exists() and time.monotonic() < end:
            time.sleep(0.01)
    status = json.loads((tmp_path / "run_status.json").read_text())
    assert status["status"] == "failed"
    for text in (status["reason"], store.get("failure").decode(), capsys.readouterr().err):
        assert "rank 0 lost touch with other ranks at step 7, phase backward: rank 1 on other is silent" in text
        assert "NCCL: nothing has moved for" in text


@pytest.mark.parametrize(
    ("device", "phase", "timeout", "hangs"),
    [
        ("cuda", "backward", 600.0, True),
        ("cuda", "evaluate", 600.0, False),  # takes as long as it takes
        ("cuda", "backward", 700.0, False),
        ("cpu", "backward", 600.0, False),  # gloo raises by itself
    ],
)
def test_what_counts_as_a_hang(
    monkeypatch: pytest.MonkeyPatch, device: str, phase: str, timeout: float, hangs: bool
) -> None:
    beat, _ = started(monkeypatch, device, timeout)
    beat.at(phase, step=1)
    beat._since -= 585.0
    assert beat._hangs() == hangs


def test_a_slow_gpu_counts_by_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host queues the forward of a micro batch at once; the device takes 3 s for each of two, in one step."""
    times = iter([10.0, 13.0, 20.0, 23.0])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = next(times)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return 1e3 * (end.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    seen: list[float] = []
    monkeypatch.setattr(module, "all_gather_json", lambda world, seconds: [seen.append(seconds), seconds, 1.0][1:])
    beat = Heartbeat(World(0, 1, 0, 1, torch.device("cuda"), 600.0))
    batch = SimpleNamespace(computed_tokens=8)
    for _ in beat.through(1, [(batch, False), (batch, True)]):  # type: ignore[list-item]
        beat.at("backward")
    lines: list[str] = []
    beat.report_slow_rank(SimpleNamespace(say=lines.append))  # type: ignore[arg-type]
    assert seen == [pytest.approx(6.0)]
    assert lines == ["rank 0 is slow: it takes 6.000 s per step before the backward, the median rank 1.000 s"]
