"""Whole trainings of seven synthetic pairs a step, whose metrics tests compare over strategies and numbers of ranks.

Input: overrides of the run STEPS_OF_SEVEN. Output: a `Walk` per training.
Example: `run_ranks(walk, 2, folder, [[*STEPS_OF_SEVEN, "model.name=synthetic"]])` trains on two ranks.
"""

import re
from typing import Any, NamedTuple

import pytest
import torch

from rmcore.config import load_config

STEPS_OF_SEVEN = [
    "model.init=random",
    "data.train.path=synthetic",
    "data.template=none",
    "data.max_tokens=512",
    "data.limit=28",
    "data.eval_fraction=0.25",
    "optim.lr=1e-3",
    "batch.pairs=7",
    "batch.tokens=400",
    "parallel.precision=fp32",
    "run.save_minutes=null",
    "log.every=1",
    "log.samples=0",
    "log.tensorboard=false",
]


class Walk(NamedTuple):
    """The path of the attention ("attention shared"), and the metrics of every step and evaluation."""

    path: str
    metrics: list[dict[str, float]]


def walk(rendezvous: str, variants: list[list[str]]) -> list[Walk]:
    """For each list of overrides, one after the other: a whole training. Runs on every rank (see `run_ranks`)."""
    from rmcore.parallel.world import running_world
    from rmcore.tracking.tracker import Tracker
    from rmcore.train import train
    from rmcore.training.assembly import assemble

    class Kept(Tracker):
        def __init__(self) -> None:
            super().__init__()
            self.metrics: list[dict[str, float]] = []

        def log(self, at: Any, metrics: Any) -> None:
            names = ("train/rm/loss", "grad_norm", "eval/rm/loss")
            self.metrics.append({name: metrics[name] for name in names if name in metrics})

    torch.set_num_threads(1)
    walks = []
    with running_world(120.0, 1, init_method=rendezvous) as world:
        for variant in variants:
            run = assemble(load_config(None, variant), world)
            tracker = Kept()
            train(run, tracker)
            (path,) = re.findall(r"attention \w+(?=: )", "\n".join(run.lines))
            walks.append(Walk(path, tracker.metrics))
    return walks


def assert_close(ours: list[dict[str, float]], theirs: list[dict[str, float]], tolerance: float) -> None:
    """Every number of every step agrees, absolutely and relatively."""
    assert len(ours) == len(theirs) > 2
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=tolerance, rel=tolerance)
