"""`python -m rmcore.bench kernels`: the ops' kernels against the same function in PyTorch, eager and compiled.

Enters: the machine. Leaves: a table on the screen, and a JSON file of rows: op, device, dtype, sizes, threads, then for
each implementation forward and forward + backward (milliseconds: median, least, most of the runs), the bytes that must
move over the measured copy bandwidth, and peak memory. Implementations take turns, so that a busy moment hits all.

Example of a row: ragged_attention, cpu fp32, 8 comparisons, T = 2450, 4 heads of 32, 1 thread: rmcore 11.4 ms forward
and backward, eager PyTorch (one call a segment) 28.1 ms. No other public package has these ops (Liger Kernel's
preference losses start from logits over the vocabulary), so none stands in the table.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rmcore.ops as ops
from rmcore.bench.kernel_cases import Case, attention_case, cases, pairwise_case
from rmcore.bench.measure import Clock, add_up, machine, spread, write_results
from rmcore.host.memory import keep_freed_memory

Row = dict[str, Any]


def milliseconds(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def peak_memory(call: Callable[[], Any], device: str) -> int | None:
    """Bytes that the call holds at most beyond what is there before it; None where the system does not tell."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak that the kernel keeps (proc(5))

        def kilobytes(field: str) -> int:
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith(field)).split()[1])

        before = kilobytes("VmRSS")
        call()
        return 1024 * max(0, kilobytes("VmHWM") - before)
    except OSError:
        return None


