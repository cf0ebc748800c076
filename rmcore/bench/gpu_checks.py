"""What `rmcore.bench gpu` checks before it measures: whole models in bf16, whole runs, kernels by graph replay.

Input: a device, models with random weights, the embedded rows.
Output: errors compared with fp64; what a run waited for, saved and resumed; microseconds of the ops' kernels.
Example: a Mistral shape with a window, bf16, compiled: rewards and gradients as far from the padded forward in fp64 as
the padded forward in bf16 is, or at most twice as far.

On a CPU, which has no graphs to replay and nothing to wait for, the same code runs with small sizes.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig

from rmcore.bench.gpu_train import Rows
from rmcore.bench.kernels import cases, copy_bandwidth, with_backward
from rmcore.config import load_config
from rmcore.data.batches.batch import build_batch
from rmcore.host import faults
from rmcore.model.compiled import speed_up
from rmcore.model.reward_model import PACKED, PADDED, SHARED, RewardModel
from rmcore.parallel.strategy import local
from rmcore.parallel.world import World

COMPARISONS = range(8)
STEPS, SAVED = 6, 3  # of the whole run; the checkpoint from which it resumes
FIRST_STEP_WITHOUT_WAITS = 3
WITHOUT_ORACLE = ("gemma2", "gpt_oss")  # transformers takes their softmax in fp32, also in an fp64 forward
# Path, pruned, precision, compiled, recompute.
WAYS = {
    "fp32 shared": (SHARED, True, torch.float32, False, "none"),
    "bf16 padded": (PADDED, False, torch.bfloat16, False, "none"),
    "bf16 shared": (SHARED, True, torch.bfloat16, False, "none"),
    "bf16 shared, whole last layer": (SHARED, False, torch.bfloat16, False, "none"),
    "bf16 packed": (PACKED, True, torch.bfloat16, False, "none"),
    "bf16 shared, full recompute": (SHARED, True, torch.bfloat16, False, "full"),
    "bf16 shared, compiled": (SHARED, True, torch.bfloat16, True, "none"),
    "bf16 shared, compiled, selective": (SHARED, True, torch.bfloat16, True, "selective"),
}


def small_models(vocabulary: int, tiny: bool) -> dict[str, PretrainedConfig]:
    """NeoX; Llama with grouped heads; Mistral with grouped heads and a window that is shorter than the texts; Gemma 2
    and gpt-oss with such windows, soft caps and sinks.
    """
    layers, width, heads, inner = (3, 64, 2, 128) if tiny else (6, 512, 8, 2048)
    common: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    common |= {"intermediate_size": inner, "vocab_size": vocabulary, "pad_token_id": 1, "num_labels": 1}
    grouped = {"num_key_value_heads": heads // 2, "max_position_embeddings": 2048}
    return {
        "gpt_neox": AutoConfig.for_model("gpt_neox", rotary_pct=0.25, max_position_embeddings=2048, **common),
        "llama": AutoConfig.for_model("llama", **common, **grouped),
        "mistral": AutoConfig.for_model("mistral", sliding_window=64, **common, **grouped),
        "gemma2": AutoConfig.for_model(
            "gemma2", sliding_window=64, head_dim=80, attn_logit_softcapping=5.0, **common, **grouped
        ),
        "gpt_oss": AutoConfig.for_model(
            "gpt_oss", sliding_window=64, num_local_experts=2, num_experts_per_tok=2, **common, **grouped
        ),
    }


def model_errors(
    config: PretrainedConfig, rows: Rows, device: torch.device, late: Callable[[], bool]
) -> dict[str, dict[str, float]]:
    """By way: the largest error of a reward, and the relative error of the gradient, compared with padded fp64."""
    torch.manual_seed(0)
    with torch.device(device):
        hf_model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # larger weights than those of a fresh model make errors visible
        for parameter in hf_model.parameters():
            parameter.mul_(2.0 if parameter.ndim > 1 else 1.0)

    def computed(path: str, pruned: bool, dtype: torch.dtype, compiled: bool, recompute: str) -> tuple[Tensor, Tensor]:
        its = copy.deepcopy(hf_model).to(dtype if dtype == torch.float64 else torch.float32)
        model = RewardModel(its.base_model, its.score, pad_token_id=1)
        model.train()
        speed_up(model.backbone, recompute=recompute, compiled=compiled)
        model.use(path, pruned=pruned)
        batch = build_batch(rows.data, COMPARISONS, share=path == SHARED).on(device)
        half = torch.autocast(device.type, dtype=torch.bfloat16) if dtype == torch.bfloat16 else nullcontext()
        with half:
            out = model(batch)
        out.loss_sum.backward()
        grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
        return out.rewards_A.detach().double(), torch.cat(grads)

    rewards, gradient = computed(PADDED, False, torch.float64, False, "none")
    found = {}
    for name, way in WAYS.items():
        if late() or (way[3] and device.type == "cpu"):
            continue
        its_rewards, its_gradient = computed(*way)
        found[name] = {
            "rewards_off": float((its_rewards - rewards).abs().max()),
            "gradients_off": float((its_gradient - gradient).norm() / gradient.norm()),
        }
    return found


def within_twice(errors: dict[str, dict[str, float]]) -> bool:
    """Whether every way in bf16 is at most twice as far off as the padded one, and fp32 at most 1e-5 for gradients."""
    plain = errors["bf16 padded"]
    return errors["fp32 shared"]["gradients_off"] <= 1e-5 and all(
        error[key] <= 2.0 * plain[key] for way, error in errors.items() if "bf16" in way for key in plain
    )


@contextmanager
def waits_forbidden(start: int) -> Iterator[None]:
    """Within, PyTorch raises if the host waits for the GPU in a step that neither logs, saves nor evaluates.

    start: the steps that are done.
    """
    seen = {"boundary": start}

    def hook(phase: str) -> None:
        seen["boundary"] += phase == "boundary"
        inside = phase in ("data", "compute", "backward", "update")
        free = FIRST_STEP_WITHOUT_WAITS - 1 <= seen["boundary"] < STEPS - 1
        torch.cuda.set_sync_debug_mode("error" if inside and free else "default")

    faults.hook = hook
    try:
        yield
    finally:
        faults.hook = None
        torch.cuda.set_sync_debug_mode("default")


def whole_run(world: World, *overrides: str) -> dict[str, Any]:
    """rmcore's own loop on the embedded model: six steps, evaluated, saved, and resumed after the third."""
    try:
        from rmcore.checkpoint.resume import choose_start
        from rmcore.tracking.tracker import Tracker
        from rmcore.train import train
        from rmcore.training.assembly import assemble
        from rmcore.training.heartbeat import Heartbeat
    except ImportError as error:  # the machine does not have `datasets`, which the other sections do not need
        return {"missing": str(error)}
    base = ["model.name=synthetic", "model.init=random", "data.train.path=synthetic", "data.template=none"]
    base += ["data.max_tokens=512", "data.limit=60", "data.eval_fraction=0.2", "batch.pairs=8", "batch.tokens=600"]
    base += [f"run.max_steps={STEPS}", f"run.save_every={SAVED}", "run.evals=1", "run.keep=9", "log.every=100"]
    base += ["log.samples=0", "log.tensorboard=false", "parallel.precision=bf16", *overrides]

    def trained(folder: Path) -> tuple[int, dict[str, Tensor]]:
        config = load_config(None, [*base, f"run.dir={folder}"])
        run = assemble(config, world, choose_start(config, world))
        waits = world.device.type == "cpu" or config.parallel.offload  # offloaded gradients are waited for
        with nullcontext() if waits else waits_forbidden(run.start.step):
            train(run, Tracker(), Heartbeat(world))
        return run.start.step, {
            name: local(p.detach()).double().cpu() for name, p in run.strategy.named_parameters().items()
        }

    with tempfile.TemporaryDirectory(prefix="rmcore-bench-") as place:
        folder = Path(place)
        began = time.monotonic()
        _, weights = trained(folder)
        kinds = stored_kinds(folder / "checkpoints" / f"step-{STEPS}")
        for path in sorted((folder / "checkpoints" / f"step-{STEPS}").glob("*")):
            path.unlink()
        (folder / "checkpoints" / f"step-{STEPS}").rmdir()
        start, resumed = trained(folder)
    off = max(float((resumed[name] - weight).abs().max()) for name, weight in weights.items())
    return {"resumed_at": start, "resumed_off": off, "stored": kinds, "seconds": time.monotonic() - began}


