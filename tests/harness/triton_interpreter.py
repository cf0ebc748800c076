"""Triton kernels for tests: on the GPU where there is one, else interpreted, on CPU tensors.

Triton reads TRITON_INTERPRET when it is first imported and where a kernel is defined, so importing this module sets it
(before any test runs) where there is no GPU. Example: forward = triton_kernel("rmcore.ops.pairwise_triton", "forward").
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def triton_kernel(module: str, function: str) -> Callable[..., Any]:
    """The function, taking and giving CPU tensors; skips the test where triton is not installed."""
    pytest.importorskip("triton")
    kernel = getattr(importlib.import_module(module), function)
    if not torch.cuda.is_available():
        return kernel

    def on_gpu(*args: Any) -> Any:
        moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
        return tuple(t.cpu() for t in kernel(*moved))

    return on_gpu
