"""An exponential moving average of the trained weights, kept where the weights are.

Input: a strategy with its weights, after each update.
Output: the average, in fp32, in the same parts on the same ranks and devices as the weights; and the weights exchanged
for it, to be evaluated and exported.
Example: decay 0.9, a weight of 1.0 at the start, 2.0 after the first update and 3.0 after the second: the average is
1.0, then 0.9 * 1.0 + 0.1 * 2.0 = 1.1, then 0.9 * 1.1 + 0.1 * 3.0 = 1.29.

Polyak and Juditsky 1992, SIAM J. Control Optim. 30, p. 838-855, with constant decay. The average starts at the initial
weights and has no correction for them. A skipped step counts as an update that changes nothing. No communication.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Ema:
    """The average of the trained weights.

    Args:
        named_parameters: of the strategy; called before each exchange, too.
    Attributes:
        weights: the average of every trained parameter under its name; DTensors where the parameters are.
    """

    def __init__(self, named_parameters: Callable[[], dict[str, nn.Parameter]], decay: float) -> None:
        self._named_parameters, self._decay = named_parameters, decay
        trained = {name: p for name, p in named_parameters().items() if p.requires_grad}
        self._parameters = list(trained.values())
        self.weights = {name: parameter.detach().clone() for name, parameter in trained.items()}

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again at the present weights."""
        torch._foreach_copy_(self._averages(), self._present())

    @torch.no_grad()
    def update(self) -> None:
        """Call it after each step of the optimizer: average = decay * average + (1 - decay) * weight."""
        torch._foreach_lerp_(self._averages(), self._present(), 1.0 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model has the averages for weights; after that, the weights again, to the last bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        self._named_parameters()  # under zero2, drop the gathered copies: they have the former values
        for weight, average in zip(self._present(), self._averages(), strict=True):
            former = weight.clone()  # one tensor at a time: the exchange needs little memory
            weight.copy_(average)
            average.copy_(former)

    def _averages(self) -> list[Tensor]:
        return [_local(average) for average in self.weights.values()]

    def _present(self) -> list[Tensor]:
        return [_local(parameter.detach()) for parameter in self._parameters]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
