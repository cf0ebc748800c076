"""Measures exactness, ceilings and training rates on one GPU, compared with a padded loop and TRL; takes minutes.

Input: this machine. Pythia shapes with random weights, and random tokens in the lengths of 256 real HH and TL;DR pairs
(lengths.json): no network, no tokenizer, no `datasets`.
Output: one JSON file of sections, each with its results or the error that ended it, the most valuable first: ceiling,
ops, exactness, sync, train, attention, profile. Next to it, a file of the same name with `.jsonl` gets a line for each
result at once, so that a machine that goes away takes nothing with it.
Example: train of 1.4b on HH lengths: tokens per second, MFU, sharing ratio, peak memory, for rmcore, for a padded loop
over the same pairs, and for TRL's RewardTrainer where it is installed.

Ratio: none is computed; divide the pairs per second of two arms. `mfu_of_h100` is the share of an H100's dense bf16
peak. `within_twice_bf16` is true if the error of the fast path in bf16 is at most twice that of the padded forward in
bf16, both compared with the padded forward in fp32.

`--tiny` runs every section on any machine in seconds, with small shapes.
"""

import json
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig

from rmcore.bench.gpu_train import Rows, padded_run, rmcore_run, rows_of_lengths
from rmcore.bench.gpu_trl import python_with_trl, trl_run
from rmcore.bench.measure import machine, parser, write_results
from rmcore.data.batches.batch import AttentionLayout, build_batch
from rmcore.model.attention import attention_forward
from rmcore.model.layout_context import packed_layout
from rmcore.model.reward_model import PADDED, SHARED, RewardModel
from rmcore.model.selftest import choose_path
from rmcore.ops.gather_prefix import gather_plan, gather_prefix_kv
from rmcore.ops.pairwise import pairwise_loss
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


def llama(shape: tuple[int, int, int, int], vocabulary: int) -> PretrainedConfig:
    """Half as many key heads as query heads."""
    layers, width, heads, mlp = shape
    sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": heads // 2, "intermediate_size": mlp, "vocab_size": vocabulary}
    return AutoConfig.for_model("llama", pad_token_id=1, num_labels=1, **sizes)


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
    return {"matrix_tflops": 2e-12 * size**3 / product, "copy_tb_per_s": 2e-12 * source.numel() / copied}


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
            results.append([out, *torch.autograd.grad(out, given, upstream)])
        offs = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(*results, strict=True)]
        return {"result_off": offs[0], "gradients_off": max(offs[1:])}

    for kind in (torch.float32, torch.bfloat16):
        for size in (128, 2560) if bench.tiny else (128, 2560, 16384):
            inputs = (torch.randn(n, size, device=bench.device, dtype=kind).squeeze(0) for n in (tokens, 1))
            call = partial(lambda hidden, head: pairwise_loss(hidden, head, rows_A, *pairs))
            name = f"pairwise {size} {kind}"
            found[name] = bench.note(name, errors(call, *inputs))
        key, value = (torch.randn(tokens, 4, 80, device=bench.device, dtype=kind) for _ in range(2))
        name = f"gather {kind}"
        found[name] = bench.note(name, errors(lambda k, v: gather_prefix_kv(k, v, plan), key, value))
        for heads, groups, size, window in ((8, 8, 128, 0), (8, 2, 128, 64), (4, 4, 80, 0), (4, 1, 256, 0)):
            shapes = ((heads, size), (groups, size), (groups, size))
            q, k, v = (torch.randn(1, h, tokens, d, device=bench.device, dtype=kind) for h, d in shapes)

            def attend(q: Tensor, k: Tensor, v: Tensor, window: int = window) -> Tensor:
                with packed_layout(batch.layout):
                    return attention_forward(torch.nn.Module(), q, k, v, None, sliding_window=window or None)[0]

            name = f"attention {heads} of {groups} heads, size {size}, window {window}, {kind}"
            found[name] = bench.note(name, errors(attend, q, k, v))
    return found


def gradient(bench: Bench, model: RewardModel, path: str, half: bool) -> tuple[Tensor, Tensor]:
    """Rewards of the first 8 comparisons by a path (pruned where possible), and the whole gradient as one vector."""
    model.use(path, pruned=True)
    batch = build_batch(bench.rows["hh"].data, range(8), share=path == SHARED).on(bench.device)
    model.zero_grad(set_to_none=True)
    with bench.half() if half else nullcontext():
        out = model(batch)
    out.loss_sum.backward()
    return out.rewards_A.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def exactness(bench: Bench) -> dict[str, Any]:
    """Errors of rewards and gradients, compared with the padded forward in fp32: of the fast path in fp32 and bf16, and
    of the padded forward in bf16.
    """
    found = {}
    small = (2, 64, 2, 128) if bench.tiny else (6, 512, 8, 2048)
    configs = {"gpt_neox": neox(small, bench.vocabulary), "llama": llama(small, bench.vocabulary)}
    for name, config in configs.items():
        model = bench.model(config)
        data, numbers = bench.rows["hh"].data, list(range(8))
        with torch.no_grad():  # larger weights than those of a fresh model make errors visible
            for parameter in model.parameters():
                parameter.mul_(2.0 if parameter.ndim > 1 else 1.0)

        exact = gradient(bench, model, PADDED, False)
        errors: dict[str, Any] = {}
        for label, arguments in {
            "fp32 shared": (SHARED, False),
            "bf16 padded": (PADDED, True),
            "bf16 shared": (SHARED, True),
        }.items():
            rewards, gradients = gradient(bench, model, *arguments)
            errors[label] = {
                "rewards_off": float((rewards - exact[0]).abs().max()),
                "gradients_off": float((gradients - exact[1]).norm() / exact[1].norm()),
            }
        errors["chosen"] = choose_path(
            model, data, numbers[:4], bench.device, half=bench.half() if bench.cuda else None, gradients=True
        )[1]
        errors["within_twice_bf16"] = all(
            errors["bf16 shared"][key] <= 2 * errors["bf16 padded"][key] for key in ("rewards_off", "gradients_off")
        )
        found[name] = errors
    return found


