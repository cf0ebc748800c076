"""The fused operations, and the choice of the kernels that run them.

Each op has one contract file: its schema, and a PyTorch reference that works on every device. Compiled kernels take
precedence over the reference where they are present: C++ on the CPU (built by CMakeLists.txt through setup.py), Triton
on CUDA.
Example:

    import rmcore.ops as ops
    ops.describe()            # 'ops: CPU runs C++ (AVX512), bf16 products by AVX512-BF16; CUDA runs Triton'
    ops.use("reference")      # PyTorch references from now on; ops.use("fused") goes back to compiled kernels

With `RMCORE_OPS=reference` in the environment, rmcore starts with the references and loads no compiled kernel.
"""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rmcore.host.bf16 import bf16_instructions
from rmcore.ops import biased_gelu, gather_prefix, pairwise, ragged_attention, rotate_gather, tiled_attention

# The reference of each op, which the dispatcher calls where there is no compiled kernel.
REFERENCES: dict[str, Callable[..., Any]] = {
    "pairwise_forward": pairwise.reference_forward,
    "pairwise_backward": pairwise.reference_backward,
    "gather_prefix": gather_prefix.reference_forward,
    "gather_prefix_backward": gather_prefix.reference_backward,
    "rotate_gather": rotate_gather.reference_forward,
    "rotate_gather_backward": rotate_gather.reference_backward,
    "biased_gelu_backward": biased_gelu.reference_backward,
    "ragged_attention": ragged_attention.reference_forward,
    "ragged_attention_backward": ragged_attention.reference_backward,
    "tiled_attention": tiled_attention.reference_forward,
    "tiled_attention_backward": tiled_attention.reference_backward,
}
TRITON = {
    "pairwise_forward": ("rmcore.ops.pairwise_triton", "forward"),
    "pairwise_backward": ("rmcore.ops.pairwise_triton", "backward"),
    "gather_prefix": ("rmcore.ops.gather_prefix_triton", "forward"),
    "gather_prefix_backward": ("rmcore.ops.gather_prefix_triton", "backward"),
    "rotate_gather": ("rmcore.ops.rotate_gather_triton", "forward"),
    "rotate_gather_backward": ("rmcore.ops.rotate_gather_triton", "backward"),
    "biased_gelu_backward": ("rmcore.ops.biased_gelu_triton", "backward"),
    "tiled_attention": ("rmcore.ops.tiled_attention_triton", "forward"),
    "tiled_attention_backward": ("rmcore.ops.tiled_attention_triton", "backward"),
}
MODES = ("fused", "reference")
SCHEMAS = 3  # raised when the schema of an op changes: a library of another schema would end the process
_overrides: list[torch.library.Library] = []
_triton_kernels = torch.library.Library("rmcore", "IMPL")


def cpu_library() -> Path:
    """The library with the C++ kernels for this machine and this torch; the file may not exist.

    Compiled code fits one instruction set, one minor version of torch and the schemas of the ops, so its name contains
    all three: rmcore_cpu_avx512_torch2.13_schemas2.so.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    capability = capability if capability in ("AVX512", "AVX2") else "DEFAULT"
    minor_version = ".".join(torch.__version__.split(".")[:2])
    return Path(__file__).parent / f"rmcore_cpu_{capability.lower()}_torch{minor_version}_schemas{SCHEMAS}.so"


@functools.cache
def _load_cpu() -> str:
    """Load the C++ kernels once. Returns 'C++ (AVX512)', or why the reference runs instead."""
    path = cpu_library()
    if not path.exists():
        others = sorted(p.name for p in path.parent.glob("rmcore_cpu_*.so"))
        built = f"only {', '.join(others)}" if others else "not built"
        return f"the PyTorch reference (no {path.name}, {built}: pip install --no-build-isolation -e . builds it)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the PyTorch reference (C++ kernels failed to load, reinstall rmcore: {str(error).splitlines()[0]})"
    return f"C++ ({path.name.split('_')[2].upper()})"


@functools.cache
def _load_cuda() -> str:
    """Register the Triton kernels once. The first call of a kernel imports triton."""
    if not (torch.version.cuda or torch.version.hip):
        return "nothing (this torch has no CUDA)"
    if importlib.util.find_spec("triton") is None:
        return "the PyTorch reference (triton is not installed)"
    for name, (module, function) in TRITON.items():
        _triton_kernels.impl(name, functools.partial(_import_and_call, module, function), "CUDA")
    return "Triton"


def _import_and_call(module: str, function: str, *args: Any) -> Any:
    return getattr(importlib.import_module(module), function)(*args)


def use(mode: str) -> None:
    """Choose the kernels of this process: "fused" (compiled kernels where present) or "reference" (PyTorch)."""
    if mode not in MODES:
        raise ValueError(f"rmcore.ops: mode must be one of {', '.join(MODES)}, got {mode!r} (RMCORE_OPS or use())")
    if mode == "fused":
        _overrides.clear()  # a Library removes its kernels when it is freed
        _load_cpu()
        _load_cuda()
    elif not _overrides:
        library = torch.library.Library("rmcore", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*[Oo]verrid")  # the override is intended
            for name, reference in REFERENCES.items():
                for key in ("CPU", "CUDA"):
                    library.impl(name, reference, key, allow_override=True)
        _overrides.append(library)


def fused() -> bool:
    """Whether compiled kernels run where they are present; False after `use("reference")`."""
    return not _overrides


def describe() -> str:
    """One line about the kernels in use."""
    unknown = "" if _wanted in MODES else f" (RMCORE_OPS={_wanted} is unknown: {' or '.join(MODES)})"
    if _overrides:
        return "ops: the PyTorch reference runs (chosen by RMCORE_OPS or use())"
    found = bf16_instructions(torch.device("cpu"))
    bf16 = f"bf16 products by {found}" if found else "no instructions for bf16 products"
    return f"ops: CPU runs {_load_cpu()}, {bf16}; CUDA runs {_load_cuda()}{unknown}"


_wanted = os.environ.get("RMCORE_OPS") or "fused"
use(_wanted if _wanted in MODES else "fused")
