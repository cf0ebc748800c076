"""The exact GELU of a linear layer's output, whose backward also sums the gradient of that layer's bias.

Input: pre [T, F], the output of a linear layer, and the bias [F] that is part of it.
Output: pre Phi(pre), Phi being the normal distribution's (Hendrycks and Gimpel, arXiv 1606.08415). In the backward the
gradients of pre and of the bias, in one pass; apart, a GPU reads the gradient of pre once more for the bias.
Example: pre = [[0], [1]], gradient [[1], [1]]: the gradient of pre is [[0.5], [1.083]], that of the bias 1.583.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rmcore.ops.contract import LIBRARY, accumulate_dtype, add_at, differentiable_once

LIBRARY.define("biased_gelu(Tensor pre, Tensor bias) -> Tensor")
LIBRARY.define("biased_gelu_backward(Tensor grad, Tensor pre) -> (Tensor, Tensor)")
PART = 64  # rows that one sum of the backward adds up


def biased_gelu(pre_TF: Tensor, bias_F: Tensor) -> Tensor:
    """GELU of pre [T, F], which holds `bias_F` already; the bias gets its gradient here.

    Differentiable once, bitwise repeatable. Raises ValueError for other shapes.
    """
    if pre_TF.dim() != 2 or bias_F.shape != pre_TF.shape[1:]:
        raise ValueError(f"biased_gelu: expected [T, F] and [F], got {list(pre_TF.shape)} and {list(bias_F.shape)}")
    return torch.ops.rmcore.biased_gelu(pre_TF, bias_F)


def forward(pre: Tensor, bias: Tensor) -> Tensor:
    """The specification, and what runs on every device."""
    return F.gelu(pre)


def reference_backward(grad: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of pre, and of its rows the sums of each PART, in fp32."""
    wide = accumulate_dtype(grad)
    x = pre.to(wide)
    slope = 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) * (0.5 / math.pi) ** 0.5
    exact = grad.to(wide) * slope
    parts = exact.new_zeros(-(-len(grad) // PART), grad.shape[1])
    add_at(parts, torch.arange(len(grad), device=grad.device) // PART, exact)
    return exact.to(grad.dtype), parts


LIBRARY.impl("biased_gelu", forward, "CompositeExplicitAutograd")
LIBRARY.impl("biased_gelu_backward", reference_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("rmcore::biased_gelu", lib=LIBRARY)
def _(pre, bias):  # type: ignore[no-untyped-def]
    return torch.empty_like(pre)


@torch.library.register_fake("rmcore::biased_gelu_backward", lib=LIBRARY)
def _(grad, pre):  # type: ignore[no-untyped-def]
    parts = pre.new_empty(((pre.shape[0] + PART - 1) // PART, pre.shape[1]), dtype=accumulate_dtype(pre))
    return torch.empty_like(pre), parts


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.bias_dtype = inputs[1].dtype
    ctx.save_for_backward(inputs[0])


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    of_pre, parts = torch.ops.rmcore.biased_gelu_backward(grad, *ctx.saved_tensors)
    return of_pre, parts.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None


torch.library.register_autograd("rmcore::biased_gelu", _backward, setup_context=_setup_context, lib=LIBRARY)
differentiable_once("biased_gelu_backward")
