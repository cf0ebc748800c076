"""Measures exactness, ceilings and training rates on one GPU, compared with a padded loop and TRL; takes minutes.

Input: this machine. Pythia shapes with random weights, and random tokens in the lengths of 256 real HH and TL;DR pairs
(lengths.json): no network, no tokenizer, no `datasets`. A whole run trains the embedded model.
Output: one JSON file of sections, each with its results or the error that ended it, the most valuable first: ceiling,
ops, exactness, run, kernels, train, profile, attention. Next to it, a file of the same name with `.jsonl` gets a line
for each result at once, so that a machine that goes away takes nothing with it.
Example: train of 1.4b on HH lengths: tokens per second, MFU, sharing ratio, peak memory, for rmcore, for a padded loop
over the same pairs, and for TRL's RewardTrainer where it is installed.

Ratio: none is computed; divide the pairs per second of two arms. `mfu_of_h100` is the share of an H100's dense bf16
peak. `within_twice_bf16` is true if the errors of every fast path in bf16 are at most twice those of the padded forward
in bf16, all compared with the padded forward in fp64.

`--tiny` runs every section on any machine in seconds, with small shapes.
"""

import gc
import importlib.util
import json
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig

from rmcore.bench.gpu_checks import WITHOUT_ORACLE, kernel_table, model_errors, small_models, whole_run, within_twice
from rmcore.bench.gpu_train import Rows, padded_run, rmcore_run, rows_of_lengths
from rmcore.bench.gpu_trl import python_with_trl, trl_run
from rmcore.bench.measure import machine, parser, write_results
from rmcore.data.batches.batch import AttentionLayout, build_batch
from rmcore.model.attention import attention_forward
from rmcore.model.layout_context import packed_layout
from rmcore.model.reward_model import RewardModel
from rmcore.model.selftest import choose_path
from rmcore.ops.biased_gelu import biased_gelu
from rmcore.ops.gather_prefix import gather_plan, gather_prefix_kv
from rmcore.ops.pairwise import pairwise_loss
from rmcore.ops.rotate_gather import rotate_gather
from rmcore.parallel.world import World, running_world

# Layers, width, heads and MLP width of EleutherAI's Pythia models.
SHAPES = {"410m": (24, 1024, 16, 4096), "1.4b": (24, 2048, 16, 8192), "2.8b": (32, 2560, 32, 10240)}
TINY = {"tiny": (2, 64, 2, 128)}
VOCABULARY = 50304


def neox(shape: tuple[int, int, int, int], vocabulary: int = VOCABULARY) -> PretrainedConfig:
    layers, width, heads, mlp = shape
    sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"intermediate_size": mlp, "vocab_size": vocabulary, "max_position_embeddings": 2048}
    return AutoConfig.for_model("gpt_neox", rotary_pct=0.25, pad_token_id=1, num_labels=1, **sizes)


