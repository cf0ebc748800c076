"""Keeps a bf16 copy of every weight for the arithmetic of a step, next to the fp32 weights that AdamW updates.

Input: a model in fp32.
Output: the same model in bf16; and its fp32 weights, at which its gradients add up in fp32.
Example: 1.4 billion parameters, 2 micro batches per step. Autocast would cast 5.2 GB of weights to 2.6 GB in each of
them, and hand fp32 activations from layer to layer. The copies are made once per step, and activations are bf16.

The ddp strategies compute so on GPUs, as FSDP2's policy does under zero2 and zero3: the same numbers. On CPUs, autocast
keeps activations in fp32 between the layers, at a cost that is small there. The weights that transformers keeps in fp32
(rmcore/model/fp32_parts.py) have no copy.

A gradient leaves its bf16 copy as soon as autograd has computed it, and is added to the fp32 sum as it is. To cast it
first (`Tensor.grad_dtype`) would move 18 bytes per parameter in place of 10, in each micro batch after the first.

A copy is made again before the forward that follows a change of the weights. Whatever changes them says so: the
optimizer's step, by asking for the gradients, and everything else, by asking for the weights.
"""

from functools import partial

import torch
from torch import Tensor, nn

from rmcore.model.fp32_parts import kept_in_fp32


class HalfCopies:
    """Makes `model` compute in bf16. `weights`: its fp32 weights, under its names."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = dict(model.named_parameters())
        kept = kept_in_fp32(model)
        self._copies = {name: parameter for name, parameter in self.weights.items() if name not in kept}
        self._stale = False
        for name, copy in self._copies.items():
            self.weights[name] = nn.Parameter(copy.data, requires_grad=copy.requires_grad)
            copy.data = copy.data.to(torch.bfloat16)
            if copy.requires_grad:
                copy.register_post_accumulate_grad_hook(partial(_add, self.weights[name]))
        self._weight_of = {id(copy): self.weights[name] for name, copy in self._copies.items()}

    def changing(self) -> None:
        """Call it before the weights change."""
        self._stale = True

    @torch.no_grad()
    def refresh(self) -> None:
        """Call it before each forward."""
        if self._stale:
            torch._foreach_copy_(list(self._copies.values()), [self.weights[name] for name in self._copies])
            self._stale = False

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Of `model`, with the fp32 weights in place of their copies."""
        state = model.state_dict(keep_vars=True)
        return {name: self._weight_of.get(id(value), value).detach() for name, value in state.items()}


@torch.no_grad()
def _add(weight: nn.Parameter, copy: Tensor) -> None:
    """Move the gradient of a micro batch from the copy to the fp32 sum of the weight."""
    assert copy.grad is not None
    if weight.grad is None:
        weight.grad = copy.grad.to(torch.float32)
    else:
        weight.grad.add_(copy.grad)
    copy.grad = None
