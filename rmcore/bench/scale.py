"""Measures what a billion pairs on 1,024 ranks need from the host, as far as one machine without GPUs can.

Input: prepared rows; their lengths represent those of all pairs.
Output: the cost of a start on each rank (seconds, and bytes per pair of the step plan), measured up to 16 million pairs
in processes of their own and extrapolated by the slope of the two largest; the cost of a step (drawing its comparisons,
cutting it into ranks); the idle share of the ranks by imbalance; the bytes per pair of the cache's metadata. The seeds
are in the record.
Example: 10^9 pairs, a step of 16,384: drawn in a millisecond.

A start is measured with both orders: the one that is held in memory, up to HELD_AT_MOST comparisons (see
rmcore.data.batches.step_plan), and the keyed one beyond, which is computed step by step. The idle share is the part of
the ranks' time in which they wait for the busiest; 0 is best.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from rmcore.bench.measure import machine, own_child, parser, report, run_child, spread, write_results
from rmcore.config import load_config
from rmcore.data.batches import step_plan
from rmcore.data.batches.step_plan import KeyedOrder, Plan, cut, work
from rmcore.data.tokens.comparisons import ARRAYS
from rmcore.training.run_data import prepared

SEED = 20250101
BUDGET = 16384  # tokens of a micro batch
SIZES = (1_000_000, 4_000_000, 16_000_000)
STEPS = 12  # steps that are cut for each result


def main(arguments: list[str]) -> int:
    p = parser("scale", __doc__)
    p.add_argument("--model", required=True, help="directory with a tokenizer")
    p.add_argument("--data", required=True, nargs="+", help="files of preference rows, from whose lengths are drawn")
    p.add_argument("--template", default="none")
    p.add_argument("--pairs", type=int, default=10**9)
    p.add_argument("--ranks", type=int, default=1024)
    p.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of pairs of the measured starts")
    p.add_argument("--each", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="pairs per step on each rank")
    p.add_argument("--out", help="result file; default: rmcore/bench/results/scale.json")
    options = p.parse_args(arguments)
    tokens_N, metadata, text = lengths(options)
    settings = {
        "pairs": options.pairs,
        "ranks": options.ranks,
        "seed": SEED,
        "budget": BUDGET,
        "rows": len(tokens_N),
        "data": [Path(name).name for name in options.data],
    }
    held = [start(size, options.ranks, tokens_N, keyed=False) for size in options.sizes]
    keyed = [start(size, options.ranks, tokens_N, keyed=True) for size in options.sizes]
    record = {
        "what": "scale",
        "machine": machine(),
        "settings": settings,
        "tokens": {**spread([float(n) for n in tokens_N]), "mean": float(tokens_N.mean())},
        "metadata_bytes_a_pair": metadata,
        "token_bytes_a_pair": text,
        "held_order": {"starts": held, "extrapolated": extrapolated(held, options.pairs)},
        "keyed_order": {"starts": keyed, "extrapolated": extrapolated(keyed, options.pairs)},
        "step": keyed_step(options.pairs, 16 * options.ranks, tokens_N, options.ranks),
        "balance": [balance(tokens_N, options.ranks, each) for each in options.each],
    }
    print(as_text(record))
    print(f"written: {write_results('scale', record, options.out)}")
    return 0


def lengths(options: argparse.Namespace) -> tuple[np.ndarray, float, float]:
    """Computed tokens of the real comparisons; bytes per pair of the cache's metadata, and of its tokens."""
    sources = "[" + ", ".join(f"{{path: {json.dumps(name)}}}" for name in options.data) + "]"
    overrides = [f"model.name={options.model}", f"data.train={sources}", f"data.template={options.template}"]
    train = prepared(load_config(None, [*overrides, "data.max_tokens=1024", "run.evals=0"]))[1].train
    pairs = int(train.pairs_N.sum())
    metadata = sum(getattr(train, name).nbytes for name in ARRAYS if name != "tokens")
    return train.tokens_N, metadata / pairs, train.tokens.nbytes / pairs


def start(size: int, ranks: int, tokens_N: np.ndarray, *, keyed: bool) -> dict[str, float]:
    """One start with `size` pairs, in a process of its own."""
    settings = {"size": size, "ranks": ranks, "keyed": keyed, "lengths": tokens_N.tolist()}
    return run_child(own_child("rmcore.bench.scale"), 1, settings)


def measured_start(settings: dict[str, Any]) -> dict[str, float]:
    """What one rank does before its first step, once the lengths are mapped; in CPU seconds."""
    size, ranks = settings["size"], settings["ranks"]
    step_plan.HELD_AT_MOST = 0 if settings["keyed"] else size
    rng = np.random.default_rng(SEED)
    offset = np.concatenate([[0], np.cumsum(rng.choice(np.array(settings["lengths"]), size))])  # as in the cache
    one = np.arange(size + 1)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the high-water mark
    before, began = resident(), time.process_time()
    tokens_N, pairs_N = np.diff(offset), np.diff(one)
    weight_N = np.add.reduceat(np.ones(size, dtype=np.float32), one[:-1], dtype=np.float64)
    plan = Plan(
        tokens_N, work(tokens_N), pairs_N, weight_N, pairs_per_step=16 * ranks, token_budget=BUDGET,
        world_size=ranks, seed=SEED,
    )  # fmt: skip
    planned = time.process_time()
    plan.step(0)
    first = time.process_time()
    peak = resident("VmHWM")
    return {
        "pairs": size,
        "seconds": planned - began,
        "first_step_seconds": first - planned,
        "bytes_a_pair": (resident() - before) / size,
        "peak_bytes_a_pair": (peak - before) / size,
    }


