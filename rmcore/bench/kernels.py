"""Measures the ops' kernels, compared with the same functions in PyTorch, eager and compiled.

Input: this machine.
Output: a table on the screen; JSON rows with op, device, dtype, sizes and threads, and for each implementation
milliseconds of the forward and of forward + backward (median, least, most), the bytes that must move over the measured
copy bandwidth, and peak memory.
Example: ragged_attention, cpu fp32, 8 comparisons, T = 2450, 4 heads of 32, 1 thread: forward and backward take rmcore
11.4 ms, eager PyTorch (one call per segment) 28.1 ms.

Ratio: PyTorch's median time over rmcore's; 2 means that rmcore takes half the time. The share of copy bandwidth is the
rate at which rmcore moves the bytes that must move, over that of copying memory; above 100 % part of them stays in a
cache.

The implementations alternate, so that a busy moment slows all of them. No other public package has these ops (Liger
Kernel's preference losses start from logits over the vocabulary), so the table has none.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rmcore.ops as ops
from rmcore.bench.measure import Clock, add_up, machine, parser, spread, write_results
from rmcore.host.memory import keep_freed_memory
from rmcore.model.attention import composed_attention
from rmcore.ops.biased_gelu import biased_gelu
from rmcore.ops.gather_prefix import gather_plan, gather_prefix_kv
from rmcore.ops.pairwise import pairwise_loss
from rmcore.ops.ragged_attention import ragged_attention
from rmcore.ops.rotate_gather import rotate_gather

Row = dict[str, Any]


def main(arguments: list[str]) -> int:
    p = parser("kernels", __doc__)
    p.add_argument("--quick", action="store_true", help="few sizes, few runs, no torch.compile: takes seconds")
    p.add_argument("--runs", type=int, help="measured turns per size (default 25; 5 with --quick)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts, CPU only")
    p.add_argument("--out", help="the JSON file (default rmcore/bench/results/kernels-<device>.json)")
    options = p.parse_args(arguments)
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


# --- the cases -------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One op at one size, as each implementation computes it."""

    op: str
    sizes: dict[str, int]
    dtype: torch.dtype
    leaves: tuple[Tensor, ...]  # tensors whose gradients are computed
    calls: dict[str, Callable[[], Tensor]]  # by implementation, "rmcore" among them
    grad: Tensor | None  # upstream gradient; None for a scalar result
    forward_bytes: int  # that the forward must move: inputs read once, results written once
    both_bytes: int  # the same for forward and backward
    parts: dict[str, Callable[[], Any]]  # also timed: rmcore's kernels without autograd, and lower bounds


def pairwise_eager(hidden, score_weight, index, winner, loser, margin, weight):  # type: ignore[no-untyped-def]
    """The loss as one writes it in PyTorch."""
    rewards = hidden[index].float() @ score_weight.float()
    return -(weight * F.logsigmoid(rewards[winner] - rewards[loser] - margin)).sum()


