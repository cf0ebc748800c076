"""Measures preparing rows and planning an epoch, compared with datasets.map and TRL's preparation.

Input: HH-like preference files (prompt, chosen, rejected as texts) and a tokenizer.json.
Output: pairs per CPU second of each way to prepare the same rows on one core, seconds with worker processes on all
cores, seconds of a second start, memory at two numbers of rows, and seconds and memory of planning an epoch of ten
million pairs.
Example:

    python -m rmcore.bench data --tokenizer 20B_tokenizer.json --rows hh1.jsonl.gz hh2.jsonl.gz --peers VENV

Ratio: rmcore's pairs per CPU second over the other's; 2 means that rmcore needs half the CPU time. CPU seconds are
compared because they change less than wall seconds when others use the machine.

The given rows are repeated until there are enough. Each gets its number in the first line of its prompt, so that no row
is found in a cache. The arms alternate, each run in a process of its own (data_child.py).
"""

import argparse
import gzip
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import GPTNeoXConfig, PreTrainedTokenizerFast

from rmcore.bench.data_child import EOS
from rmcore.bench.measure import machine, own_child, parser, run_child, spread, undisturbed, write_results

MAX_TOKENS = 1024
ARMS = ("rmcore", "workers", "again", "map", "trl", "memory", "plan")


def main(arguments: list[str]) -> int:
    options = parsed(arguments)
    runs: list[dict[str, Any]] = []
    path = None
    with tempfile.TemporaryDirectory(prefix="rmcore-bench-") as folder:
        for record in measured(options, Path(folder)):
            runs.append(record)
            settings = {
                "pairs": options.pairs,
                "memory_pairs": options.memory_pairs,
                "plan_pairs": options.plan_pairs,
                "max_tokens": MAX_TOKENS,
                "tokenizer": Path(options.tokenizer).name,
                "rows": [Path(name).name for name in options.rows],
                "longest": options.longest,
                "threads": 1,
            }
            result = {"what": "data", "machine": machine(), "settings": settings, "runs": runs}
            path = write_results("data", {**result, "figures": summary(runs, options.pairs)}, options.out)
    print(f"written: {path}")
    return 0


def parsed(arguments: list[str]) -> argparse.Namespace:
    p = parser("data", __doc__)
    p.add_argument("--tokenizer", required=True, help="a tokenizer.json of byte-level BPE with <|endoftext|>")
    p.add_argument("--rows", required=True, nargs="+", help="JSONL(.gz) files: prompt, chosen, rejected as texts")
    p.add_argument("--peers", help="an environment that has TRL; without it TRL does not run")
    p.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="default: all")
    p.add_argument("--pairs", type=int, default=100_000, help="rows to prepare")
    p.add_argument(
        "--memory-pairs", type=int, default=1_000_000, help="rows whose memory is compared with --pairs rows"
    )
    p.add_argument("--longest", type=int, help="exclude rows with a text of more characters")
    p.add_argument("--plan-pairs", type=int, default=10_000_000, help="pairs of the planned epoch")
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--out", help="result file; default: rmcore/bench/results/data.json")
    return p.parse_args(arguments)


def measured(options: argparse.Namespace, directory: Path) -> Iterator[dict[str, Any]]:
    """Runs the arms in turn and yields the record of each run."""
    model = save_tokenizer(options.tokenizer, directory / "tokenizer")
    prepare = {"model": str(model), "max_tokens": MAX_TOKENS}
    rows = write_rows(options.rows, options.pairs, directory / "rows.jsonl", options.longest)
    for repetition in range(options.repeat):
        for arm in ("rmcore", "workers", "again", "map", "trl"):
            needed = arm in options.arms or (arm == "rmcore" and {"workers", "again", "memory"} & {*options.arms})
            if needed and (arm != "trl" or options.peers):
                cache = directory / f"{'rmcore' if arm == 'again' else arm}{repetition}"
                yield run(arm, options.peers, {**prepare, "rows": str(rows), "cache": str(cache)}, options.pairs)
    if "memory" in options.arms:
        many = write_rows(options.rows, options.memory_pairs, directory / "many.jsonl", options.longest)
        yield run(
            "rmcore", None, {**prepare, "rows": str(many), "cache": str(directory / "many")}, options.memory_pairs
        )
    for every_step in (False, True) if "plan" in options.arms else ():
        planned = {"pairs": options.plan_pairs, "every_step": every_step}
        yield run("plan", None, planned, options.plan_pairs) | {"every_step": every_step}


