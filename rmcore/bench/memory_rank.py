"""A child of `rmcore.bench memory`: one rank of a whole run, which notes its peak memory after each phase.

Enters: settings as JSON. Leaves: on rank 0 one line of JSON with every rank's peaks in bytes: start (imports alone),
load (until the first step), train, export. The kernel's high-water mark is set back between the phases, so that each
peak is that phase's own.
"""

import json
import sys
from pathlib import Path
from typing import Any

import rmcore.training.publish
from rmcore.bench.measure import report
from rmcore.bench.memory import settings_of
from rmcore.checkpoint.resume import choose_start
from rmcore.config import load_config
from rmcore.parallel.world import all_gather_json, barrier, running_world
from rmcore.tracking.tracker import Tracker
from rmcore.train import train
from rmcore.training.assembly import assemble


class Losses(Tracker):
    """A tracker that keeps the losses alone."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def log(self, moment: Any, figures: Any) -> None:
        self.losses += [figures["train/rm/loss"]] if "train/rm/loss" in figures else []


def peak() -> dict[str, int]:
    """Bytes of this process's greatest resident set since the last call, and now; sets the mark back (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "VmRSS"))}
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return {"peak": found["VmHWM"], "now": found["VmRSS"]}


def main(settings: dict[str, Any]) -> None:
    config = load_config(None, settings_of(settings))
    rmcore.training.publish.RELOAD_SHARE = 0.0  # the export is checked in parts however much memory there is
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    with running_world(config.parallel.timeout_seconds, config.run.seed) as world:
        marks = {"start": peak()}
        state = assemble(config, world, choose_start(config, world))
        barrier(world)
        marks["load"] = peak()
        tracker = Losses()
        train(state, tracker)
        barrier(world)
        marks["train"] = peak()
        rmcore.training.publish.publish(state, None, tracker)
        barrier(world)
        marks["export"] = peak()
        mine: dict[str, Any] = {"rank": world.rank, **{phase: mark["peak"] for phase, mark in marks.items()}}
        mine |= {f"{phase}_end": mark["now"] for phase, mark in marks.items()}
        ranks = all_gather_json(world, mine)
        if world.is_main:
            parameters = sum(p.numel() for p in state.strategy.named_parameters().values())
            batch = {"token_budget": state.token_budget, "lines": list(state.lines)}
            report({"ranks": ranks, "parameters": parameters, "losses": tracker.losses, **batch})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