def copy_bandwidth(device: str, megabytes: int = 64) -> float:
    """Bytes a second of copying memory that is already there, read and written counted both: the best of 10."""
    source = torch.randint(0, 100, (megabytes << 20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source).copy_(source)
    return 2 * source.numel() / (1e-3 * min(milliseconds(lambda: target.copy_(source), device) for _ in range(10)))


def measure(case: Case, device: str, runs: int, bandwidth: float) -> Row:
    """Every implementation in turn, `runs` times, forward alone and with the backward."""
    todo: dict[str, Callable[[], Any]] = {}
    for name, call in case.calls.items():
        todo[f"{name} forward"] = torch.no_grad()(call)
        todo[f"{name} both"] = partial(with_backward, case, call)
    todo |= {name: torch.no_grad()(part) for name, part in case.parts.items()}
    times: dict[str, list[float]] = {name: [] for name in todo}
    for call in [*todo.values()] * 2:  # two turns to warm up
        call()
    clock = Clock()
    for _ in range(runs):
        for name, call in todo.items():
            times[name].append(milliseconds(call, device))
    disturbed = add_up([clock.lap()])["others_share"]
    median = {name: statistics.median(values) for name, values in times.items()}
    bytes_moved = {"forward": case.forward_bytes, "both": case.both_bytes}
    return {
        "op": case.op, "device": device, "dtype": str(case.dtype).removeprefix("torch."), "sizes": case.sizes,
        "threads": torch.get_num_threads(), "ms": {name: spread(values) for name, values in times.items()},
        "speedup": {
            f"{peer} {what}": median[f"{peer} {what}"] / median[f"rmcore {what}"]
            for peer in case.calls if peer != "rmcore" for what in bytes_moved
        },
        "bytes": bytes_moved,
        "of_copy_bandwidth": {
            what: moved / (1e-3 * median[f"rmcore {what}"]) / bandwidth for what, moved in bytes_moved.items()
        },
        "peak_bytes": {name: peak_memory(todo[f"{name} both"], device) for name in case.calls},
        "others_share": disturbed,
    }  # fmt: skip


def with_backward(case: Case, call: Callable[[], Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(call(), case.leaves, case.grad)


def line(row: Row) -> str:
    sizes = " ".join(f"{key}={value}" for key, value in row["sizes"].items())
    text = f"{row['op']:<17}{row['device']:<5}{row['dtype']:<9}{sizes:<38}{row['threads']:>3} thr"
    for name in (key.removesuffix(" both") for key in row["ms"] if key.endswith(" both")):
        forward, both = (row["ms"][f"{name} {what}"] for what in ("forward", "both"))
        text += f" | {name} {forward['median']:.3f} / {both['median']:.3f} [{both['least']:.3f} {both['most']:.3f}]"
    text += " | " + ", ".join(f"{name} x{value:.2f}" for name, value in row["speedup"].items())
    share = row["of_copy_bandwidth"]
    text += f" | of copy bandwidth {100 * share['forward']:.0f} % / {100 * share['both']:.0f} %"
    parts = [name for name in row["ms"] if not name.endswith((" forward", " both"))]
    return text + "".join(f" | {name} {row['ms'][name]['median']:.3f}" for name in parts)


def worth_in_a_step(layers: int, D: int, H: int) -> Row:
    """What the two ops are of a training step of a Pythia shape: its matrix products measured, attention, the loss.

    A step is taken as the projections' forward and backward (24 T D^2 multiplications and additions a layer, three
    times), attention, and the loss; norms, activations and the optimizer come on top, so the shares are upper bounds.
    """
    attention = attention_case(H, H, D // H, 8, torch.float32)
    T = attention.sizes["T"]
    loss = pairwise_case(T, D, 16, torch.float32, "cpu", compiled=False)
    shapes = ((D, 3 * D), (D, D), (D, 4 * D), (4 * D, D))
    pairs = [(torch.randn(T, i, requires_grad=True), torch.randn(i, o, requires_grad=True)) for i, o in shapes]

    def projections() -> None:
        for x, w in pairs:
            (x @ w).backward(torch.ones(T, w.shape[1]))

    timed: dict[str, Callable[[], Any]] = {"projections": projections}
    for case in (attention, loss):
        for name, call in case.calls.items():
            timed[f"{case.op} {name}"] = partial(with_backward, case, call)
    for call in timed.values():
        call()
    ms = {name: statistics.median(milliseconds(call, "cpu") for _ in range(7)) for name, call in timed.items()}
    ours, eager = (
        layers * (ms["projections"] + ms[f"ragged_attention {name}"]) + ms[f"pairwise_loss {name}"]
        for name in ("rmcore", "eager")
    )
    return {
        "layers": layers, "D": D, "T": T, "threads": torch.get_num_threads(), "ms": ms,
        "attention_share": layers * ms["ragged_attention rmcore"] / ours,
        "attention_share_eager": layers * ms["ragged_attention eager"] / eager,
        "loss_share": ms["pairwise_loss rmcore"] / ours, "step_speedup": eager / ours,
    }  # fmt: skip


def worth_line(worth: Row) -> str:
    return (
        f"of a step, {worth['layers']} layers, D={worth['D']}, {worth['threads']} threads: "
        f"attention {100 * worth['attention_share']:.0f} % "
        f"(composed from PyTorch calls: {100 * worth['attention_share_eager']:.0f} %), "
        f"the loss {100 * worth['loss_share']:.2f} %; both fused: the step x{worth['step_speedup']:.2f}"
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m rmcore.bench kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few sizes, few runs, no torch.compile: seconds")
    parser.add_argument("--runs", type=int, help="measured turns a size (default 25; 5 with --quick)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts, CPU only")
    parser.add_argument("--out", help="the JSON file (default rmcore/bench/results/kernels-<device>.json)")
    options = parser.parse_args(arguments)
    runs = options.runs or (5 if options.quick else 25)
    record: Row = {"machine": machine(), "ops": ops.describe(), "runs": runs, "rows": [], "worth": []}
    print(record["ops"], "\nmilliseconds: forward / forward and backward [least, most]")
    if options.device == "cpu":
        record["freed_memory_is_kept"] = keep_freed_memory()
    for threads in options.threads if options.device == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        bandwidth = copy_bandwidth(options.device)
        record.setdefault("copy_bandwidth", {})[threads] = bandwidth
        print(f"copy bandwidth, {threads} threads: {bandwidth / 1e9:.1f} GB/s")
        for case in cases(options.device, options.quick):
            record["rows"].append(measure(case, options.device, runs, bandwidth))
            print(line(record["rows"][-1]), flush=True)
        if options.device == "cpu":
            for layers, D, H in ((6, 128, 4), (6, 512, 8)):
                worth = worth_in_a_step(layers, D, H)
                record["worth"].append(worth)
                print(worth_line(worth), flush=True)
    print("written:", write_results(f"kernels-{options.device}", record, options.out))
    return 0