def run(arm: str, peers: str | None, settings: dict[str, Any], pairs: int) -> dict[str, Any]:
    child = Path(__file__).with_name("data_child.py")
    command = [f"{peers}/bin/python", str(child)] if arm == "trl" else own_child("rmcore.bench.data_child")
    record = {"arm": arm, "pairs": pairs, **run_child(command, 1, {"arm": arm, **settings})}
    print(
        f"{arm:<7} {pairs:>10,} pairs: {record['cpu_s']:.2f} CPU s, {record['wall_s']:.2f} s, "
        f"{record['peak_anonymous_mb']:,.0f} MB, other processes {record['others_share']:.0%}",
        flush=True,
    )
    return record


def save_tokenizer(file: str, directory: Path) -> Path:
    PreTrainedTokenizerFast(tokenizer_file=file, eos_token=EOS, pad_token="<|padding|>").save_pretrained(directory)
    GPTNeoXConfig(bos_token_id=0, eos_token_id=0).save_pretrained(directory)
    return directory


def write_rows(files: Sequence[str], count: int, path: Path, longest: int | None) -> Path:
    """Writes `count` rows of whole texts (chosen, rejected), each with its own number in the first human turn."""
    given = []
    for name in files:
        with gzip.open(name, "rt", encoding="utf-8") if name.endswith(".gz") else open(name, encoding="utf-8") as lines:
            given += [json.loads(line) for line in lines]
    sides = ("chosen", "rejected")
    given = [row for row in given if max(len(row["prompt"] + row[side]) for side in sides) <= (longest or sys.maxsize)]
    with open(path, "w", encoding="utf-8") as out:
        for number in range(count):
            row = given[number % len(given)]
            prompt = row["prompt"].replace("\n\nHuman:", f"\n\nHuman: No. {number}.", 1)
            out.write(json.dumps({side: prompt + row[side] for side in sides}) + "\n")
    return path


def summary(runs: list[dict[str, Any]], pairs: int) -> dict[str, Any]:
    """Pairs per CPU second by arm and their ratios, seconds of the second start, memory, planning."""
    found: dict[str, Any] = {}
    for arm in ("rmcore", "map", "trl"):
        of_arm = [r for r in runs if r["arm"] == arm and r["pairs"] == pairs]
        if of_arm:
            found[f"{arm}_pairs_per_cpu_s"] = spread([pairs / r["cpu_s"] for r in of_arm])
            found[f"{arm}_kept"] = of_arm[0]["kept"]
    if workers := [r for r in runs if r["arm"] == "workers"]:
        one = undisturbed([r for r in runs if r["arm"] == "rmcore" and r["pairs"] == pairs])
        found["workers"] = workers[0]["workers"]
        found["workers_s"], found["one_core_s"] = (
            spread([r["wall_s"] for r in rs]) for rs in (undisturbed(workers), one)
        )
        found["workers_cpu_s"] = spread([r["cpu_s"] for r in workers])  # of all processes together
        linear = found["one_core_s"]["median"] / found["workers"]
        found["workers_share_of_linear"] = linear / found["workers_s"]["median"]
    for peer in ("map", "trl"):
        if "rmcore_pairs_per_cpu_s" in found and f"{peer}_pairs_per_cpu_s" in found:
            rates = [found[f"{arm}_pairs_per_cpu_s"]["median"] for arm in ("rmcore", peer)]
            found[f"times_{peer}"] = rates[0] / rates[1]
    if again := [r for r in runs if r["arm"] == "again"]:
        found["second_start_s"] = spread([r["wall_s"] for r in undisturbed(again)])
        found["second_start_cpu_s"] = spread([r["cpu_s"] for r in again])
    sizes = sorted({r["pairs"] for r in runs if r["arm"] == "rmcore"})
    for kind in ("peak_anonymous_mb", "peak_rss_mb"):  # resident memory includes pages of mapped files
        found[kind] = {str(n): max(r[kind] for r in runs if r["arm"] == "rmcore" and r["pairs"] == n) for n in sizes}
    for r in (r for r in runs if r["arm"] == "plan"):
        name = "plan_every_step_cut" if r["every_step"] else "plan"
        found[name] = {key: r[key] for key in ("wall_s", "cpu_s", "steps", "peak_anonymous_mb")}
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