def resident(field: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def extrapolated(starts: list[dict[str, float]], pairs: int) -> dict[str, float]:
    """The start with `pairs` pairs, on the line through the two largest measured starts."""
    one, two = sorted(starts, key=lambda found: found["pairs"])[-2:]
    slope = (two["seconds"] - one["seconds"]) / (two["pairs"] - one["pairs"])
    return {
        "pairs": pairs,
        "seconds": two["seconds"] + slope * (pairs - two["pairs"]),
        "bytes_a_rank": two["bytes_a_pair"] * pairs,
        "peak_bytes_a_rank": two["peak_bytes_a_pair"] * pairs,
    }


def keyed_step(pairs: int, a_step: int, tokens_N: np.ndarray, ranks: int) -> dict[str, float]:
    """Seconds to draw a step of `a_step` comparisons out of `pairs`, and to cut it into ranks."""
    drawing, cutting = [], []
    for step in range(STEPS):
        began = time.perf_counter()
        chosen = KeyedOrder(pairs, SEED, 0)[step * a_step : (step + 1) * a_step]
        drawn = time.perf_counter()
        tokens = tokens_N[chosen % len(tokens_N)]
        cut(chosen, tokens, work(tokens), BUDGET, ranks)
        drawing.append(drawn - began)
        cutting.append(time.perf_counter() - drawn)
    return {"draw_seconds": float(np.median(drawing)), "cut_seconds": float(np.median(cutting))}


def balance(tokens_N: np.ndarray, ranks: int, each: int) -> dict[str, float]:
    """The idle share of `ranks` ranks with a mean of `each` pairs per rank and step, over STEPS steps of drawn lengths.

    `idle`: ranks wait for the busiest at the end of the step (ddp, zero1, zero2); `idle_micro`: after every micro batch
    (zero3 and hsdp gather each layer together).
    """
    rng = np.random.default_rng(SEED + each)
    idle, idle_micro, seconds, micro = [], [], [], 0
    for _ in range(STEPS):
        tokens = rng.choice(tokens_N, each * ranks)
        cost = work(tokens)
        began = time.perf_counter()
        parts = cut(np.arange(len(tokens)), tokens, cost, BUDGET, ranks)
        seconds.append(time.perf_counter() - began)
        cost_RM = np.array([[cost[numbers].sum() for numbers in rank] for rank in parts])
        micro = max(micro, cost_RM.shape[1])
        mean = cost_RM.sum() / ranks
        idle.append(1 - mean / cost_RM.sum(1).max())
        idle_micro.append(1 - mean / cost_RM.max(0).sum())
    return {
        "pairs_a_rank": each,
        "micro_batches": micro,
        "idle": float(np.mean(idle)),
        "idle_micro": float(np.mean(idle_micro)),
        "cut_seconds": float(np.median(seconds)),
    }


def as_text(record: dict[str, Any]) -> str:
    """The results as lines and a table."""
    settings, step = record["settings"], record["step"]
    lines = [
        f"metadata: {record['metadata_bytes_a_pair']:.0f} bytes per pair in addition to "
        f"{record['token_bytes_a_pair']:.0f} of tokens; mapped, one copy per host",
    ]
    for order in ("held_order", "keyed_order"):
        far = record[order]["extrapolated"]
        lines += [
            f"{order.replace('_', ' ')}, {one['pairs']:,} pairs: start {one['seconds']:.2f} s, on every rank "
            f"{one['bytes_a_pair']:.0f} bytes per pair (peak {one['peak_bytes_a_pair']:.0f}); first step "
            f"{one['first_step_seconds']:.3f} s"
            for one in record[order]["starts"]
        ]
        lines.append(
            f"{order.replace('_', ' ')}, extrapolated to {far['pairs']:,}: {far['seconds']:.0f} s, "
            f"{far['bytes_a_rank'] / 2**30:.0f} GiB per rank (peak {far['peak_bytes_a_rank'] / 2**30:.0f})"
        )
    lines += [
        f"step of {16 * settings['ranks']:,} of {settings['pairs']:,} pairs: drawn in "
        f"{1e3 * step['draw_seconds']:.1f} ms, cut in {1e3 * step['cut_seconds']:.0f} ms",
        "",
        f"| pairs per rank and step, {settings['ranks']:,} ranks | micro batches | idle | idle, zero3 | cutting, ms |",
        "|--:|--:|--:|--:|--:|",
        *(
            f"| {one['pairs_a_rank']} | {one['micro_batches']} | {one['idle']:.1%} | {one['idle_micro']:.1%} | "
            f"{1e3 * one['cut_seconds']:.0f} |"
            for one in record["balance"]
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    report(measured_start(json.loads(sys.argv[-1])))
