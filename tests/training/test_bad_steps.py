"""When the counts of non-finite steps are read: on a GPU only in steps that log, the last step among them; and which
losses are noted as a jump.
"""

from types import SimpleNamespace

import pytest
import torch

from rmcore.config import load_config
from rmcore.parallel.world import RankError, World, running_world
from rmcore.tracking.tracker import Tracker
from rmcore.training.bad_steps import BadSteps
from tests.harness.device_reads import DeviceReads

CONFIG = ["model.name=synthetic", "data.train.path=synthetic", "log.every=4", "run.max_bad_steps=2"]


class Lines(Tracker):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: object) -> None:
        self.lines.append(str(text))


def stub_strategy(device: torch.device) -> SimpleNamespace:
    """A strategy with two parameters on `device`."""
    parameters = {name: torch.nn.Parameter(torch.ones(1, device=device)) for name in ("good", "bad")}
    return SimpleNamespace(
        adamw=SimpleNamespace(), named_parameters=lambda: parameters, grad_norms_W=torch.ones(2, device="cpu")
    )


def test_adamw_is_told_on_the_device_of_its_weights() -> None:
    """With parallel.offload the norm is on the GPU and AdamW on the CPU; here the devices are the CPU and meta."""
    strategy = stub_strategy(torch.device("meta"))
    with running_world(30) as world:
        run = SimpleNamespace(config=load_config(None, CONFIG), world=world, strategy=strategy)
        BadSteps(run, Lines()).watch(torch.tensor(1.0))  # type: ignore[arg-type]
    assert strategy.adamw.found_inf.device.type == "meta"


def test_a_gpu_is_read_in_steps_that_log_and_in_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps, of which 5 and 6 are bad: nothing is read at 5, and 6 ends the run although 6 % 4 > 0."""
    monkeypatch.setattr(World, "reads_wait", True)
    strategy = stub_strategy(torch.device("cpu"))
    with running_world(30) as world:
        run = SimpleNamespace(
            config=load_config(None, CONFIG), world=world, strategy=strategy, plan=SimpleNamespace(steps=6)
        )
        tracker = Lines()
        bad_steps = BadSteps(run, tracker)  # type: ignore[arg-type]
        for done in range(1, 5):
            bad_steps.watch(torch.tensor(1.0))
            bad_steps.report(done, logged=done == 4)
        strategy.grad_norms_W = torch.tensor([1.0, torch.nan])
        with DeviceReads() as reads:
            bad_steps.watch(torch.tensor(torch.nan))
            bad_steps.report(5, logged=False)
        assert reads.seen == [] and tracker.lines == []
        bad_steps.watch(torch.tensor(torch.nan))
        with pytest.raises(RankError, match="2 steps in a row up to step 6 had NaN or Inf in the gradient"):
            bad_steps.report(6, logged=True)
    assert tracker.lines == ["warning: 2 of the steps up to 6 skipped on all ranks: NaN or Inf in the gradient of bad"]


@pytest.mark.parametrize(
    ("before", "loss", "noted"),
    [
        ([1.0, 1.1] * 4, 1.6, True),  # mean 1.05, deviation 0.053: limits of 1.371 and 1.575
        ([1.0, 1.1] * 4, 1.5, False),  # far beyond the deviation, but not 1.5 times the mean
        ([0.5, 1.5] * 4, 3.0, False),  # mean 1, deviation 0.53: three times the mean, but the loss is as uneven as that
        ([1.0, 1.1] * 3 + [1.0], 9.0, False),  # after seven intervals nothing is known
        ([1.0, 1.1] * 3 + [1.0, float("nan")], 9.0, False),  # NaN does not count as one
        ([1.0, 1.1] * 4, float("nan"), False),
        ([9.0, *[1.0, 1.1] * 10], 1.6, True),  # the mean is that of the last twenty
    ],
)
def test_a_jump_of_the_loss_is_noted(before: list[float], loss: float, noted: bool) -> None:
    with running_world(30) as world:
        run = SimpleNamespace(
            config=load_config(None, CONFIG), world=world, strategy=stub_strategy(torch.device("cpu"))
        )
        tracker = Lines()
        bad_steps = BadSteps(run, tracker)  # type: ignore[arg-type]
        for earlier in before:
            bad_steps.note_spike({"train/rm/loss": earlier})
        assert tracker.lines == []
        bad_steps.note_spike({"train/rm/loss": loss})
    assert tracker.lines == [f"note: the loss jumped to {loss:.4f} from a mean of 1.0500"] * noted
