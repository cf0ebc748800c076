"""Measures how the time of a training step divides into kinds of work and operations.

Input: a model directory and rows.
Output: a table, a JSON file, and with --trace a file for Perfetto or chrome://tracing.
Example: `matrix products 71 %, attention 9 %, elementwise 8 %, optimizer 5 %, ...`; 112 of 170 GFLOP/s, 66 %.

Ratio: the useful FLOP/s over the rate of a large matrix product, [1536, 1536] x [1536, 1536], which is timed after each
step, because both vary with what else the machine does; 66 % means that a step that does nothing but such products
would take 0.66 of the time. Useful are the FLOPs of the model's products and of visible attention. The ratio is the
median over as many steps before the profile, so it contains no time of the profiler.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from rmcore.bench.measure import add_up, machine, parser, write_results
from rmcore.bench.train_rmcore import Stopwatch, config_of, flops_of_step
from rmcore.checkpoint.resume import choose_start
from rmcore.data.batches.batch import build_batch
from rmcore.parallel.world import running_world
from rmcore.train import train
from rmcore.training.assembly import assemble

# An operation belongs to the first kind of which a part occurs in its name.
KINDS = {
    "attention": ("ragged_attention", "varlen", "flash", "_softmax", "gather_prefix"),
    "loss": ("pairwise",),
    "optimizer": ("_fused_adamw", "adam"),
    "gradient norm and clipping": ("linalg_vector_norm", "_foreach_norm", "_foreach_mul", "clip"),
    "embedding": ("embedding", "index_add"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "gemm", "nvjet", "cutlass"),
    "zeros and copies": (
        "aten::fill_",
        "aten::copy_",
        "aten::zero_",
        "aten::clone",
        "aten::cat",
        "aten::_to_copy",
        "Memcpy",
        "Memset",
    ),
    "collectives": ("gloo", "nccl", "c10d", "all_reduce", "reduce_scatter", "all_gather"),
    "elementwise": ("aten::",),
}
WARM = 40  # steps before: in bf16 oneDNN compiles products for each number of rows, until it has met nearly all of them
SIDE = 1536  # of the square matrices of the product that a step is compared with


def main(arguments: list[str]) -> int:
    p = parser("profile", __doc__)
    p.add_argument("--model", required=True, help="directory of a sequence-classification model, or `synthetic`")
    p.add_argument("--data", required=True, help="JSONL file of whole texts: chosen, rejected; or `synthetic`")
    p.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    p.add_argument("--batch", type=int, default=8, help="pairs per step")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--rows", type=int, default=20, help="operations in the table")
    p.add_argument("--trace", help="file for the trace (.json)")
    p.add_argument("--out", help="result file; default: rmcore/bench/results/profile.json")
    options = p.parse_args(arguments)
    record = profile(options)
    print(table(record, options.rows))
    print(f"written: {write_results('profile', record, options.out)}")
    return 0


def profile(options: argparse.Namespace) -> dict[str, Any]:
    """Times `steps` steps of the real loop after WARM steps, and profiles as many that follow."""
    torch.set_num_threads(options.threads)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    settings = {"model": options.model, "data": options.data, "precision": options.precision, "batch": options.batch}
    settings |= {"epochs": 1000, "max_steps": WARM + 2 * options.steps}
    with tempfile.TemporaryDirectory(prefix="rmcore-bench-") as directory, running_world(600.0, 42) as world:
        config = config_of(settings, directory)
        run = assemble(config, world, choose_start(config, world))
        timed = range(WARM, (WARM + run.plan.steps) // 2)
        seen = profiler(activities=activities)

        class Watch(Stopwatch):
            """Starts the profile after the timed steps and stops it after the last step, before anything is saved."""

            def step_done(self, step: int) -> None:
                super().step_done(step)
                if world.device.type == "cpu" and step <= timed.stop:
                    begin = time.perf_counter()
                    torch.mm(square, square)
                    products.append(2.0 * SIDE**3 / (time.perf_counter() - begin))
                    self._clock.lap()  # the next lap begins behind the product
                if step == timed.stop:
                    seen.start()
                if step == run.plan.steps:
                    seen.stop()

        square = torch.randn(SIDE, SIDE).to({"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision])
        products: list[float] = []  # FLOP/s of the product after each step
        watch = Watch()
        train(run, watch)
        steps, rates = len(watch.laps) - timed.stop, []
        if products:  # rmcore.bench gpu measures the rate of a GPU
            for step in timed:
                some = [build_batch(run.data.train, micro, run.share) for micro in run.plan.step(step).ranks[0]]
                useful = sum(flops_of_step(run, batch) for batch in some) / watch.laps[step]["wall_s"]
                rates.append((useful, 0.5 * (products[step - 1] + products[step])))  # the products around the step
    if options.trace:
        seen.export_chrome_trace(options.trace)
    names = {"model": Path(options.model).name, "data": Path(options.data).name, "threads": options.threads}
    record: dict[str, Any] = {"what": "profile", "machine": machine(), "lines": run.lines}
    record |= {
        "settings": {**settings, **names},
        **medians(rates),
        "others_share": add_up(watch.laps[timed.start : timed.stop])["others_share"],
    }
    return {**record, "steps": steps, **shares(seen.key_averages(), steps, torch.cuda.is_available())}


def medians(rates: list[tuple[float, float]]) -> dict[str, float]:
    """Of the FLOP/s of steps and of the products around them: the medians, and those of their ratios with quartiles."""
    if not rates:
        return {}
    low, middle, high = statistics.quantiles([useful / product for useful, product in rates], n=4)
    useful, product = (1e-9 * statistics.median(column) for column in zip(*rates, strict=True))
    return {"useful_gflops": useful, "matrix_gflops": product, "ratio": middle, "ratio_q1": low, "ratio_q3": high}


def shares(events: Iterable[Any], steps: int, on_gpu: bool) -> dict[str, Any]:
    """The profiler's averages as shares of the time (of the GPU's, if there is one): by kind, and by operation."""
    total_us: dict[str, float] = {}
    calls: dict[str, int] = {}
    for event in events:
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent > 0 and not event.key.startswith(("Profiler", "Optimizer.step#")):
            total_us[event.key] = total_us.get(event.key, 0.0) + spent
            calls[event.key] = event.count
    whole = sum(total_us.values())
    kinds: dict[str, float] = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, spent in total_us.items():
        kinds[kind_of(name)] += spent / whole
    operations = [
        {
            "name": name,
            "share": total_us[name] / whole,
            "ms_a_step": 1e-3 * total_us[name] / steps,
            "calls_a_step": calls[name] / steps,
        }
        for name in sorted(total_us, key=total_us.__getitem__, reverse=True)[:40]
    ]
    return {"ms_a_step": 1e-3 * whole / steps, "kinds": kinds, "operations": operations}


def kind_of(operation: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in operation for part in parts)), "other")


def table(record: dict[str, Any], rows: int) -> str:
    """The shares as Markdown."""
    lines = ["| kind of work | share |", "|---|--:|"]
    lines += [f"| {kind} | {share:.1%} |" for kind, share in sorted(record["kinds"].items(), key=lambda one: -one[1])]
    lines += ["", "| operation | share | ms per step | calls per step |", "|---|--:|--:|--:|"]
    lines += [
        f"| {one['name']} | {one['share']:.1%} | {one['ms_a_step']:.2f} | {one['calls_a_step']:.0f} |"
        for one in record["operations"][:rows]
    ]
    if rate := record.get("matrix_gflops"):
        ratio, low, high = (record[name] for name in ("ratio", "ratio_q1", "ratio_q3"))
        lines += [
            "",
            f"Useful work: {record['useful_gflops']:.0f} GFLOP/s, {ratio:.0%} (quartiles {low:.0%} and {high:.0%}) of "
            f"the {rate:.0f} of a large matrix product",
        ]
    return "\n".join(lines)
