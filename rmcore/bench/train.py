"""Measures training in pairs per second, compared with TRL's RewardTrainer.

Input: model directories, files of rows {"chosen", "rejected"} (whole texts), the environment that has TRL.
Output: JSON with every run; a summary on the screen.
Example: 2 models, fp32 and bf16, 3 repetitions, arms rmcore, trl default, trl best, trl grouped: 48 runs.

Ratio: rmcore's pairs per second over TRL's; 6 means that rmcore trains on six times as many pairs in the same time.
fp32 is compared with TRL's fp32, bf16 with the better of TRL's two precisions. TRL's settings: `default` recomputes
activations, `best` does not (both are compared in steady state, without the first steps), `grouped` does not and
batches rows of similar length (compared over the whole epoch, because its first steps hold the longest rows).

With --paths, rmcore also runs with `model.attention=packed` or `padded`, and its own pairs per second are compared.

rmcore and TRL get the same rows, model, precision, batch and threads. Each run is a process of its own. The arms
alternate within each repetition, so that a slow hour of the machine slows all of them.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

from rmcore.bench.measure import DISTURBED, machine, own_child, parser, run_child, spread, undisturbed, write_results

TRL_ARMS = ("default", "best", "grouped")


def parsed(arguments: list[str]) -> argparse.Namespace:
    p = parser("train", __doc__)
    p.add_argument("--model", nargs="+", required=True, help="directories of sequence-classification models")
    p.add_argument("--data", nargs="+", required=True, help="JSONL files of whole texts: chosen, rejected")
    p.add_argument("--peers", help="virtual environment that has trl; without it only rmcore runs")
    p.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    p.add_argument("--arms", nargs="+", default=list(TRL_ARMS), choices=TRL_ARMS, help="settings of TRL to run")
    p.add_argument("--paths", nargs="*", default=[], choices=["packed", "padded"], help="slower paths of rmcore to run")
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--batch", type=int, default=8, help="pairs per step")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--warm", type=int, default=4, help="first steps that steady state excludes")
    p.add_argument("--max-steps", type=int, help="end each run early")
    p.add_argument("--limit", type=int, help="rows to read")
    p.add_argument("--out", help="result file; default: rmcore/bench/results/train.json")
    return p.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parsed(arguments)
    own = own_child("rmcore.bench.train_rmcore")
    children: list[tuple[list[str], dict[str, str]]] = [(own, {"attention": path}) for path in ("auto", *options.paths)]
    if options.peers:
        python = str(Path(options.peers, "bin", "python"))
        script = str(Path(__file__).with_name("train_trl.py"))
        children += [([python, script], {"arm": arm}) for arm in options.arms]
    runs: list[dict[str, Any]] = []
    for repetition in range(options.repeat):
        for model, data, precision in itertools.product(options.model, options.data, options.precision):
            for command, arm in children:
                settings = {
                    **arm,
                    "model": model,
                    "data": data,
                    "precision": precision,
                    "batch": options.batch,
                    "threads": options.threads,
                    "warm": options.warm,
                    "max_steps": options.max_steps,
                    "limit": options.limit,
                }
                record = run_child(command, options.threads, settings)
                names = {"model": Path(model).name, "data": Path(data).stem, "precision": precision}
                runs.append({**names, "repetition": repetition, **record})
                print(one_line(runs[-1]), flush=True)
                write(options, runs)
    print(f"\n{summary(runs)}\n\nwritten: {write(options, runs)}")
    return 0


def write(options: argparse.Namespace, runs: list[dict[str, Any]]) -> Path:
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "peers")}
    settings |= {key: [Path(path).name for path in settings[key]] for key in ("model", "data")}
    record = {"what": "train", "machine": machine(), "settings": settings, "runs": runs}
    return write_results("train", record, options.out)


def one_line(run: dict[str, Any]) -> str:
    disturbed = (
        "" if run["others_share"] <= DISTURBED else f"  DISTURBED: other processes took {run['others_share']:.0%}"
    )
    return (
        f"{run['model']} {run['data']} {run['precision']} {run['arm']:<11} {run['pairs_per_s']:7.2f} pairs/s, "
        f"epoch {run['epoch_pairs_per_s']:7.2f}, {run['peak_rss_mb']:,.0f} MB{disturbed}"
    )


def summary(runs: list[dict[str, Any]]) -> str:
    """Medians, and ratios to TRL and to rmcore's slower paths, one line each."""
    lines = []
    for model, data in dict.fromkeys((run["model"], run["data"]) for run in runs):
        chosen = [run for run in runs if (run["model"], run["data"]) == (model, data)]
        lines += [f"{model} {data}: {text}" for text in ratios(chosen)]
    return "\n".join(lines)


def median(runs: list[dict[str, Any]], arm: str, precision: str, rate: str) -> float | None:
    """The median of a rate over the undisturbed runs of an arm in one precision; None without such runs."""
    chosen = [run for run in runs if run["arm"] == arm and run["precision"] == precision]
    return spread([run[rate] for run in undisturbed(chosen)])["median"] if chosen else None


def ratios(runs: list[dict[str, Any]]) -> list[str]:
    """rmcore in each precision over TRL in the precision that it is compared with: see the module's docstring."""
    lines = []
    for precision in dict.fromkeys(run["precision"] for run in runs):
        for arm in ("trl default", "trl best", "trl grouped", "rmcore packed", "rmcore padded"):
            rate = "epoch_pairs_per_s" if arm == "trl grouped" else "pairs_per_s"
            ours = median(runs, "rmcore", precision, rate)
            allowed = {"fp32", precision} if arm.startswith("trl") else {precision}
            theirs = [median(runs, arm, other, rate) for other in sorted(allowed)]
            best = max((one for one in theirs if one), default=None)
            if ours and best:
                lines.append(f"{precision} rmcore {ours:.2f} / {arm} {best:.2f} = {ours / best:.2f}")
    return lines
