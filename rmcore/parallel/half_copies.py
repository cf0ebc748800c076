"""Keeps a bf16 copy of every weight for the arithmetic of a step, next to the fp32 weights that AdamW updates.

Input: a model in fp32.
Output: the same model in bf16, whose gradients autograd adds up in fp32; and its fp32 weights.
Example: 1.4 billion parameters, 2 micro batches per step. Autocast would cast 5.2 GB of weights to 2.6 GB in each of
them, and hand fp32 activations from layer to layer. The copies are made once per step, and activations are bf16.

The ddp strategies compute so on GPUs, as FSDP2's policy does under zero2 and zero3: the same numbers. On CPUs, autocast
keeps activations in fp32 between the layers, at a cost that is small there.

A copy is made again before the forward that follows a change of the weights. Whatever changes them says so: the
optimizer's step, by asking for the gradients, and everything else, by asking for the weights.
"""

import torch
from torch import Tensor, nn


class HalfCopies:
    """Makes `model` compute in bf16. `weights`: its fp32 weights, under its names."""

    def __init__(self, model: nn.Module) -> None:
        self._copies = dict(model.named_parameters())
        self.weights: dict[str, nn.Parameter] = {}
        self._stale = False
        for name, copy in self._copies.items():
            self.weights[name] = nn.Parameter(copy.data, requires_grad=copy.requires_grad)
            copy.data = copy.data.to(torch.bfloat16)
            copy.grad_dtype = torch.float32
        self._weight_of = {id(copy): self.weights[name] for name, copy in self._copies.items()}

    def changing(self) -> None:
        """Call it before the weights change."""
        self._stale = True

    @torch.no_grad()
    def refresh(self) -> None:
        """Call it before each forward."""
        if self._stale:
            torch._foreach_copy_(list(self._copies.values()), list(self.weights.values()))
            self._stale = False

    def hand_over_gradients(self) -> None:
        """Give the gradients to the fp32 weights, and none to the copies."""
        for name, copy in self._copies.items():
            self.weights[name].grad, copy.grad = copy.grad, None

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Of `model`, with the fp32 weights in place of their copies."""
        state = model.state_dict(keep_vars=True)
        return {name: self._weight_of.get(id(value), value).detach() for name, value in state.items()}
