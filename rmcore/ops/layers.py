"""Parts of a decoder layer in one pass over memory each, on the CPU: the contract. Only the C++ kernels have them.

Input: CPU tensors in fp32 or bf16. Output: the result, in bf16 where a product in bf16 reads it.
Example: `available()` is False without the C++ kernels; a model then computes these parts as transformers wrote them.

The ops, differentiable once with respect to all but cos and sin; arithmetic is fp32, and results are rounded once:
- gelu(x [..., F], bias [F]): x Phi(x) (Hendrycks and Gimpel, arXiv 1606.08415), Phi within 7.5e-8. x holds the bias
  already, if one is given; it gets its gradient here, so that nothing reads the gradient of x again for it.
- swiglu(gate, up): silu(gate) * up (Shazeer, arXiv 2002.05202).
- layer_norm(x [..., D], weight [D], bias [D], eps, half): arXiv 1607.06450; x is fp32, the result bf16 if `half`.
- rms_norm(x [..., D], weight [D], eps, half): weight * x / sqrt(mean(x^2) + eps) (arXiv 1910.07467), likewise.
- rotate(x [1, H, T, K], cos [1, T, R], sin [1, T, R]): rotary embeddings of the first R columns (arXiv 2104.09864),
  with columns d and d + R/2 as partners.
- rotate_qkv(qkv [T, 3 H K], bias [3 H K], cos [T, R], sin [T, R], heads): queries and keys, rotated, and values, each
  [T, H, K], of rows in which each head holds its query, key and value side by side (GPT-NeoX). The bias as in gelu.

Within `counting`, they also take fake tensors, of which they compute shapes and keep what the C++ ops keep, so that
rmcore/cost counts the memory of a run on CPUs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

NAMES = ("gelu", "swiglu", "layer_norm", "rms_norm", "rotate", "rotate_qkv")
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


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return _run("gelu", x, bias)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _run("swiglu", gate, up)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, half: bool) -> Tensor:
    return _run("layer_norm", x, weight, bias, eps, half)


def rms_norm(x: Tensor, weight: Tensor, eps: float, half: bool) -> Tensor:
    return _run("rms_norm", x, weight, eps, half)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _run("rotate", x, cos, sin)


def rotate_qkv(qkv: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return _run("rotate_qkv", qkv, bias, cos, sin, heads)


def _run(name: str, *inputs: Any) -> Any:
    if isinstance(inputs[0], FakeTensor):
        return _Counted.apply(name, *inputs)
    return getattr(torch.ops.rmcore, name)(*inputs)


class _Counted(torch.autograd.Function):
    """Shapes and kept tensors of an op."""

    @staticmethod
    def forward(ctx: Any, name: str, *inputs: Any) -> Any:
        x = inputs[0]
        ctx.inputs = [(value.shape, value.dtype) if isinstance(value, Tensor) else None for value in inputs]
        rotates = name.startswith("rotate")
        kept = [value for value in inputs[1 if rotates else 0 :] if isinstance(value, Tensor)]
        if name.endswith("norm"):
            kept.append(x.new_empty(*x.shape[:-1], 2))
        ctx.save_for_backward(*kept)
        if name == "rotate_qkv":
            heads = inputs[-1]
            return tuple(x.new_empty(x.shape[0], heads, x.shape[1] // (3 * heads)) for _ in range(3))
        return torch.empty_like(x, dtype=torch.bfloat16 if inputs[-1] is True else x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        found = (
            torch.empty(known[0], dtype=known[1]) if known and needed else None
            for known, needed in zip(ctx.inputs, ctx.needs_input_grad[1:], strict=True)
        )
        return None, *found
