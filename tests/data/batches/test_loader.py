"""The loader's copies to a GPU: on a stream of their own, before the model's stream reads a batch, and not after."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from rmcore.data.batches import loader as loading
from rmcore.data.batches.batch import build_batch
from rmcore.data.batches.loader import CopyStream, Loader
from rmcore.data.batches.step_plan import Step
from tests.harness.oracle import odd_items

META = torch.device("meta")  # stands for a GPU: its tensors have no memory


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of CUDA's streams, in order."""
    found: list[str] = []
    on = ["model"]

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = "copies" if name == META else name

        def record_event(self) -> str:
            found.append(f"event on {self.name}")
            return self.name  # type: ignore[return-value]

        def wait_event(self, event: str) -> None:
            found.append(f"{self.name} waits for {event}")

    @contextmanager
    def stream(chosen: Stream):  # type: ignore[no-untyped-def]
        on.append(chosen.name)  # type: ignore[arg-type]
        yield
        on.pop()

    real = torch.Tensor.to

    def to(tensor, *arguments, **keywords):  # type: ignore[no-untyped-def]
        found.append(f"copy on {on[-1]}")
        return real(tensor, *arguments, **keywords)

    one = Stream(META)
    monkeypatch.setattr(loading, "_copy_stream", lambda device: one)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("model"))
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # it needs a GPU
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, user: found.append(f"used on {user.name}"))
    return found


def test_the_copies_are_on_their_own_stream_and_the_model_waits_for_them(log: list[str]) -> None:
    batch = build_batch(odd_items(), range(8), language=True)
    copies = CopyStream(META)
    sent = copies.send(batch)
    tensors = len(log) - 1
    assert tensors > 20 and log == ["copy on copies"] * tensors + ["event on copies"]
    log.clear()
    received = copies.receive(sent)
    # Every tensor that was copied is known to be in use on the model's stream, which waited before that.
    assert log == ["model waits for copies"] + ["used on model"] * tensors
    assert received.input_ids_T.device == received.layout.gather.cu_q.device == META
    assert received.layout.segments_S4 is batch.layout.segments_S4


def test_the_loader_sends_ahead_and_receives_when_a_batch_is_read(log: list[str]) -> None:
    step = Step(0, 0.0, 3, 3.0, ((np.array([0, 1]), np.array([2])),))
    with Loader(odd_items(), [step], 0, torch.device("cpu")) as loader:
        loader._copies = CopyStream(META)
        batches = [found for _, of_step in loader for found in of_step]
    assert [last for _, last in batches] == [False, True]
    assert all(batch.input_ids_T.device == META for batch, _ in batches)
    assert log.count("event on copies") == log.count("model waits for copies") == 2
