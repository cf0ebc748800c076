"""Runs training steps on a GPU that does nothing, and checks what needs no arithmetic: waits, launches, memory, graphs.

Input: an environment with a CUDA build of PyTorch (5 GB), a C compiler, and no GPU.
Output: one JSON file with a record per model, strategy and way; exit code 1 if a bound does not hold.
Example: 1.4b under ddp, compiled: 0 waits, 57 launches per layer and micro batch, no graph break, no recompilation.

nullcuda.c stands in for the CUDA runtime, the driver, cuBLAS and NCCL. Memory is reserved and never touched; kernels
are counted by name and never run. So a run takes the time of the host only, and all values are garbage: it shows
nothing about numbers, the time of a GPU, or what NCCL does. The real model, strategy, loader and optimizer run.

Held for every run:
- PyTorch raises for a call that waits for the device within the steps after the first two;
- at most LAUNCHES kernels per layer and micro batch, GATHERS more where each layer gathers its weights (zero3), and
  MORE in some models;
- the allocator's peak is within PEAK of what rmcore.cost.memory predicts;
- ddp: no batch is copied to the device behind the model's kernels. Lists of pointers may be: FSDP2 copies them, and
  since torch 2.15 the norm of the gradients does, once per step;
- compiled: no graph break, and no compilation after the first two steps.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from rmcore.bench.measure import own_child, parser, run_child, write_results

MODELS = ("1.4b", "2.8b", "7b")
STRATEGIES = ("ddp", "zero2", "zero3")
LAUNCHES = {"eager": 140, "compiled": 70}  # most kernels per layer and micro batch, forward and backward
POINTERS = int(tuple(map(int, version("torch").split(".")[:2])) >= (2, 15))  # copies per step that hold no batch
GATHERS = 15  # more of them under zero3
# More of them in a layer of Gemma 2, which has four norms, and of gpt-oss, which sorts tokens by experts.
MORE = {"gemma2": {"eager": 60, "compiled": 5}, "gpt_oss": {"eager": 160, "compiled": 95}}
PEAK = 0.10  # most difference of the allocator's peak and the predicted one
RANKS = {"7b": 8}  # of which one runs; its collectives return at once
SOURCES = ("nullcuda.c", "absent.c")


def build(directory: Path) -> Path:
    """Compile the stand-in into `directory`. Raises RuntimeError, with the compiler's message, if that fails."""
    headers = Path(sysconfig.get_path("purelib")) / "nvidia"
    include = next((path.parent for path in headers.glob("*/include/cuda_runtime_api.h")), None)
    if include is None:
        raise RuntimeError("no CUDA headers: install a CUDA build of torch, and nvidia-cuda-crt")
    library = directory / "libcuda.so.1"
    sources = [str(Path(__file__).with_name(name)) for name in SOURCES]
    options = ["-O1", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}", "-I", str(include)]
    done = subprocess.run(
        [os.environ.get("CC", "gcc"), *options, "-o", str(library), *sources, "-lpthread", "-ldl"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the stand-in does not compile:\n{done.stderr[-2000:]}")
    return library


def environment(library: Path) -> dict[str, str]:
    """The variables with which a child meets the stand-in in place of a GPU."""
    return {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(library.parent),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",  # cuDNN cannot run
        "CUDA_VISIBLE_DEVICES": "0",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # its worker processes may keep a child waiting at its end
    }


def complaints(found: dict[str, Any]) -> list[str]:
    """Which bounds a record breaks."""
    way = "compiled" if found["compiled"] else "eager"
    broken = []
    most = LAUNCHES[way] + MORE.get(found["model"], {}).get(way, 0) + GATHERS * (found["strategy"] == "zero3")
    if found["launches_per_layer"] > most:
        broken.append(f"{found['launches_per_layer']:.0f} launches per layer and micro batch, {way}: {most}")
    if found["waits"]:
        broken.append(f"the host waits: {found['waits']}")
    off = found["peak_gb"] / found["predicted_gb"] - 1
    if abs(off) > PEAK:
        broken.append(f"a peak of {found['peak_gb']:.1f} GB, predicted {found['predicted_gb']:.1f} GB ({off:+.0%})")
    if found["strategy"] == "ddp" and found.get("copies_in_line", 0) > POINTERS:
        broken.append(f"{found['copies_in_line']:.0f} copies to the device behind the kernels of a step")
    if found["graph_breaks"] or found["late_compilations"]:
        broken.append(f"{found['graph_breaks']} graph breaks, {found['late_compilations']} late compilations")
    return broken


def print_model(found: dict[str, Any]) -> None:
    """One line per GPU: the modelled milliseconds of a step by kind of work, and MFU."""
    for gpu, times in found.get("modelled", {}).items():
        if isinstance(times, dict):
            kinds = ", ".join(f"{kind} {times[f'{kind}_ms']:.0f} ms" for kind in ("products", "attention", "other"))
            print(f"  modelled on {gpu}: {kinds}; MFU {times['mfu_percent']:.1f} %", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Exit code 1 when a run fails or breaks a bound; the records of the others are written."""
    p = parser("nullgpu", __doc__)
    p.add_argument("--models", nargs="+", default=list(MODELS))
    p.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    p.add_argument("--ways", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    p.add_argument("--rows", default="hh", choices=["hh", "tldr"], help="whose lengths")
    p.add_argument("--pairs", type=int, default=256, help="per step and rank")
    p.add_argument("--steps", type=int, default=4, help="the last two are measured")
    p.add_argument("--recompute", default="auto", choices=["auto", "none", "selective", "full"])
    p.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    p.add_argument("--deterministic", action="store_true", help="fail where PyTorch has no deterministic algorithm")
    p.add_argument("--out", help="result file; default: rmcore/bench/results/nullgpu.json")
    options = p.parse_args(arguments)
    runs: list[dict[str, Any]] = []
    record = {"what": "nullgpu", "settings": vars(options).copy(), "runs": runs}
    with tempfile.TemporaryDirectory() as directory:
        try:
            os.environ |= environment(build(Path(directory)))
        except RuntimeError as error:
            print(f"rmcore.bench nullgpu: {error}", file=sys.stderr)
            return 1
        for model, strategy, way in product(options.models, options.strategies, options.ways):
            asked = {"model": model, "strategy": strategy, "compiled": way == "compiled", "ranks": RANKS.get(model, 1)}
            shared = {
                name: getattr(options, name)
                for name in ("rows", "pairs", "steps", "recompute", "precision", "deterministic")
            }
            try:
                found = run_child(own_child("rmcore.bench.nullgpu.child"), 1, asked | shared)
                found["broken"] = complaints(found)
            except RuntimeError as error:  # a failed run must not lose the records of the others
                found = asked | {"broken": [str(error)[-2500:]]}
            runs.append(found)
            print({key: value for key, value in found.items() if key not in ("kernels", "modelled")}, flush=True)
            print_model(found)
            write_results("nullgpu", record, options.out)
    return int(any(run["broken"] for run in runs))
