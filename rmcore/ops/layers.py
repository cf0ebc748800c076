"""Parts of a decoder layer in one pass over memory each, on the CPU: the contract. Only the C++ kernels have them.

Input: CPU tensors in fp32 or bf16. Output: the result in the dtype that PyTorch's own composition has.
Example: `available()` is False without the C++ kernels; a model then computes these parts as transformers wrote them.

The ops, differentiable once with respect to all but cos and sin; arithmetic is fp32, and results are rounded once:
- gelu(x): x Phi(x) (Hendrycks and Gimpel, arXiv 1606.08415), Phi within 7.5e-8.
- swiglu(gate, up): silu(gate) * up (Shazeer, arXiv 2002.05202).
- rms_norm(x [..., D], weight [D], eps): weight * x / sqrt(mean(x^2) + eps), fp32 (arXiv 1910.07467).
- rotate(x [1, H, T, K], cos [1, T, R], sin [1, T, R]): rotary embeddings of the first R columns (arXiv 2104.09864),
  with columns d and d + R/2 as partners; the result is fp32.

Within `counting`, they also take fake tensors, of which they compute shapes and keep what the C++ ops keep, so that
rmcore/cost counts the memory of a run on CPUs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

NAMES = ("gelu", "swiglu", "rms_norm", "rotate")
_counting = False


def available() -> bool:
    """Whether the library that is loaded has these ops."""
    return all(hasattr(torch.ops.rmcore, name) for name in NAMES)


@contextmanager
def counting() -> Iterator[None]:
    """Within, fake tensors on the CPU stand for tensors of a run on CPUs."""
    global _counting
    _counting = True
    try:
        yield
    finally:
        _counting = False


def takes(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether the ops take a tensor or parameter: a plain one on the CPU, or a fake one that is counted."""
    plain = type(x) in (Tensor, torch.nn.Parameter) or (_counting and isinstance(x, FakeTensor))
    return plain and x.is_cpu and x.dtype in dtypes


def gelu(x: Tensor) -> Tensor:
    return _run("gelu", x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _run("swiglu", gate, up)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _run("rms_norm", x, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _run("rotate", x, cos, sin)


def _run(name: str, *inputs: Any) -> Tensor:
    if isinstance(inputs[0], FakeTensor):
        return _Counted.apply(name, *inputs)
    return getattr(torch.ops.rmcore, name)(*inputs)


class _Counted(torch.autograd.Function):
    """Shapes and kept tensors of an op."""

    @staticmethod
    def forward(ctx: Any, name: str, *inputs: Any) -> Tensor:
        x = inputs[0]
        ctx.inputs = [(value.shape, value.dtype) if isinstance(value, Tensor) else None for value in inputs]
        kept = inputs[1:] if name == "rotate" else tuple(value for value in inputs if isinstance(value, Tensor))
        if name == "rms_norm":
            kept = *kept, x.new_empty(x.shape[:-1])
        ctx.save_for_backward(*kept)
        return torch.empty_like(x, dtype=torch.float32 if name == "rotate" else x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        found = (
            torch.empty(known[0], dtype=known[1]) if known and needed else None
            for known, needed in zip(ctx.inputs, ctx.needs_input_grad[1:], strict=True)
        )
        return None, *found