def sync(bench: Bench) -> dict[str, Any]:
    """Checks that a training step never waits for the device: PyTorch's sync debug mode raises if it does."""
    if not bench.cuda:
        return {"missing": "no CUDA device"}
    config = neox((2, 256, 4, 1024))
    run = rmcore_run(
        bench.model(config), bench.rows["hh"], bench.world, steps=3, pairs=16, tokens=8192, forbid_sync=True
    )
    return {"steps_without_waiting": run["steps"]}


def random_inputs(
    batch: int, heads: int, tokens: int, size: int, kind: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """q, k and v, each [batch, heads, tokens, size]."""
    return tuple(torch.randn(batch, heads, tokens, size, device=device, dtype=kind, requires_grad=True) for _ in "qkv")


def packed_attention(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor, layout: AttentionLayout) -> None:
    with packed_layout(layout):
        out = attention_forward(torch.nn.Module(), q, k, v, None)[0]
    torch.autograd.grad(out, (q, k, v), upstream)


def padded_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def attention(bench: Bench) -> dict[str, Any]:
    """One layer's attention, forward and backward: on a packed micro batch, and by SDPA on the padded texts."""
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
            found[f"{name} {shape}"] = {
                "tokens": batch.computed_tokens,
                "ms": 1e3 * ours,
                "tflops": 12e-12 * seen * width / ours,
                "padded_ms": 1e3 * theirs,
            }
    return found


# What is measured, the most valuable first: shape, rows, and arms.
ORDER = (
    ("1.4b", "hh", ("ddp", "zero2", "zero2 compiled")),
    ("2.8b", "hh", ("ddp", "zero2 compiled")),
    ("1.4b", "tldr", ("zero2 compiled",)),
    ("1.4b", "hh", ("trl best", "padded", "padded, no cuDNN", "padded, recomputed", "trl default")),
    ("410m", "hh", ("ddp", "ddp compiled", "padded")),
)


def train(bench: Bench) -> dict[str, Any]:
    """Training rates in the order of ORDER: rmcore by strategy, compiled and not, the padded loop, and TRL."""
    found: dict[str, Any] = {} if bench.trl else {"trl": {"missing": "trl and datasets are not installed"}}
    pairs, steps = (4, 2) if bench.tiny else (64, 8)
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
        strategy, _, compiled = arm.partition(" ")
        call = partial(rmcore_run, strategy=strategy, compiled=bool(compiled))
        return with_less_memory(bench, config, call, rows, pairs, steps)
    torch.backends.cuda.enable_cudnn_sdp("no cuDNN" not in arm)
    try:
        return with_less_memory(bench, config, partial(padded_run, recompute="recomputed" in arm), rows, pairs, steps)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def trl_arm(bench: Bench, config: PretrainedConfig, rows: Rows, arm: str, pairs: int, steps: int) -> dict[str, Any]:
    """TRL in a process of its own. This process frees the GPU memory that it has cached first."""
    assert bench.trl is not None
    if bench.cuda:
        torch.cuda.empty_cache()
    try:
        threads = torch.get_num_threads()
        return trl_run(bench.trl, config, rows, arm=arm, steps=steps, pairs=pairs, threads=threads)
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
    """The operations of one step of the 1.4b shape that take longest, as text."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if bench.cuda else []
    if bench.late:
        return {"missing": "out of time"}
    config = neox(bench.shapes["tiny" if bench.tiny else "1.4b"], bench.vocabulary)
    with torch.profiler.profile(activities=activities) as profiler:
        rmcore_run(bench.model(config), bench.rows["hh"], bench.world, steps=1, pairs=16, tokens=8192, strategy="zero2")
    order = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
    return {"table": profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)}


SECTIONS = {
    "ceiling": ceiling,
    "ops": ops,
    "exactness": exactness,
    "sync": sync,
    "train": train,
    "attention": attention,
    "profile": profile,
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
                result, failed = {"error": traceback.format_exc()[-3000:]}, True
            record["sections"][name] = {**result, "seconds": time.monotonic() - began}
            bench.note(f"section {name}", record["sections"][name])
            write_results("gpu", record, options.out)
    print(f"written: {path}")
    return int(failed)
