"""Child of `rmcore.bench train`, `scaling` and `plan`: runs rmcore's own loop and times its steps from outside.

Input: settings as JSON: model, data, batch, precision, threads, and further keys of the config.
Output: one JSON line on rank 0: pairs per second over the epoch and in steady state (without the first `warm` steps).
Example: 256 pairs in 32 steps of 8, of which 28 count.
"""

import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from rmcore.bench.measure import Clock, add_up, report
from rmcore.checkpoint.resume import choose_start
from rmcore.config import Config
from rmcore.cost.machines import matrix_rate
from rmcore.data.batches.batch import RaggedBatch, build_batch
from rmcore.parallel.world import all_reduce_sum, barrier, running_world
from rmcore.tracking.tracker import Tracker
from rmcore.train import train
from rmcore.training.assembly import assemble
from rmcore.training.run import Run


class Stopwatch(Tracker):
    """A tracker that writes nothing, and laps the clock after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.laps: list[dict[str, float]] = []
        self.peak_rss_mb = 0.0  # until the last step: the checkpoint that follows is not part of the comparison
        self._clock = Clock()

    def step_done(self, step: int) -> None:
        self.laps.append(self._clock.lap())
        self.peak_rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def config_of(settings: dict[str, Any], directory: str) -> Config:
    """The config of a run on one file of whole texts, without evaluation, export or logs. Creates its run directory."""
    os.makedirs(os.path.join(directory, "run"), exist_ok=True)
    return Config.model_validate(
        {
            "model": {
                "name": settings["model"],
                "head": "stored" if settings["model"] != "synthetic" else "fresh",
                "init": "pretrained" if settings["model"] != "synthetic" else "random",
                "attention": settings.get("attention", "auto"),
            },
            "data": {
                "train": {"path": settings["data"]},
                "cache": os.path.join(directory, "cache"),
                "template": "none" if settings["data"] != "synthetic" else "simple_chat",
                "limit": settings.get("limit"),
                "max_tokens": 512 if settings["model"] == "synthetic" else 1024,
            },
            "batch": {"pairs": settings["batch"], "tokens": settings.get("tokens", "auto")},
            "optim": {"lr": 1e-5},
            "parallel": {
                "precision": settings["precision"],
                "strategy": settings.get("strategy", "ddp"),
                "recompute": settings.get("recompute", "auto"),
            },
            "run": {
                "dir": os.path.join(directory, "run"),
                "evals": 0,
                "seed": 42,
                "resume": "never",
                "epochs": settings.get("epochs", 1),
                "max_steps": settings.get("max_steps"),
            },
            "log": {"tensorboard": False},
        }
    )


def flops_of_step(run: Run, batch: RaggedBatch) -> float:
    """FLOPs of the matrix products in a forward and backward of `batch`, and of its attention.

    On CPUs without autocast, which fills up the row: those of the filling are not useful.
    """
    counter = FlopCounterMode(display=False)
    with counter, run.strategy.autocast(), torch.autocast("cpu", enabled=False):
        run.strategy.model(batch).loss_sum.backward()
    run.strategy.optimizer.zero_grad(set_to_none=True)
    # The counter does not know the attention op: 4 FLOPs forward and 8 backward per visible pair of tokens and unit of
    # width.
    seen = sum(
        (end - start) * (prefix_end - prefix_start) + (end - start) * (end - start + 1) / 2
        for start, end, prefix_start, prefix_end in batch.layout.segments_S4.tolist()
    )
    return counter.get_total_flops() + 12.0 * seen * run.hf_config.hidden_size * (run.hf_config.num_hidden_layers - 1)


def measured(settings: dict[str, Any]) -> dict[str, Any] | None:
    """The record on rank 0; None on the other ranks."""
    torch.set_num_threads(settings["threads"])
    directory = settings.get("directory") or tempfile.mkdtemp(prefix="rmcore-bench-")
    try:
        with running_world(600.0, 42) as world:
            config = config_of(settings, directory)
            run = assemble(config, world, choose_start(config, world))
            rate = 1e-9 * matrix_rate(settings["precision"]) if world.size == 1 else 0.0
            all_reduce_s = all_reduce_seconds(run)
            barrier(world)
            watch = Stopwatch()
            train(run, watch)
            return {**record_of(settings, run, watch, rate), "all_reduce_s": all_reduce_s} if world.is_main else None
    finally:
        if "directory" not in settings:
            shutil.rmtree(directory, ignore_errors=True)


def all_reduce_seconds(run: Run) -> float:
    """Median seconds of an all-reduce as large as the gradients, with no other work; about 0 for one rank."""
    gradients = torch.zeros(sum(p.numel() for p in run.strategy.model.parameters()))
    seconds = []
    for _ in range(5):
        barrier(run.world)
        begin = time.perf_counter()
        all_reduce_sum(run.world, gradients)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def record_of(settings: dict[str, Any], run: Run, watch: Stopwatch, rate: float) -> dict[str, Any]:
    laps = watch.laps
    warm = min(settings.get("warm", 4), len(laps) - 1)
    kept, whole = add_up(laps[warm:]), add_up(laps)
    pairs = np.diff([0, *(run.plan.step(index).episode for index in range(len(laps)))]).tolist()
    numbers = [run.plan.step(index).ranks for index in range(len(laps))]  # by step, rank and micro batch
    loads = np.array([[sum(int(run.plan.tokens_N[m].sum()) for m in rank) for rank in ranks] for ranks in numbers])
    tokens = loads.sum(1).tolist()
    logical = [int(sum(run.data.train.logical_tokens_N[m].sum() for rank in ranks for m in rank)) for ranks in numbers]
    attention = settings.get("attention", "auto")
    record = {
        "arm": "rmcore" if attention == "auto" else f"rmcore {attention}",
        "lines": run.lines,
        "steps": len(laps),
        "warm": warm,
        "pairs_per_s": sum(pairs[warm:]) / kept["wall_s"],
        "epoch_pairs_per_s": sum(pairs) / whole["wall_s"],
        "computed_tokens_per_s": sum(tokens[warm:]) / kept["wall_s"],
        "busiest": float((loads.max(1) / loads.mean(1))[warm:].mean()),  # tokens of the busiest rank over the mean
        "logical_tokens_per_s": sum(logical[warm:]) / kept["wall_s"],
        **kept,
        "peak_rss_mb": watch.peak_rss_mb,
    }
    if rate and attention == "auto":  # the useful FLOPs of four steps, over their time
        some = range(warm, min(warm + 4, len(laps)))
        batches = [build_batch(run.data.train, micro, run.share) for step in some for micro in numbers[step][0]]
        gflop = 1e-9 * sum(flops_of_step(run, batch) for batch in batches)
        seconds = sum(laps[step]["wall_s"] for step in some)
        record |= {
            "gflop_per_pair": gflop / sum(pairs[step] for step in some),
            "matrix_gflops": rate,
            "share_of_matrix_rate": gflop / seconds / rate,
        }
    return record


if __name__ == "__main__":
    if (result := measured(json.loads(sys.argv[-1]))) is not None:
        report(result)
