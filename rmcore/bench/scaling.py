"""Measures weak scaling over gloo ranks of one thread each, compared with one rank and with the machine's own limit.

Input: a model directory and rows.
Output: pairs per second of three arms in turn, over the same pairs: `one` rank; N `ranks`; and N processes `apart`,
each an unrelated run of one rank, all at once.
Example: one rank 20.0, 2 ranks 38.0, 2 apart 39.0 pairs per second in total: efficiency 95 %, 97.4 % of what the
machine allows.

Ratio: efficiency is pairs per second of N ranks over N times those of one; 100 % is ideal. What the processes apart
lose against N times one is lost by the machine: shared memory, caches, clock rates.
"""

import argparse
import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from rmcore.bench.measure import (
    Clock,
    add_up,
    machine,
    own_child,
    parser,
    run_child,
    spread,
    undisturbed,
    write_results,
)

CHILD = "rmcore.bench.train_rmcore"


def main(arguments: list[str]) -> int:
    p = parser("scaling", __doc__)
    p.add_argument("--model", required=True, help="directory of a sequence-classification model")
    p.add_argument("--data", required=True, help="JSONL file of whole texts: chosen, rejected")
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--pairs", type=int, default=32, help="pairs per step on each rank")
    p.add_argument("--tokens", type=int, default=2048, help="budget of a micro batch: several make a step")
    p.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    p.add_argument("--strategy", default="ddp", choices=["ddp", "zero1", "zero2", "zero3"])
    p.add_argument("--repeat", type=int, default=5)
    p.add_argument(
        "--steps", type=int, default=4, help="of N ranks; one rank takes N times as many, over the same pairs"
    )
    p.add_argument("--out", help="result file; default: rmcore/bench/results/scaling.json")
    options = p.parse_args(arguments)
    if options.steps < 2:
        p.error("--steps must be 2 or more: the first warms up")
    arms: dict[str, Callable[[argparse.Namespace, str], dict[str, Any]]] = {"one": one, "ranks": ranks, "apart": apart}
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="rmcore-bench-") as directory:
        for repetition in range(options.repeat):
            for arm, run in arms.items():
                record = with_others_share(partial(run, options, directory)) | {"arm": arm, "repetition": repetition}
                runs.append(record)
                print(
                    f"{arm:<5} {record['pairs_per_s']:8.2f} pairs/s, other processes {record['others_share']:.1%}",
                    flush=True,
                )
    found = summary(runs, options)
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    settings |= {"model": Path(options.model).name, "data": Path(options.data).name}
    record = {"what": "scaling", "machine": machine(), "settings": settings, **found, "runs": runs}
    print(f"{options.ranks} ranks of one thread: {percent(found['efficiency'])} of {options.ranks} times one")
    print(f"the machine allows {percent(found['ceiling'])}; the ranks reach {percent(found['of_ceiling'])} of that")
    print(f"step {found['step_s']:.3f} s; an all-reduce of the gradients by itself {found['all_reduce_s']:.3f} s")
    print(f"tokens of the busiest rank over the mean: {found['busiest']:.3f}")
    print(f"written: {write_results('scaling', record, options.out)}")
    return 0


def settings_of(options: argparse.Namespace, directory: str, count: int) -> dict[str, Any]:
    """A run of `count` ranks. Whatever `count` is, the run and its warm-up cover the same number of pairs."""
    steps = options.ranks // count
    settings = {"model": options.model, "data": options.data, "precision": options.precision, "tokens": options.tokens}
    settings |= {"threads": 1, "epochs": 64, "ranks": count, "strategy": options.strategy, "directory": directory}
    return settings | {"batch": options.pairs * count, "warm": steps, "max_steps": options.steps * steps}


def one(options: argparse.Namespace, directory: str) -> dict[str, Any]:
    return run_child(own_child(CHILD), 1, settings_of(options, os.path.join(directory, "0"), 1))


def ranks(options: argparse.Namespace, directory: str) -> dict[str, Any]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.ranks)]
    settings = settings_of(options, os.path.join(directory, "0"), options.ranks)
    return run_child([*launcher, *own_child(CHILD)[1:]], 1, settings)


def apart(options: argparse.Namespace, directory: str) -> dict[str, Any]:
    """N runs of one rank at the same time; the rate is the sum of theirs."""
    with ThreadPoolExecutor(options.ranks) as pool:
        places = [os.path.join(directory, str(place)) for place in range(options.ranks)]
        records = list(pool.map(lambda place: run_child(own_child(CHILD), 1, settings_of(options, place, 1)), places))
    return {**records[0], "pairs_per_s": sum(record["pairs_per_s"] for record in records), "each": records}


def with_others_share(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The run's record, with the share of the machine that other processes took, from the start of its children on."""
    clock, before = Clock(), children_cpu()
    record = run()
    lap = clock.lap()
    lap["others_cpu_s"] = max(0.0, lap["others_cpu_s"] - (children_cpu() - before))
    return {**record, "others_share": add_up([lap])["others_share"]}


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def summary(runs: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Rates of the arms and ratios within each repetition, as median and spread of the undisturbed runs."""
    kept = undisturbed(runs)
    rate = {(run["arm"], run["repetition"]): run["pairs_per_s"] for run in kept}
    whole = [n for n in range(options.repeat) if all((arm, n) in rate for arm in ("one", "ranks", "apart"))]
    if not whole:  # no undisturbed repetition is complete: take all runs
        return summary([{**run, "others_share": 0.0} for run in runs], options)
    ideal = {n: options.ranks * rate["one", n] for n in whole}
    many = [run for run in kept if run["arm"] == "ranks"]
    return {
        "disturbed": len(runs) - len(kept),
        "pairs_per_s": {arm: spread([rate[arm, n] for n in whole]) for arm in ("one", "ranks", "apart")},
        "efficiency": spread([rate["ranks", n] / ideal[n] for n in whole]),
        "ceiling": spread([rate["apart", n] / ideal[n] for n in whole]),
        "of_ceiling": spread([rate["ranks", n] / rate["apart", n] for n in whole]),
        "all_reduce_s": statistics.median(run["all_reduce_s"] for run in many),
        "step_s": statistics.median(run["wall_s"] / (run["steps"] - run["warm"]) for run in many),
        "busiest": many[0]["busiest"],
    }


def percent(value: dict[str, float]) -> str:
    return f"{value['median']:.1%} ({value['least']:.1%} to {value['most']:.1%})"