def stored_kinds(checkpoint: Path) -> dict[str, int]:
    """How many tensors of each kind and dtype a checkpoint holds, e.g. {"weight F32": 42, "exp_avg F32": 42}."""
    found: dict[str, int] = {}
    for path in checkpoint.glob("rank-*"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                kind = f"{key.split('/')[0]} {file.get_slice(key).get_dtype()}"
                found[kind] = found.get(kind, 0) + 1
    return found


def kernel_table(device: torch.device, late: Callable[[], bool], tiny: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Microseconds of each op, forward and backward, by implementation; on a GPU, of a replayed graph without a host.

    `of_copy`: the bytes that must move, per second, over those of a copy.
    """
    bandwidth = copy_bandwidth(device.type)
    for case in cases(device.type, quick=tiny):
        if late():
            return
        name = f"{case.op} {case.sizes} {str(case.dtype).removeprefix('torch.')}"
        found: dict[str, Any] = {}
        for kind, call in case.calls.items():
            both = partial(with_backward, case, call)

            seconds = replayed(both) if device.type == "cuda" else once(both)
            found[f"{kind}_us"] = 1e6 * seconds
            found[f"{kind}_of_copy"] = case.both_bytes / seconds / bandwidth
        yield name, found


def replayed(call: Callable[[], Any], times: int = 20) -> float:
    """Seconds of a call that is captured as a CUDA graph: its kernels, without the host's time."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # as torch.cuda.graph wants it, and compiled code compiles here
        for _ in range(3):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def once(call: Callable[[], Any]) -> float:
    """Seconds of the second of two calls."""
    call()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
