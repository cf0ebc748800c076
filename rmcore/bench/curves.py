"""Trains one model with its numbers stored in several ways, on the same pairs, and compares what it learns.

Input: a model, preference files (JSON lines), and settings of the run.
Output: JSON with each arm's training loss by step, held-out accuracy by evaluation, the accuracy of its exported model
with an interval, and that accuracy's difference from the first arm's on the same pairs, with an interval (paired
bootstrap).
Example: 70 % of 1,975 pairs for training, 20 epochs: accuracy 0.67 with fp32 weights and AdamW averages, and with 8-bit
averages 0.66, 0.01 less (-0.01 to 0.03).

The arms are runs of `rmcore.train` in turn, with the same rows in the same order; `seed` differs from `fp32` in its
seed alone, which shows how far apart two equal trainings end. LoRA trains at a rate of its own. No clock is read, so
that other processes do not matter.
"""

import gzip
import json
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

from rmcore.bench.measure import machine, parser, write_results

ARMS = {
    "fp32": [],
    "seed": ["run.seed=2"],
    "bf16 states": ["optim.states=bf16"],
    "int8 states": ["optim.states=int8"],
    "bf16": ["parallel.precision=bf16"],
    "bf16 weights": ["parallel.precision=bf16", "model.weights=bf16"],
    "bf16 weights, int8 states": ["parallel.precision=bf16", "model.weights=bf16", "optim.states=int8"],
    "LoRA": ["model.lora.rank=16"],
    "LoRA, int8 base": ["model.lora.rank=16", "model.lora.base=int8"],
    "LoRA, nf4 base": ["model.lora.rank=16", "model.lora.base=nf4"],
}
FINAL = ("accuracy", "accuracy_low", "accuracy_high", "loss", "count")
FIXED = ["parallel.precision=fp32", "log.tensorboard=false", "log.report=none", "run.save_minutes=null"]


def main(arguments: list[str]) -> int:
    p = parser("curves", __doc__)
    p.add_argument("--model", required=True, help="directory of the base model, or `synthetic`")
    p.add_argument("--data", nargs="+", required=True, help="files of preference rows, .jsonl or .jsonl.gz")
    p.add_argument("--held-out", type=float, default=0.3, help="share of the prompts to evaluate on")
    p.add_argument("--lora-lr", type=float, default=1e-3, help="learning rate of the arms with LoRA")
    p.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="the first one is the baseline")
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more settings of all runs")
    p.add_argument("--keep", help="directory that keeps the runs; default: a temporary one")
    p.add_argument("--out", help="result file; default: rmcore/bench/results/curves.json")
    options = p.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="rmcore-bench-") as scratch:
        folder = Path(options.keep or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        counts = split(options.data, folder, options.held_out)
        common = [f"model.name={options.model}", f"data.train.path={folder / 'train.jsonl'}"]
        common += [f"data.eval.path={folder / 'eval.jsonl'}", *FIXED, *options.set]
        runs = {}
        for arm in options.arms:
            rate = [f"optim.lr={options.lora_lr}"] if "model.lora.rank=16" in ARMS[arm] else []
            runs[arm] = trained([*common, *ARMS[arm], *rate], folder / place(arm))
            print(f"{arm}: loss {runs[arm]['loss'][-1]}, accuracy {runs[arm]['accuracy'][-1]}", flush=True)
        judge(options.arms, runs, folder)
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "keep")}
    record = {"what": "curves", "machine": machine(), "settings": settings, **counts, "runs": runs}
    print(table(record))
    print(f"written: {write_results('curves', record, options.out)}")
    return 0


def place(arm: str) -> str:
    """The name of an arm's run directory."""
    return arm.replace(", ", "-").replace(" ", "-")


def split(files: list[str], folder: Path, share: float) -> dict[str, int]:
    """Write train.jsonl and eval.jsonl; the rows of a prompt are all in one of them, by a hash of the prompt."""
    counts = {"train": 0, "eval": 0}
    with (folder / "train.jsonl").open("w") as train, (folder / "eval.jsonl").open("w") as held_out:
        for file in files:
            with gzip.open(file, "rt") if file.endswith(".gz") else open(file, encoding="utf-8") as lines:
                for line in lines:
                    row = json.loads(line)
                    kept = {name: row[name] for name in ("prompt", "chosen", "rejected")}
                    apart = zlib.crc32(row["prompt"].encode()) < share * 2**32
                    (held_out if apart else train).write(json.dumps({**kept, "source": Path(file).name}) + "\n")
                    counts["eval" if apart else "train"] += 1
    return counts


def trained(settings: list[str], directory: Path) -> dict[str, Any]:
    """Run one arm; its training loss and held-out accuracy, each as [step, value] pairs."""
    command(["-m", "rmcore.train", *settings, f"run.dir={directory}"])
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    names = {"loss": "train/rm/loss", "accuracy": "eval/rm/accuracy"}
    return {
        key: [[line["step"], round(line[name], 4)] for line in lines if name in line] for key, name in names.items()
    }


def judge(arms: list[str], runs: dict[str, Any], folder: Path) -> None:
    """Add to each run the held-out accuracy of its export, and the difference from the first arm's."""
    models = {str(folder / place(arm) / "model"): arm for arm in [*arms[1:], arms[0]]}
    first, *others = models
    against = [word for other in others for word in ("--against", other)]
    found = json.loads(command(["-m", "rmcore", "evaluate", first, str(folder / "eval.jsonl"), *against, "--json"]))
    if not others:
        found = {"models": {first: found}, "comparison": {"differences": []}}
    for model, metrics in found["models"].items():
        runs[models[model]]["final"] = {key: metrics[key] for key in FINAL}
    for row in found["comparison"]["differences"]:
        if models[row["baseline"]] == arms[0]:
            runs[models[row["model"]]]["difference"] = {key: row[key] for key in ("difference", "low", "high", "p")}


def command(words: list[str]) -> str:
    """The standard output of this Python. Raises RuntimeError with the output if it fails."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(words)} failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return done.stdout


def table(record: dict[str, Any]) -> str:
    """Training loss early and late, and held-out accuracy, by arm."""
    lines = ["| arm | loss: first, middle, last tenth | held-out accuracy | difference |", "|---|---|---|---|"]
    for arm, run in record["runs"].items():
        losses = [value for _, value in run["loss"]]
        tenth = max(1, len(losses) // 10)
        parts = (losses[:tenth], losses[(len(losses) - tenth) // 2 :][:tenth], losses[-tenth:])
        loss = ", ".join(f"{sum(part) / len(part):.3f}" for part in parts)
        end = run["final"]
        cells = [arm, loss, f"{end['accuracy']:.3f} ({end['accuracy_low']:.3f} to {end['accuracy_high']:.3f})"]
        far = run.get("difference")
        cells.append(f"{far['difference']:+.3f} ({far['low']:+.3f} to {far['high']:+.3f})" if far else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
