"""Compares the predictions of `rmcore plan` with measurements.

Input: model directories and rows, for FLOPs, seconds per step and peak memory of one process; result files of
`rmcore.bench memory`, for the peak memory of each rank under a strategy.
Output: a table and a JSON file.
Example: Pythia 70m, fp32: 1,410 GFLOP per step predicted, 1,408 counted by torch; 9.6 s predicted, 9.1 s measured: +5
%.

Error: predicted / measured - 1. The rates of the CPU are measured first, as `rmcore plan --gpu cpu` does. The result
file has two parts, of `--model` and of `--memory`; a part for which nothing is given stays as it is.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from rmcore.bench.measure import RESULTS, machine, own_child, parser, run_child, write_results
from rmcore.bench.memory import overrides_of, write_comparisons
from rmcore.bench.train_rmcore import config_of
from rmcore.config import Config, load_config
from rmcore.cost.report import as_dict
from rmcore.cost.shapes import SHAPES
from rmcore.plan import estimate_for

QUANTITIES = {"gflop_a_pair": "GFLOP per pair", "seconds_a_step": "seconds per step", "peak_gib": "peak GiB"}
PHASE = "train"  # of rmcore.bench memory, which the plan predicts


def main(arguments: list[str]) -> int:
    p = parser("plan", __doc__)
    p.add_argument("--model", nargs="*", default=[], help="directories of sequence-classification models")
    p.add_argument("--data", help="JSONL file of whole texts: chosen, rejected")
    p.add_argument("--memory", nargs="*", default=[], help="result files of rmcore.bench memory")
    p.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    p.add_argument("--batch", type=int, default=16, help="pairs per step")
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", help="result file; default: rmcore/bench/results/plan.json")
    options = p.parse_args(arguments)
    ranks = [
        many_ranks(Path(file)) for file in options.memory
    ]  # first, because the plan counts the memory of this process
    runs = [one_process(options, model, precision) for model in options.model for precision in options.precision]
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "model", "data", "memory")}
    record = {"what": "plan", "machine": machine(), "settings": settings, "runs": runs, "ranks": ranks}
    print(table(record))
    earlier = Path(options.out or RESULTS / "plan.json")
    if earlier.exists():
        before = json.loads(earlier.read_text(encoding="utf-8"))
        record |= {} if options.model else {key: before[key] for key in ("settings", "runs")}
        record |= {} if options.memory else {"ranks": before["ranks"]}
    print(f"written: {write_results('plan', record, options.out)}")
    return 0


def predicted(config: Config, *flags: str) -> dict[str, Any]:
    """The output of `rmcore plan --gpu cpu --json`."""
    return as_dict(estimate_for(config, ["--gpu", "cpu", *flags]))


def one_process(options: argparse.Namespace, model: str, precision: str) -> dict[str, Any]:
    """Runs some steps of the real loop in a child, and predicts the same config."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="rmcore-bench-") as directory:
        settings = {
            "model": model,
            "data": options.data,
            "precision": precision,
            "batch": options.batch,
            "threads": options.threads,
            "max_steps": options.steps,
            "directory": directory,
        }
        found = run_child(own_child("rmcore.bench.train_rmcore"), options.threads, settings)
        plan = predicted(config_of(settings, directory))
    return {
        "model": Path(model).name,
        "precision": precision,
        "gflop_a_pair": compared(1e-9 * plan["flops_a_pair"], found["gflop_per_pair"]),
        "seconds_a_step": compared(plan["asked"]["step_seconds"], options.batch / found["pairs_per_s"]),
        "peak_gib": compared(plan["asked"]["memory"]["total"] / 2**30, found["peak_rss_mb"] / 2**10),
        "rates": {key: plan["setting"]["machine"][key] for key in (precision, "memory_rate")},
        "others_share": found["others_share"],
    }


def many_ranks(file: Path) -> dict[str, Any]:
    """The peaks of the ranks in a result file of rmcore.bench memory, and the prediction for that run."""
    found = json.loads(file.read_text(encoding="utf-8"))
    settings = found["settings"]
    with tempfile.TemporaryDirectory(prefix="rmcore-bench-") as directory:
        shape = Path(directory, "config.json")
        shape.write_text(json.dumps(SHAPES[f"EleutherAI/{settings['shape']}"]), encoding="utf-8")
        if settings.get("comparison"):
            write_comparisons(Path(directory), settings["comparison"], settings["steps"] * settings["pairs"])
        overrides = overrides_of({**settings, "model": "synthetic", "directory": directory})
        flags = ["--gpus", str(settings["ranks"]), "--nodes", "1", "--rate", "0.1", "--model-config", str(shape)]
        plan = predicted(load_config(None, overrides), *flags)
    peaks = [rank[PHASE] for rank in found["ranks"]]
    return {
        "model": settings["shape"],
        "strategy": settings["strategy"],
        "precision": settings["precision"],
        "ranks": settings["ranks"],
        "set": settings.get("set", []),
        "quick": settings.get("quick", False),
        "time": found["machine"]["time"],
        "parts": plan["asked"]["memory"],
        "runtime": plan["runtime_bytes"],
        "peak_gib": compared(plan["asked"]["memory"]["total"] / 2**30, max(peaks) / 2**30),
        "least_gib": min(peaks) / 2**30,
    }


def compared(prediction: float, measured: float) -> dict[str, float]:
    return {"predicted": prediction, "measured": measured, "error": prediction / measured - 1}


def table(record: dict[str, Any]) -> str:
    """Prediction, measurement and error as Markdown."""
    lines = ["| run | quantity | predicted | measured | error |", "|---|---|--:|--:|--:|"]
    for run in (*record["runs"], *record["ranks"]):
        name = f"{run['model']} {run['precision']}"
        if "ranks" in run:
            name += ", ".join(["", run["strategy"], f"{run['ranks']} ranks", *run["set"]])
        for key, label in QUANTITIES.items():
            if found := run.get(key):
                cells = f"{found['predicted']:.3g} | {found['measured']:.3g} | {found['error']:+.0%}"
                lines.append(f"| {name} | {label} | {cells} |")
    return "\n".join(lines)
