"""Decorrelation from length: value and gradient against torch.corrcoef in fp64, and the same walk at every cut."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rmcore.config import load_config
from rmcore.parallel.world import World
from rmcore.training.decorrelation import Decorrelation
from tests.harness.configs import NEEDED
from tests.harness.crash import Outcome, run
from tests.harness.small_run import ROUNDING, arguments, metrics

WORLD = World(0, 1, 0, 1, torch.device("cpu"))


def stub(weight: float) -> Any:
    """A run whose model's rewards are what the batch holds."""
    model = lambda batch: SimpleNamespace(rewards_A=batch.rewards_A)  # noqa: E731
    config = load_config(None, [*NEEDED, f"loss.length_decorrelation={weight}"])
    return SimpleNamespace(strategy=SimpleNamespace(model=model, autocast=nullcontext), world=WORLD, config=config)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_value_and_gradient_over_several_micro_batches(sign: float) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [torch.randint(1, 300, (n,), generator=generator).double() for n in (4, 0, 7, 2)]
    rewards = [(sign * 0.01 * x + torch.randn(len(x), generator=generator).double()).requires_grad_() for x in lengths]
    batches = [SimpleNamespace(rewards_A=r, length_A=x) for r, x in zip(rewards, lengths, strict=True)]
    one = Decorrelation(stub(0.3))
    for batch, _ in one.first_pass(iter([(batch, False) for batch in batches])):  # type: ignore[misc]
        one.loss(SimpleNamespace(rewards_A=batch.rewards_A), batch).backward()  # type: ignore[arg-type]

    whole = torch.cat([r.detach() for r in rewards]).requires_grad_()
    correlation = torch.corrcoef(torch.stack([whole, torch.cat(lengths)]))[0, 1]
    (0.3 * correlation.abs()).backward()
    found = torch.cat([r.grad for r in rewards if r.grad is not None])
    assert whole.grad is not None
    torch.testing.assert_close(found, whole.grad, rtol=1e-10, atol=1e-12)
    assert one.logged()["train/rm/length_correlation"] == pytest.approx(correlation.item(), rel=1e-10)


def test_equal_lengths_have_no_correlation() -> None:
    rewards = torch.randn(4, requires_grad=True)
    batch = SimpleNamespace(rewards_A=rewards, length_A=torch.full((4,), 3.0))
    one = Decorrelation(stub(1.0))
    one.first_pass(iter([(batch, True)]))  # type: ignore[list-item]
    one.loss(batch, batch).backward()  # type: ignore[arg-type]
    assert rewards.grad is not None and not rewards.grad.any() and one.logged() == {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With rows in which the longer answer is preferred."""
    folder = tmp_path_factory.mktemp("length")
    generator = np.random.Generator(np.random.PCG64(0))
    words = lambda n: " ".join(generator.choice(["one", "two", "three"], size=n))  # noqa: E731
    rows = [{"prompt": "p ", "chosen": words(12 + n % 5), "rejected": words(2 + n % 3)} for n in range(48)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def trained(folder: Path, name: str, weight: float, size: int = 1, *more: str) -> Outcome:
    keys = [f"loss.length_decorrelation={weight}", "log.every=1", *more]
    outcome = run(folder / name, arguments(folder, *keys), size)
    assert outcome.codes == [0] * size, outcome.text
    return outcome


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "size"),
    [("zero2", 2), *(pytest.param(name, 3, marks=pytest.mark.slow) for name in ("ddp", "zero1", "zero3", "hsdp"))],
)
def test_every_cut_and_strategy_trains_the_same(folder: Path, strategy: str, size: int) -> None:
    alone = trained(folder, f"alone-{strategy}", 2.0, 1, "batch.tokens=100000")
    ours = trained(folder, strategy, 2.0, size, f"parallel.strategy={strategy}", "batch.tokens=200")
    for key in ("train/rm/loss", "grad_norm", "train/rm/length_correlation"):
        found, expected = ([line[key] for line in metrics(one)] for one in (ours, alone))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4, err_msg=key)
    assert max(np.abs(ours.weights[name] - alone.weights[name]).max() for name in alone.weights) < ROUNDING


@pytest.mark.slow
def test_rewards_do_not_follow_the_length(folder: Path) -> None:
    more = ("run.epochs=6", "optim.schedule=constant")
    last = [metrics(trained(folder, f"w{w}", w, 1, *more))[-1] for w in (1e-9, 5.0)]
    plain, ours = (abs(line["train/rm/length_correlation"]) for line in last)
    assert plain > 0.8 and ours < plain - 0.3
