"""Shared by the contract files of the ops: the library that they register in, and three rules of arithmetic.

Example: accumulate_dtype(bf16 tensor, fp32 tensor) is torch.float32; add_at(zeros(3), [1, 1], [2., 3.]) is [0, 5, 0].
"""

import torch
from torch import Tensor

LIBRARY = torch.library.Library("rmcore", "FRAGMENT")


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of sums: fp64 if an input is fp64 (oracles, gradcheck), else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def add_at(target: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """target[index] += values in place, with repeats summed in a fixed order.

    index_add_ has a fixed order only on the CPU; on CUDA index_put_ has one.
    """
    if target.is_cuda:
        return target.index_put_((index,), values, accumulate=True)
    return target.index_add_(0, index, values)


def differentiable_once(op: str) -> None:
    """Make a second derivative through the backward op `op` an error; without this it would be zero."""

    def refuse(ctx, *grads):  # type: ignore[no-untyped-def]
        raise NotImplementedError(f"rmcore::{op} has no second derivative")

    torch.library.register_autograd(f"rmcore::{op}", refuse, lib=LIBRARY)