def pairwise_case(T: int, D: int, A: int, dtype: torch.dtype, device: str, compiled: bool) -> Case:
    torch.manual_seed(0)
    hidden = torch.randn(T, D, dtype=dtype, device=device, requires_grad=True)
    score_weight = (torch.randn(D, device=device) / D**0.5).to(dtype).requires_grad_()
    index = torch.randperm(T, device=device)[:A].sort().values
    winner = torch.arange(0, A, 2, device=device)
    margin, weight = torch.zeros(A // 2, device=device), torch.ones(A // 2, device=device)
    inputs = (hidden, score_weight, index, winner, winner + 1, margin, weight)
    calls = {"rmcore": lambda: pairwise_loss(*inputs)[0], "eager": lambda: pairwise_eager(*inputs)}
    if compiled:
        torch._dynamo.reset()  # otherwise it stops compiling after eight shapes
        compiled_eager = torch.compile(pairwise_eager, dynamic=False)
        calls["compiled"] = lambda: compiled_eager(*inputs)
    plain = tuple(t.detach() for t in inputs)
    nothing = torch.zeros((), device=device, requires_grad=True)
    grad, scored = torch.randn(A, device=device), plain[0][index]
    parts = {
        "forward kernel": lambda: torch.ops.rmcore.pairwise_forward(*plain, 0.0, 0.0),
        "backward kernel": lambda: torch.ops.rmcore.pairwise_backward(grad, scored, plain[1], index, T),
        "zero fill of d hidden": lambda: torch.zeros(T, D, dtype=dtype, device=device),
        "autograd of one product": torch.enable_grad()(lambda: torch.autograd.grad(nothing * 1.0, nothing)),
    }
    read, size = A * D * dtype.itemsize, T * D * dtype.itemsize
    return Case(
        op="pairwise_loss",
        sizes={"T": T, "D": D, "answers": A},
        dtype=dtype,
        leaves=(hidden, score_weight),
        calls=calls,
        grad=None,
        forward_bytes=read,
        both_bytes=2 * read + size,
        parts=parts,
    )


def comparisons(count: int) -> list[tuple[int, int, int]]:
    """(prompt, chosen, rejected) lengths like those of HH pairs in Pythia's tokenizer: about 2,000 tokens for 8."""
    draw = random.Random(0)
    return [(draw.randint(80, 300), draw.randint(10, 90), draw.randint(10, 90)) for _ in range(count)]


def segments_of(lengths: list[tuple[int, int, int]]) -> Tensor:
    rows, start = [], 0
    for prompt, chosen, rejected in lengths:
        middle = start + prompt + chosen
        rows += [(start, middle, start, start), (middle, middle + rejected, start, start + prompt)]
        start = middle + rejected
    return torch.tensor(rows, dtype=torch.int32)


def attention_case(H: int, G: int, K: int, count: int, dtype: torch.dtype) -> Case:
    """attention_case(4, 4, 32, 8, torch.float32) is Pythia 14m's attention over 8 comparisons of about 300 tokens."""
    torch.manual_seed(0)
    segments = segments_of(comparisons(count))
    T = int(segments[-1, 1])
    q, k, v = (torch.randn(n, T, K).to(dtype).transpose(0, 1).requires_grad_() for n in (H, G, G))
    scale = K**-0.5
    calls = {
        "rmcore": lambda: ragged_attention(q, k, v, segments, scale, 0),
        "eager": lambda: composed_attention(q, k, v, segments, scale, 0),
    }
    moved = (2 * H + 2 * G) * T * K * dtype.itemsize
    sizes = {"comparisons": count, "T": T, "H": H, "G": G, "hd": K}
    return Case(
        op="ragged_attention",
        sizes=sizes,
        dtype=dtype,
        leaves=(q, k, v),
        calls=calls,
        grad=torch.randn(T, H, K).to(dtype),
        forward_bytes=moved,
        both_bytes=3 * moved,
        parts={},
    )


def gather_case(G: int, K: int, count: int, dtype: torch.dtype, device: str) -> Case:
    segments = segments_of(comparisons(count))
    T = int(segments[-1, 1])
    plan = gather_plan(segments).mapped(lambda t: t.to(device))
    k, v = (torch.randn(T, G, K, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    calls = {
        "rmcore": lambda: torch.stack(gather_prefix_kv(k, v, plan)),
        "eager": lambda: torch.stack([k.index_select(0, plan.key_index), v.index_select(0, plan.key_index)]),
    }
    M = plan.key_index.shape[0]
    moved = 2 * (T + M) * G * K * dtype.itemsize
    return Case(
        op="gather_prefix",
        sizes={"T": T, "keys": M, "G": G, "hd": K},
        dtype=dtype,
        leaves=(k, v),
        calls=calls,
        grad=torch.randn(2, M, G, K, dtype=dtype, device=device),
        forward_bytes=moved,
        both_bytes=2 * moved,
        parts={},
    )


def rotate_case(H: int, K: int, count: int, dtype: torch.dtype, device: str) -> Case:
    """Of a joined projection of GPT-NeoX, a quarter of each head turned. Eager: as transformers and autograd do it."""
    segments = segments_of(comparisons(count))
    T, R = int(segments[-1, 1]), K // 4
    plan = gather_plan(segments).mapped(lambda t: t.to(device))
    qkv = torch.randn(T, 3 * H * K, dtype=dtype, device=device, requires_grad=True)
    bias = torch.zeros(3 * H * K, dtype=dtype, device=device, requires_grad=True)
    angle = torch.rand(T, R // 2, device=device).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def turned(x: Tensor) -> Tensor:
        first, second = x[..., :R].chunk(2, -1)
        rotated = x[..., :R] * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
        return torch.cat([rotated, x[..., R:]], -1)

    def eager() -> Tensor:
        q, k, v = (qkv + bias).view(T, H, 3 * K).chunk(3, -1)
        return torch.cat([turned(q), turned(k).index_select(0, plan.key_index), v.index_select(0, plan.key_index)])

    M = plan.key_index.shape[0]
    moved = (4 * T + 2 * M) * H * K * dtype.itemsize
    return Case(
        op="rotate_gather",
        sizes={"T": T, "keys": M, "H": H, "hd": K},
        dtype=dtype,
        leaves=(qkv, bias),
        calls={"rmcore": lambda: torch.cat(rotate_gather(qkv, bias, cos, sin, plan, H)), "eager": eager},
        grad=torch.randn(T + 2 * M, H, K, dtype=dtype, device=device),
        forward_bytes=moved,
        both_bytes=2 * moved,
        parts={},
    )


def gelu_case(T: int, D: int, dtype: torch.dtype, device: str) -> Case:
    """GELU of an output of a linear layer, and the gradient of its bias."""
    pre = torch.randn(T, D, dtype=dtype, device=device, requires_grad=True)
    bias = torch.zeros(D, dtype=dtype, device=device, requires_grad=True)
    size = T * D * dtype.itemsize
    return Case(
        op="biased_gelu",
        sizes={"T": T, "D": D},
        dtype=dtype,
        leaves=(pre, bias),
        calls={"rmcore": lambda: biased_gelu(pre, bias), "eager": lambda: F.gelu(pre + bias)},
        grad=torch.randn(T, D, dtype=dtype, device=device),
        forward_bytes=2 * size,
        both_bytes=5 * size,
        parts={},
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    """All ops of a device at the sizes that are measured."""
    dtypes = (torch.float32, torch.bfloat16)
    if device == "cuda":
        for dtype in dtypes:
            for T, D, A in ((8192, 4096, 8192), (65536, 4096, 8192), (32768, 2560, 128)):
                yield pairwise_case(T, D, A, dtype, device, not quick)
            for G, K in ((8, 128), (16, 80)):
                yield gather_case(G, K, 64, dtype, device)
                yield rotate_case(G, K, 64, dtype, device)
            yield gelu_case(26000, 8192, dtype, device)
        return
    for dtype in dtypes:
        for T, D, A in ((2048, 512, 16),) if quick else ((16384, 2560, 64), (2048, 512, 16)):
            yield pairwise_case(T, D, A, dtype, device, not quick)
        # The heads of Pythia 14m and 70m, of a small Llama, of Pythia 2.8b and of Llama 8B.
        shapes = ((4, 4, 32), (8, 8, 64), (8, 4, 32), (8, 8, 80), (8, 2, 128))
        for H, G, K in shapes[:1] if quick else shapes:
            yield attention_case(H, G, K, 8, dtype)


# --- the measurement -------------------------------------------------------------------------------------------------


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
    """The most bytes that the call holds in addition to those held before; None where the system does not report it."""
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
    """Bytes per second, read plus written, of copying memory that is already allocated: the best of 10."""
    source = torch.randint(0, 100, (megabytes << 20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source).copy_(source)
    return 2 * source.numel() / (1e-3 * min(milliseconds(lambda: target.copy_(source), device) for _ in range(10)))


def measure(case: Case, device: str, runs: int, bandwidth: float) -> Row:
    """Every implementation in turn, `runs` times: the forward, and forward with backward."""
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
    others_share = add_up([clock.lap()])["others_share"]
    median = {name: statistics.median(values) for name, values in times.items()}
    bytes_moved = {"forward": case.forward_bytes, "both": case.both_bytes}
    return {
        "op": case.op,
        "device": device,
        "dtype": str(case.dtype).removeprefix("torch."),
        "sizes": case.sizes,
        "threads": torch.get_num_threads(),
        "ms": {name: spread(values) for name, values in times.items()},
        "speedup": {
            f"{peer} {what}": median[f"{peer} {what}"] / median[f"rmcore {what}"]
            for peer in case.calls
            if peer != "rmcore"
            for what in bytes_moved
        },
        "bytes": bytes_moved,
        "of_copy_bandwidth": {
            what: moved / (1e-3 * median[f"rmcore {what}"]) / bandwidth for what, moved in bytes_moved.items()
        },
        "peak_bytes": {name: peak_memory(todo[f"{name} both"], device) for name in case.calls},
        "others_share": others_share,
    }


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
    """The shares of attention and loss in a training step of a Pythia shape.

    A step is taken as the projections' forward and backward (24 T D^2 multiplications and additions per layer, three
    times), attention, and the loss. Norms, activations and the optimizer come on top, so the shares are upper bounds.
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
        "layers": layers,
        "D": D,
        "T": T,
        "threads": torch.get_num_threads(),
        "ms": ms,
        "attention_share": layers * ms["ragged_attention rmcore"] / ours,
        "attention_share_eager": layers * ms["ragged_attention eager"] / eager,
        "loss_share": ms["pairwise_loss rmcore"] / ours,
        "step_speedup": eager / ours,
    }


def worth_line(worth: Row) -> str:
    return (
        f"of a step, {worth['layers']} layers, D={worth['D']}, {worth['threads']} threads: "
        f"attention {100 * worth['attention_share']:.0f} % "
        f"(composed of PyTorch calls: {100 * worth['attention_share_eager']:.0f} %), "
        f"the loss {100 * worth['loss_share']:.2f} %; both fused: the step x{worth['step_speedup']:.2f}"
    )
