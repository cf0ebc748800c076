"""Runs on 1, 2 and 4 ranks are equal under every strategy; so are runs with odd numbers of pairs and ranks."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.harness.ranks import run_ranks, train_rank

EMBEDDED = [
    "model.name=synthetic",
    "model.init=random",
    "data.train.path=synthetic",
    "data.template=none",
    "data.max_tokens=512",
    "data.limit=48",
    "data.eval_fraction=0.25",
    "optim.lr=1e-3",
    "optim.weight_decay=0.1",
    "optim.warmup_steps=2",
    "parallel.precision=fp32",
    "log.every=1",
    "log.tensorboard=false",
    "batch.pairs=7",
    "batch.tokens=400",
]


def train(tmp_path: Path, size: int, *overrides: str) -> tuple[list[dict], dict]:
    """The logged steps and the final status of a run on `size` ranks."""
    name = f"{size}-" + "-".join(o.split("=")[-1] for o in overrides if "/" not in o)
    directory = tmp_path / name.replace("{", "").replace("}", "")[:80]
    run_ranks(train_rank, size, tmp_path / f"ranks-{directory.name}", [*EMBEDDED, *overrides, f"run.dir={directory}"])
    steps = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return steps, json.loads((directory / "run_status.json").read_text())


def assert_same(ours: tuple[list[dict], dict], theirs: tuple[list[dict], dict]) -> None:
    """fp32 sums in another order differ by some 1e-7 relative; AdamW (eps 1e-5) does not amplify that in 6 steps."""
    keys = ("train/rm/loss", "train/rm/reward_margin", "grad_norm", "eval/rm/loss", "eval/rm/reward_margin")
    assert [(s["step"], s["episode"]) for s in ours[0]] == [(s["step"], s["episode"]) for s in theirs[0]]
    for key in keys:
        a, b = ([s[key] for s in run[0] if key in s] for run in (ours, theirs))
        assert len(a) > 0
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=key)
    assert ours[1]["status"] == theirs[1]["status"] == "completed"


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return train(tmp_path_factory.mktemp("one"), 1)


@pytest.mark.parametrize(
    "size, strategy",
    [(1, "zero2"), *((size, name) for size in (2, 4) for name in ("ddp", "zero1", "zero2", "zero3"))],
)
def test_every_world_size_and_strategy_follows_one_rank(tmp_path, one_rank, size, strategy):
    assert_same(train(tmp_path, size, f"parallel.strategy={strategy}"), one_rank)


def test_the_cut_into_micro_batches_changes_nothing(tmp_path, one_rank):
    assert_same(train(tmp_path, 1, "batch.tokens=100000"), one_rank)


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero3"])
def test_three_pairs_on_four_ranks(tmp_path, strategy):
    few = ["data.limit=3", "data.eval_fraction=0", "run.epochs=3", "run.evals=0"]
    ours = train(tmp_path, 4, f"parallel.strategy={strategy}", *few)
    theirs = train(tmp_path, 1, *few)
    assert [s["train/rm/loss"] for s in ours[0]] == pytest.approx([s["train/rm/loss"] for s in theirs[0]], abs=1e-5)
    assert ours[1]["step"] == 3 and ours[1]["episode"] == 9


def test_one_pair(tmp_path):
    steps, status = train(tmp_path, 2, "data.limit=1", "data.eval_fraction=0", "run.evals=0")
    assert [s["episode"] for s in steps] == [1] and status["status"] == "completed"