class Bench:
    """What the sections share: the device, the sizes, and the time after which no run starts."""

    def __init__(
        self, world: World, tiny: bool, minutes: float, peers: str | None = None, lines: Path | None = None
    ) -> None:
        self.world, self.device, self.tiny = world, world.device, tiny
        self.trl, self._lines = python_with_trl(peers), lines
        self.cuda = self.device.type == "cuda"
        self.shapes = TINY if tiny else SHAPES
        self.vocabulary = 512 if tiny else VOCABULARY
        self.deadline = time.monotonic() + 60 * minutes
        lengths = json.loads(Path(__file__).with_name("lengths.json").read_text(encoding="utf-8"))
        self.rows = {
            name: rows_of_lengths(rows[: 16 if tiny else 256], self.vocabulary) for name, rows in lengths.items()
        }

    def note(self, name: str, found: dict[str, Any]) -> dict[str, Any]:
        """Print a result, and append it to the file of lines at once."""
        line = json.dumps({"what": name, **found})
        print(line, flush=True)
        if self._lines is not None:
            with self._lines.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        return found

    @property
    def late(self) -> bool:
        """Whether the time is over: nothing new starts."""
        return time.monotonic() > self.deadline

    def timed(self, call: Callable[[], Any], repeat: int = 10) -> float:
        """Seconds of a call: the best of `repeat` calls, after two to warm up."""
        repeat = 2 if self.tiny else repeat
        best = float("inf")
        for turn in range(repeat + 2):
            self.wait()
            begin = time.perf_counter()
            call()
            self.wait()
            best = min(best, time.perf_counter() - begin) if turn >= 2 else best
        return best

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def model(self, config: PretrainedConfig) -> RewardModel:
        torch.manual_seed(0)
        with torch.device(self.device):
            hf_model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        return RewardModel(hf_model.base_model, hf_model.score, pad_token_id=1)

    def half(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def ceiling(bench: Bench) -> dict[str, Any]:
    """The rates that the machine reaches: bf16 matrix products, and a copy."""
    size = 256 if bench.tiny else 8192
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    product = bench.timed(lambda: a @ b)
    source = torch.empty((1 << 20) if bench.tiny else (1 << 30), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copied = bench.timed(lambda: target.copy_(source))
    found = {"matrix_tflops": 2e-12 * size**3 / product, "copy_tb_per_s": 2e-12 * source.numel() / copied}
    if not bench.cuda:
        return found
    memory = torch.cuda.get_device_properties(bench.device).total_memory
    versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "nccl": torch.cuda.nccl.version()}
    return found | {"memory_gb": memory / 1e9, "versions": versions}


# Query and key heads, sizes of keys and values, window, soft cap, sinks.
ATTENTION = (
    (8, 8, 128, 128, 0, 0.0, False),
    (8, 2, 128, 128, 64, 0.0, False),
    (4, 4, 80, 80, 0, 0.0, False),
    (4, 1, 256, 256, 0, 0.0, False),
    (8, 4, 256, 256, 64, 5.0, False),
    (8, 4, 128, 128, 0, 5.0, False),
    (4, 4, 80, 80, 0, 0.0, True),
    (8, 1, 64, 64, 64, 0.0, True),
    (4, 2, 192, 128, 0, 0.0, True),
)


def ops(bench: Bench) -> dict[str, Any]:
    """Relative errors of the ops on this device, compared with their references in fp64: results and gradients."""
    found: dict[str, Any] = {}
    batch = build_batch(bench.rows["hh"].data, range(8)).on(bench.device)
    tokens, rows_A = batch.computed_tokens, batch.last_token_index_A
    pairs = batch.winner_P, batch.loser_P, batch.margin_P, batch.weight_P
    plan = gather_plan(batch.layout.segments_S4).mapped(lambda index: index.to(bench.device))

    def errors(call: Callable[..., Any], *inputs: Tensor) -> dict[str, float]:
        results = []
        for dtype in (inputs[0].dtype, torch.float64):
            given = [x.detach().to(dtype).requires_grad_() for x in inputs]
            out = call(*given)
            out = torch.cat([x.double().flatten() for x in (out if isinstance(out, tuple) else (out,))])
            upstream = torch.linspace(-1.0, 1.0, out.numel(), device=out.device, dtype=out.dtype)
            results.append([out.detach(), *torch.autograd.grad(out, given, upstream)])
        offs = [
            float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300))
            for a, b in zip(*results, strict=True)
        ]
        return {"result_off": offs[0], "gradients_off": max(offs[1:])}

    for kind in (torch.float32, torch.bfloat16):
        for size in (128, 2560) if bench.tiny else (128, 2560, 16384):
            inputs = (torch.randn(n, size, device=bench.device, dtype=kind).squeeze(0) for n in (tokens, 1))
            call = partial(lambda hidden, head: pairwise_loss(hidden, head, rows_A, *pairs))
            name = f"pairwise {size} {kind}"
            found[name] = bench.note(name, errors(call, *inputs))
            if size == 128:
                for name, index_A in (("no answers", rows_A[:0]), ("each answer twice", rows_A.repeat(2))):
                    inputs = (torch.randn(n, size, device=bench.device, dtype=kind).squeeze(0) for n in (tokens, 1))
                    few = [x[:0] if not index_A.numel() else x for x in pairs]
                    call = partial(lambda hidden, head, a, p: pairwise_loss(hidden, head, a, *p), a=index_A, p=few)
                    name = f"pairwise, {name} {kind}"
                    found[name] = bench.note(name, errors(call, *inputs))
        key, value = (torch.randn(tokens, 4, 80, device=bench.device, dtype=kind) for _ in range(2))
        name = f"gather {kind}"
        found[name] = bench.note(name, errors(lambda k, v: gather_prefix_kv(k, v, plan), key, value))
        for heads, size, turned in ((4, 80, 20), (8, 128, 32), (2, 64, 64)):
            joined, bias = (torch.randn(n, 3 * heads * size, device=bench.device, dtype=kind) for n in (tokens, 1))
            angle = torch.rand(tokens, turned // 2, device=bench.device).repeat(1, 2) * 6.0
            turns = angle.cos().to(kind), angle.sin().to(kind)

            def rotate(qkv: Tensor, bias: Tensor, turns: tuple[Tensor, Tensor] = turns, h: int = heads) -> Any:
                return rotate_gather(qkv, bias, *turns, plan, h)

            name = f"rotate and gather, {heads} heads, size {size}, {turned} turned, {kind}"
            found[name] = bench.note(name, errors(rotate, joined, bias.squeeze(0)))
        pre, bias = (torch.randn(n, 1000, device=bench.device, dtype=kind) for n in (tokens, 1))
        name = f"gelu and its bias {kind}"
        found[name] = bench.note(name, errors(biased_gelu, pre, bias.squeeze(0)))
        for heads, groups, size, size_v, window, softcap, sinks in ATTENTION:
            shapes = ((heads, size), (groups, size), (groups, size_v))
            qkv = [torch.randn(1, h, tokens, d, device=bench.device, dtype=kind) for h, d in shapes]
            its_sinks = [torch.randn(heads, device=bench.device, dtype=kind)] if sinks else []

            def attend(
                q: Tensor, k: Tensor, v: Tensor, s: Tensor | None = None, window: int = window, softcap: float = softcap
            ) -> Tensor:
                terms = {"sliding_window": window or None, "softcap": softcap or None, "s_aux": s}
                with packed_layout(batch.layout):
                    return attention_forward(torch.nn.Module(), q, k, v, None, **terms)[0]  # type: ignore[arg-type]

            name = f"attention {heads} of {groups} heads, sizes {size} and {size_v}, window {window}, cap {softcap:g}"
            name += f"{', sinks' * sinks}, {kind}"
            found[name] = bench.note(name, errors(attend, *qkv, *its_sinks))
    return found


def exactness(bench: Bench) -> dict[str, Any]:
    """Errors of rewards and gradients of whole models, by every way to compute them, compared with padded fp64.

    And what the start-up self-test chooses.
    """
    found: dict[str, Any] = {}
    for name, config in small_models(bench.vocabulary, bench.tiny).items():
        if bench.late:
            break
        errors: dict[str, Any] = {}
        if name not in WITHOUT_ORACLE:
            errors |= model_errors(config, bench.rows["hh"], bench.device, lambda: bench.late)
            errors["within_twice_bf16"] = within_twice(errors)
        data, numbers = bench.rows["hh"].data, list(range(4))
        half = bench.half() if bench.cuda else None
        errors["chosen"] = choose_path(bench.model(config), data, numbers, bench.device, half=half, gradients=True)[1]
        found[name] = bench.note(f"exactness {name}", errors)
    return found


# How whole runs share the work.
RUNS = {
    "ddp": ("parallel.strategy=ddp",),
    "zero2": ("parallel.strategy=zero2",),
    "zero3 compiled": ("parallel.strategy=zero3", "parallel.compile=true"),
    "zero3 offload": ("parallel.strategy=zero3", "parallel.offload=true"),
    "ddp fp32": ("parallel.strategy=ddp", "parallel.precision=fp32"),
}


def run(bench: Bench) -> dict[str, Any]:
    """rmcore's own loop: it must not wait for the device, and resume from its checkpoint to rounding."""
    found: dict[str, Any] = {}
    for name, overrides in RUNS.items():
        if bench.late or ("compiled" in name and not bench.cuda):
            continue
        try:
            result = whole_run(bench.world, *overrides)
        except Exception:
            result = {"error": traceback.format_exc()[-1500:]}
        found[name] = bench.note(f"run {name}", result)
    failed = [name for name, result in found.items() if "error" in result]
    return {**found, "error": f"failed: {', '.join(failed)}"} if failed else found


def kernels(bench: Bench) -> dict[str, Any]:
    """Microseconds of the ops' kernels, of eager PyTorch and of torch.compile, and their rate compared with a copy."""
    return {
        name: bench.note(f"kernel {name}", result)
        for name, result in kernel_table(bench.device, lambda: bench.late, bench.tiny)
    }


def random_inputs(
    batch: int, heads: int, tokens: int, size: int, kind: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """q, k and v, each [batch, heads, tokens, size]."""
    return tuple(torch.randn(batch, heads, tokens, size, device=device, dtype=kind, requires_grad=True) for _ in "qkv")


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, upstream: Tensor, layout: AttentionLayout, softcap: float | None = None
) -> None:
    with packed_layout(layout):
        out = attention_forward(torch.nn.Module(), q, k, v, None, softcap=softcap)[0]
    torch.autograd.grad(out, (q, k, v), upstream)


def padded_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def attention(bench: Bench) -> dict[str, Any]:
    """One layer's attention, forward and backward: on a packed micro batch, without and with a soft cap, and by SDPA on
    the padded texts.
    """
    found = {}
    for name, rows in bench.rows.items():
        batch = build_batch(rows.data, range(4 if bench.tiny else 48)).on(bench.device)
        segments = batch.layout.segments_S4.tolist()
        seen = sum((e - s) * (pe - ps) + (e - s) * (e - s + 1) / 2 for s, e, ps, pe in segments)
        texts = [e - s + pe - ps for s, e, ps, pe in segments]
        for shape, (_, width, heads, _) in bench.shapes.items():
            if bench.late:
                continue
            size = width // heads
            kind = torch.bfloat16 if bench.cuda else torch.float32

            q, k, v = random_inputs(1, heads, batch.computed_tokens, size, kind, bench.device)
            upstream = torch.randn(1, batch.computed_tokens, heads, size, device=bench.device, dtype=kind)
            packed = partial(packed_attention, q, k, v, upstream, batch.layout)
            inputs = random_inputs(len(texts), heads, max(texts), size, kind, bench.device)
            ours, theirs = bench.timed(packed), bench.timed(partial(padded_attention, *inputs))
            capped = bench.timed(partial(packed, softcap=50.0))
            found[f"{name} {shape}"] = {
                "tokens": batch.computed_tokens,
                "ms": 1e3 * ours,
                "tflops": 12e-12 * seen * width / ours,
                "capped_ms": 1e3 * capped,
                "capped_tflops": 12e-12 * seen * width / capped,
                "padded_ms": 1e3 * theirs,
            }
    return found


# What is measured, the most valuable first: shape, rows, and arms.
ORDER = (
    ("1.4b", "hh", ("ddp", "zero2", "zero2 compiled", "ddp compiled")),
    ("2.8b", "hh", ("ddp compiled", "zero2 compiled")),
    ("1.4b", "tldr", ("ddp compiled",)),
    ("1.4b", "hh", ("trl best", "padded", "padded, no cuDNN", "padded, recomputed", "trl default")),
    ("1.4b", "hh", ("trl best, no cuDNN", "ddp fp8 compiled")),
    ("410m", "hh", ("ddp", "ddp compiled", "padded")),
)


def train(bench: Bench) -> dict[str, Any]:
    """Training rates in the order of ORDER: rmcore by strategy, compiled and not, the padded loop, and TRL."""
    found: dict[str, Any] = {} if bench.trl else {"trl": {"missing": "trl and datasets are not installed"}}
    pairs, steps = (4, 2) if bench.tiny else (256, 4)
    for shape, name, arms in ORDER:
        shape = "tiny" if bench.tiny else shape
        for arm in arms:
            key = f"{shape} {name} {arm}"
            if key in found or (bench.tiny and "compiled" in arm) or (arm.startswith("trl") and not bench.trl):
                continue
            config = neox(bench.shapes[shape], bench.vocabulary)
            found[key] = bench.note(key, train_arm(bench, config, bench.rows[name], arm, pairs, steps))
    return found


def train_arm(bench: Bench, config: PretrainedConfig, rows: Rows, arm: str, pairs: int, steps: int) -> dict[str, Any]:
    """One arm of ORDER."""
    if bench.late:
        return {"missing": "out of time"}
    if arm.startswith("trl"):
        return trl_arm(bench, config, rows, arm.removeprefix("trl "), pairs, steps)
    if not arm.startswith("padded"):
        strategy, *more = arm.split()
        if "fp8" in more and not (bench.cuda and importlib.util.find_spec("torchao")):
            return {"missing": "a GPU and torchao"}
        call = partial(rmcore_run, strategy=strategy, compiled="compiled" in more, fp8="fp8" in more)
        return with_less_memory(bench, config, call, rows, pairs, steps)
    torch.backends.cuda.enable_cudnn_sdp("no cuDNN" not in arm)
    try:
        return with_less_memory(bench, config, partial(padded_run, recompute="recomputed" in arm), rows, pairs, steps)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def trl_arm(bench: Bench, config: PretrainedConfig, rows: Rows, arm: str, pairs: int, steps: int) -> dict[str, Any]:
    """TRL in a process of its own. This one first frees the GPU memory of the arms before it."""
    assert bench.trl is not None
    gc.collect()
    if bench.cuda:
        torch.cuda.empty_cache()
    try:
        threads = torch.get_num_threads()
        name, _, changed = arm.partition(", ")
        options: dict[str, Any] = {"arm": name, "steps": steps, "pairs": pairs, "cudnn": changed != "no cuDNN"}
        left_s = bench.deadline - time.monotonic()  # a hanging process must not take the time of the other sections
        return trl_run(bench.trl, config, rows, threads=threads, limit_s=60 + left_s, **options)
    except RuntimeError as error:
        return {"error": str(error)[-1500:]}


def with_less_memory(
    bench: Bench, config: PretrainedConfig, call: Callable[..., dict[str, Any]], rows: Rows, pairs: int, steps: int
) -> dict[str, Any]:
    """A run with the largest micro batch that fits: it is halved whenever memory runs out."""
    tokens = 4096 if bench.tiny else 32768
    while True:
        try:
            return call(bench.model(config), rows, bench.world, steps=steps, pairs=pairs, tokens=tokens)
        except torch.OutOfMemoryError:
            tokens //= 2
        except Exception:
            return {"error": traceback.format_exc()[-1500:]}
        if tokens < 2048:
            return {"missing": "does not fit in the memory"}
        torch.cuda.empty_cache()


def profile(bench: Bench) -> dict[str, Any]:
    """The operations of one step of the 1.4b shape that take longest, as text: eager, and on a GPU compiled."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if bench.cuda else []
    config = neox(bench.shapes["tiny" if bench.tiny else "1.4b"], bench.vocabulary)
    order = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
    found: dict[str, Any] = {}
    for compiled in (False, True) if bench.cuda else (False,):
        if bench.late:
            return found or {"missing": "out of time"}
        step = partial(rmcore_run, bench.model(config), bench.rows["hh"], bench.world, steps=1, pairs=16, tokens=8192)
        with torch.profiler.profile(activities=activities) as profiler:
            step(strategy="ddp", compiled=compiled)
        table = profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)
        found["table compiled" if compiled else "table"] = table
    return found


SECTIONS = {
    "ceiling": ceiling,
    "ops": ops,
    "exactness": exactness,
    "run": run,
    "kernels": kernels,
    "train": train,
    "profile": profile,
    "attention": attention,
}


def main(arguments: list[str]) -> int:
    """Exit code 1 when a section failed; the results of the others are written."""
    p = parser("gpu", __doc__)
    p.add_argument("--tiny", action="store_true", help="small shapes, for any machine")
    p.add_argument("--minutes", type=float, default=8.5, help="start no run after so many minutes")
    p.add_argument("--peers", help="virtual environment that has trl; default: this one, if it has trl")
    p.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    p.add_argument("--out", help="result file; default: rmcore/bench/results/gpu.json")
    options = p.parse_args(arguments)
    record: dict[str, Any] = {"what": "gpu", "machine": machine(), "settings": {"tiny": options.tiny}, "sections": {}}
    failed = False
    path = write_results("gpu", record, options.out)
    path.with_suffix(".jsonl").unlink(missing_ok=True)
    with running_world(600.0, 0) as world:
        bench = Bench(world, options.tiny, options.minutes, options.peers, path.with_suffix(".jsonl"))
        bench.note("machine", record["machine"])
        for name in options.sections:
            began = time.monotonic()
            if bench.late:
                record["sections"][name] = {"missing": "out of time"}
                continue
            try:
                result = SECTIONS[name](bench)
            except Exception:  # a failed section must not lose the results of the others
                result = {"error": traceback.format_exc()[-3000:]}
            failed = failed or "error" in result
            record["sections"][name] = {**result, "seconds": time.monotonic() - began}
            bench.note(f"section {name}", record["sections"][name])
            write_results("gpu", record, options.out)
    print(f"written: {path}")
    return int(failed)
