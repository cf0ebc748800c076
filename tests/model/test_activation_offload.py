"""The inputs of checkpointed layers wait in host memory: which are copied, in which order, and what comes back."""

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rmcore.config import UserError, load_config
from rmcore.model import activation_offload
from rmcore.model.activation_offload import offload_inputs
from tests.harness.configs import NEEDED


class Layer(nn.Module):
    """x -> x + tanh(W x), checkpointed as transformers' layers are."""

    def __init__(self, number: int, log: list[str]) -> None:
        super().__init__()
        self.linear, self.number, self.log = nn.Linear(4, 4), number, log
        self._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._gradient_checkpointing_func(self.compute, x)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        self.log.append(f"compute {self.number}")
        return x + torch.tanh(self.linear(x))


def layers(log: list[str]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(number, log) for number in range(3)))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets the CPU pass for a GPU with streams, and logs what they are told. The log holds the copies in order."""
    log: list[str] = []
    streams = [SimpleNamespace(wait_stream=lambda other: None, name=name) for name in ("compute", "copies")]
    current = streams[:1]

    @contextmanager
    def stream(chosen):
        current.append(chosen)
        yield
        current.pop()

    def empty_like(tensor, *, device, pin_memory):
        assert device == "cpu" and pin_memory
        log.append("copy out")
        return torch.full_like(tensor, torch.nan)

    def copied(self, device, non_blocking=False):
        assert current[-1].name == "copies" and non_blocking
        log.append("copy back")
        return self.clone()

    cuda = SimpleNamespace(Stream=lambda device: streams[1], current_stream=lambda device: streams[0], stream=stream)
    monkeypatch.setattr(activation_offload, "torch", SimpleNamespace(cuda=cuda, empty_like=empty_like))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None, raising=False)
    monkeypatch.setattr(torch.Tensor, "to", copied)
    return log


def test_each_input_leaves_and_returns_one_layer_ahead(device: list[str]) -> None:
    plain, offloaded = layers([]), layers(device)
    offload_inputs(offloaded)
    x = torch.randn(5, 4)
    for micro_batch in range(2):
        device.clear()
        for model in (plain, offloaded):
            model(x.clone().requires_grad_()).square().sum().backward()
        forward = [f"{what} {n}" if what == "compute" else what for n in range(3) for what in ("copy out", "compute")]
        # The backward of layer 2 starts the return of its own input and of the one before it, and so on.
        backward = ["copy back", "copy back", "compute 2", "copy back", "compute 1", "compute 0"]
        assert device == [*forward, *backward], micro_batch
    for ours, theirs in zip(offloaded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("key", ["parallel.recompute=offload", "parallel.context=2"])
def test_what_is_not_combined_with_compile(key: str) -> None:
    load_config(None, [*NEEDED, key])
    with pytest.raises(UserError, match=rf"parallel.compile and {key.removesuffix('=2')} exclude each other"):
        load_config(None, [*NEEDED, key, "parallel.compile=true"])
