"""Reduces fp32 gradients of bf16 weights over the ranks that hold all weights (ddp, zero1).

Input: parameters, each with a gradient in fp32, while a backward runs.
Output: gradients that are the means over the ranks.
Example: 3 micro batches on 2 ranks: the first two only add to the gradients. In the third, the gradient of the last
layer is reduced while the backward computes that of the layer before it.

DistributedDataParallel reduces gradients in the dtype of the weights. Here each gradient is added up in fp32, by
autograd (`Tensor.grad_dtype`) or by the hook of rmcore/parallel/half_copies.py, and each sum is reduced in place,
without a copy, when it is complete. All ranks start the reductions in the same order, last parameter first.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


class GradientReduction:
    """Means over all ranks of the gradients of `parameters`, which are added up in the `grad` of `sums`.

    sums: the parameters themselves, or a tensor for each.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], sums: Sequence[nn.Parameter], world_size: int) -> None:
        self._order, self._world_size = list(reversed(parameters)), world_size
        self._sums = list(reversed(sums))
        self._ready: set[Tensor] = set()
        self._works: list[dist.Work] = []
        self._enabled = False
        for parameter in self._order:
            parameter.register_post_accumulate_grad_hook(self._complete)

    @contextmanager
    def around(self, *, last: bool) -> Iterator[None]:
        """Goes around the forward and backward of a micro batch; after the last one the gradients are reduced."""
        self._enabled = last
        try:
            yield
            if last:
                self._ready.update(self._order)  # a rank may have no gradient of an expert: it adds zero
                self._start()
                for work in self._works:
                    work.wait()
                torch._foreach_div_([p.grad for p in self._sums if p.grad is not None], self._world_size)
        finally:
            self._enabled, self._works = False, []
            self._ready.clear()

    def _complete(self, parameter: Tensor) -> None:
        if self._enabled:
            self._ready.add(parameter)
            self._start()

    def _start(self) -> None:
        while len(self._works) < len(self._order) and self._order[len(self._works)] in self._ready:
            held = self._sums[len(self._works)]
            if held.grad is None:
                held.grad = torch.zeros_like(held, dtype=torch.float32)
            work = dist.all_reduce(held.grad, async_op=True)
            assert work is not None, "every rank is in the group"
            self._works.append(work)
