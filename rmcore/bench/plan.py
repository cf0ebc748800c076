"""python -m rmcore.bench plan: what `rmcore plan` foretells beside what is measured, and the error of each figure.

Enters: model directories and rows, for FLOPs, seconds a step and peak memory of one process; and result files of
`rmcore.bench memory`, for the peak memory of each rank under a strategy. Leaves: a table and a JSON file.
Example: Pythia 70m, fp32: 1,410 GFLOP a step foretold, 1,408 counted by torch; 9.6 s foretold, 9.1 s measured: +5 %.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rmcore.bench.measure import machine, own_child, run_child, write_results
from rmcore.config import Config, load_config

PHASE = "train"  # of rmcore.bench memory: what a plan foretells is the training


def main(arguments: list[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m rmcore.bench plan", description="what `rmcore plan` says, and what is")
    p.add_argument("--model", nargs="*", default=[], help="directories of sequence-classification models")
    p.add_argument("--data", help="JSONL file of whole texts: chosen, rejected")
    p.add_argument("--memory", nargs="*", default=[], help="result files of rmcore.bench memory")
    p.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    p.add_argument("--batch", type=int, default=16, help="pairs a step")
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", help="result file; default: rmcore/bench/results/plan.json")
    options = p.parse_args(arguments)
    ranks = [many_ranks(Path(file)) for file in options.memory]  # first: a plan counts what this process itself takes
    runs = [one_process(options, model, precision) for model in options.model for precision in options.precision]
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "model", "data", "memory")}
    record = {"what": "plan", "machine": machine(), "settings": settings, "runs": runs, "ranks": ranks}
    print(table(record))
    print(f"written: {write_results('plan', record, options.out)}")
    return 0


def foretold(config: Config, *flags: str) -> dict[str, Any]:
    """What `rmcore plan --json` says of a config on CPU ranks."""
    from rmcore.cost.report import as_dict
    from rmcore.plan import estimate_for

    return as_dict(estimate_for(config, ["--gpu", "cpu", *flags]))


def one_process(options: argparse.Namespace, model: str, precision: str) -> dict[str, Any]:
    """Some steps of the real loop in a child, and the plan of the same config."""
    import torch

    from rmcore.bench.train_rmcore import config_of

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="rmcore-bench-") as directory:
        settings = {"model": model, "data": options.data, "precision": precision, "batch": options.batch,
                    "threads": options.threads, "max_steps": options.steps, "directory": directory}  # fmt: skip
        found = run_child(own_child("rmcore.bench.train_rmcore"), options.threads, settings)
        plan = foretold(config_of(settings, directory))
    return {
        "model": Path(model).name,
        "precision": precision,
        "gflop_a_pair": pair(1e-9 * plan["flops_a_pair"], found["gflop_per_pair"]),
        "seconds_a_step": pair(plan["asked"]["step_seconds"], options.batch / found["pairs_per_s"]),
        "peak_gib": pair(plan["asked"]["memory"]["total"] / 2**30, found["peak_rss_mb"] / 2**10),
        "rates": {key: plan["setting"]["machine"][key] for key in (precision, "memory_rate")},
        "others_share": found["others_share"],
    }


def many_ranks(file: Path) -> dict[str, Any]:
    """The peak of each rank in a result of rmcore.bench memory, and the plan of that run."""
    from rmcore.bench.memory import overrides_of
    from rmcore.cost.shapes import SHAPES

    found = json.loads(file.read_text(encoding="utf-8"))
    settings = found["settings"]
    with tempfile.TemporaryDirectory(prefix="rmcore-bench-") as directory:
        shape = Path(directory, "config.json")
        shape.write_text(json.dumps(SHAPES[f"EleutherAI/{settings['shape']}"]), encoding="utf-8")
        overrides = overrides_of({**settings, "model": "synthetic", "directory": directory})
        flags = ["--gpus", str(settings["ranks"]), "--nodes", "1", "--rate", "0.1", "--model-config", str(shape)]
        plan = foretold(load_config(None, overrides), *flags)
    peaks = [rank[PHASE] for rank in found["ranks"]]
    return {
        "model": settings["shape"],
        "strategy": settings["strategy"],
        "precision": settings["precision"],
        "ranks": settings["ranks"],
        "parts": plan["asked"]["memory"],
        "runtime": plan["runtime_bytes"],
        "peak_gib": pair(plan["asked"]["memory"]["total"] / 2**30, max(peaks) / 2**30),
        "least_gib": min(peaks) / 2**30,
    }


def pair(plan: float, measured: float) -> dict[str, float]:
    return {"foretold": plan, "measured": measured, "error": plan / measured - 1}


def table(record: dict[str, Any]) -> str:
    """Foretold / measured and the error, as Markdown."""
    lines = ["| run | figure | foretold | measured | error |", "|---|---|--:|--:|--:|"]
    for run in (*record["runs"], *record["ranks"]):
        name = f"{run['model']} {run['precision']}"
        if "ranks" in run:
            name += f", {run['strategy']}, {run['ranks']} ranks"
        lines += [
            f"| {name} | {figure.replace('_', ' ')} | {run[figure]['foretold']:.3g} | {run[figure]['measured']:.3g} | "
            f"{run[figure]['error']:+.0%} |"
            for figure in ("gflop_a_pair", "seconds_a_step", "peak_gib")
            if figure in run
        ]
    return "\n".join(lines)
