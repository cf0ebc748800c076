"""The loop never waits for the device in a step that neither logs, saves nor evaluates."""

from collections import defaultdict
from pathlib import Path

import pytest

from rmcore.config import load_config
from rmcore.parallel.world import World, running_world
from rmcore.tracking.tracker import Tracker
from rmcore.train import train
from rmcore.training.assembly import assemble
from rmcore.training.heartbeat import Heartbeat
from tests.harness.device_reads import DeviceReads

STEPS, LOG_EVERY, SAVE_EVERY = 10, 4, 5
RUN = [
    "model.name=synthetic",
    "model.init=random",
    "data.train.path=synthetic",
    "data.template=none",
    "data.max_tokens=512",
    "data.limit=80",
    "data.eval_fraction=0.25",
    "batch.pairs=6",
    "batch.tokens=200",  # several micro batches per step
    f"run.max_steps={STEPS}",
    f"run.save_every={SAVE_EVERY}",
    "run.evals=1",
    f"log.every={LOG_EVERY}",
    "log.samples=0",
]


def reads_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> dict[int, list[str]]:
    """Step -> what the host read from the device in it, in a whole `train()` on a CPU that stands for a GPU."""
    monkeypatch.setattr(World, "reads_wait", True)
    with running_world(60, seed=1) as world:
        run = assemble(load_config(None, [*RUN, *overrides, f"run.dir={tmp_path}"]), world)
        assert run.plan.steps == STEPS and len(run.plan.step(0).ranks[0]) > 1
        heartbeat = Heartbeat(world)
        reads = DeviceReads(label=lambda: (heartbeat.step, heartbeat.phase))
        with reads:
            train(run, Tracker(), heartbeat)
    found = defaultdict(list)
    for name, (step, phase) in zip(reads.seen, reads.labels, strict=True):
        found[step].append(f"{name} in phase {phase}")
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.strategy=ddp",),
        ("parallel.strategy=zero2", "parallel.precision=bf16"),
        ("parallel.strategy=zero3", "parallel.recompute=full"),
        ("parallel.strategy=ddp", "loss.name=davidson", "optim.max_grad_norm=0.01"),
        ("parallel.strategy=ddp", "loss.name=plackett_luce"),
    ],
)
def test_a_plain_step_reads_nothing_from_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    found = reads_by_step(tmp_path, monkeypatch, *overrides)
    busy = {step for step in range(1, STEPS + 1) if step % LOG_EVERY == 0 or step % SAVE_EVERY == 0}
    assert {step: what for step, what in found.items() if step not in {0, *busy}} == {}
    assert busy <= found.keys(), "the counter sees the reads of steps that log, save or evaluate"
