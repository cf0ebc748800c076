"""The model FLOPs utilisation that a run logs: FLOPs per computed token, without those that the last layer skips."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rmcore.config import load_config
from rmcore.data.batches.batch import build_batch
from rmcore.parallel.world import running_world
from rmcore.tracking.tracker import start_tracker
from rmcore.train import train
from rmcore.training import assembly
from rmcore.training.assembly import assemble

PEAK = 1e9  # FLOP/s
RUN = [
    "model.name=synthetic",
    "model.init=random",
    "data.train.path=synthetic",
    "data.template=none",
    "data.max_tokens=512",
    "data.limit=24",
    "batch.pairs=12",
    "parallel.precision=fp32",
    "run.evals=0",
    "run.save_minutes=null",
    "log.every=1",
    "log.tensorboard=false",
]


@pytest.fixture
def known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("assembly", "metrics"):
        monkeypatch.setattr(f"rmcore.training.{module}.device_peak_flops", lambda device: PEAK)


def test_a_run_logs_mfu(tmp_path: Path, known_peak: None) -> None:
    config = load_config(None, [*RUN, f"run.dir={tmp_path}"])
    with running_world(60, 1) as world:
        run = assemble(config, world)
        with start_tracker(world, config, steps=run.plan.steps) as tracker:
            train(run, tracker)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and run.flops_per_token
    for line in lines:
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * run.flops_per_token / PEAK)


def test_the_flops_are_those_of_a_pruned_forward_and_backward(tmp_path: Path, known_peak: None) -> None:
    """PyTorch counts the products of a whole step. It also counts the scored tokens' work in the last layer: 1 %."""
    with running_world(60, 1) as world:
        run = assemble(load_config(None, [*RUN, f"run.dir={tmp_path}"]), world)
        model, tokens = run.strategy.model, 0
        with FlopCounterMode(display=False) as counter:
            for numbers in run.plan.step(0).ranks[0]:
                batch = build_batch(run.data.train, numbers, run.share)
                tokens += batch.computed_tokens
                model(batch).loss_sum.backward()
    assert run.flops_per_token
    layers = run.hf_config.num_hidden_layers
    whole = 6.0 * sum(p.numel() for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n)
    assert tokens * run.flops_per_token < counter.get_total_flops() < 1.03 * tokens * run.flops_per_token
    assert run.flops_per_token < (1 - 0.5 / layers) * whole, "the whole last layer is not counted"


def test_no_mfu_without_a_known_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing is counted, so that the start is not slowed down."""
    monkeypatch.setattr(assembly, "DryRun", None)
    with running_world(60, 1) as world:
        assert assemble(load_config(None, [*RUN, f"run.dir={tmp_path}"]), world).flops_per_token is None


@pytest.mark.parametrize("key", ["model.lora.rank=4", "loss.sft=0.1", "loss.router_aux=0.1"])
def test_no_mfu_of_a_forward_or_backward_that_is_not_the_counted_one(known_peak: None, key: str) -> None:
    config = load_config(None, [*RUN, key])
    assert assembly.flops_per_token(config, None, None, True, torch.device("cpu")) is None  # type: ignore[arg-type]
