"""The bf16 copies with which the ddp strategies compute on GPUs, here on a CPU that stands for one."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from rmcore.checkpoint.resume import choose_start
from rmcore.config import Config, load_config
from rmcore.parallel.half_copies import HalfCopies
from rmcore.parallel.reduction import GradientReduction
from rmcore.parallel.strategy import local
from rmcore.parallel.world import World, running_world, start_world
from rmcore.tracking.tracker import Tracker
from rmcore.train import train
from rmcore.training.assembly import assemble
from rmcore.training.run import Run
from tests.harness.ranks import run_ranks
from tests.harness.walks import STEPS_OF_SEVEN

BASE = [
    *STEPS_OF_SEVEN,
    "model.name=synthetic",
    "parallel.precision=bf16",
    "run.evals=2",
    "batch.tokens=200",
    "run.max_steps=3",
    "optim.schedule=constant",  # so that a run of two steps is the beginning of one of three
]


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Config.computes_with_copies
    monkeypatch.setattr(Config, "computes_with_copies", lambda self, *, cuda: real(self, cuda=True))


def trained(world: World, folder: Path, *overrides: str) -> tuple[Run, dict[str, torch.Tensor]]:
    """A run after its last step, and its fp32 weights."""
    config = load_config(None, [*BASE, f"run.dir={folder}", *overrides])
    run = assemble(config, world, choose_start(config, world))
    assert len(run.plan.step(0).ranks[0]) > 1, "several micro batches per step"
    train(run, Tracker())
    return run, {name: local(p.detach()).clone() for name, p in run.strategy.named_parameters().items()}


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero1", marks=pytest.mark.slow)])
def test_the_numbers_are_those_of_zero2(tmp_path: Path, on_gpus: None, strategy: str) -> None:
    """FSDP2 casts fp32 shards to bf16 and reduces in fp32: the same arithmetic, in an independent implementation."""
    free = "optim.ema=0.5", "optim.max_grad_norm=0"  # FSDP2's norm is added up in another order
    with running_world(60, seed=1) as world:
        run, ours = trained(world, tmp_path / "ours", f"parallel.strategy={strategy}", *free)
        assert {p.dtype for p in run.strategy.model.parameters()} == {torch.bfloat16}
        theirs_run, theirs = trained(world, tmp_path / "theirs", "parallel.strategy=zero2", *free)
        assert ours.keys() == theirs.keys()
        for name, weight in theirs.items():
            assert ours[name].dtype == torch.float32
            assert torch.equal(ours[name], weight), name
        for name, average in theirs_run.strategy.ema.weights.items():  # type: ignore[union-attr]
            assert torch.equal(run.strategy.ema.weights[name], local(average))  # type: ignore[union-attr]
        exported = dict(run.strategy.whole_tensors())
        assert all(torch.equal(exported[name], weight) for name, weight in ours.items()), "fp32 is exported"

        # A forward sees what the weights were exchanged for, and afterwards the weights again.
        strategy = run.strategy
        averages = strategy.ema.weights  # type: ignore[union-attr]
        for expected, exchanged in (({k: v.clone() for k, v in averages.items()}, True), (ours, False)):
            with strategy.ema.in_place() if exchanged else nullcontext(), strategy.autocast():  # type: ignore[union-attr]
                copies = dict(strategy.model.named_parameters())
                assert all(torch.equal(copies[name], value.to(torch.bfloat16)) for name, value in expected.items())


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, on_gpus: None) -> None:
    with running_world(60, seed=1) as world:
        _, whole = trained(world, tmp_path / "whole")
        trained(world, tmp_path / "parts", "run.max_steps=2", "run.save_every=2", "run.evals=0")
        run, resumed = trained(world, tmp_path / "parts", "run.evals=0")
        assert run.start.step == 2
        assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def test_only_gpus_compute_with_copies() -> None:
    def config(*overrides: str) -> Config:
        return load_config(None, [*BASE, *overrides])

    assert config().computes_with_copies(cuda=True) and not config().computes_with_copies(cuda=False)
    for other in ("parallel.strategy=zero2", "parallel.precision=fp32", "model.weights=bf16", "model.lora.rank=4"):
        assert not config(other).computes_with_copies(cuda=True)
    with running_world(60) as world:
        run = assemble(config(), world)
        assert {p.dtype for p in run.strategy.model.parameters()} == {torch.float32}


def test_gradients_of_micro_batches_are_added_in_fp32() -> None:
    layer = torch.nn.Linear(4, 1, bias=False)
    copies = HalfCopies(layer)
    for value in (1.0, 2.0**-10):  # bf16 cannot hold their sum
        layer(torch.full((1, 4), value, dtype=torch.bfloat16)).sum().backward()
    assert torch.equal(copies.weights["weight"].grad, torch.full((1, 4), 1.0 + 2.0**-10))  # type: ignore[arg-type]
    assert layer.weight.grad is None


def reduced(rendezvous: str) -> list[float]:
    """The reduced gradient of two micro batches on this rank."""
    world = start_world(60.0, init_method=rendezvous)
    layer = torch.nn.Linear(4, 1, bias=False)
    copies = HalfCopies(layer)
    reduction = GradientReduction([layer.weight], [copies.weights["weight"]], world.size)
    for value, last in ((1.0, False), (2.0 ** -(10 + world.rank), True)):
        with reduction.around(last=last):
            layer(torch.full((1, 4), value, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad is None
    return copies.weights["weight"].grad.flatten().tolist()  # type: ignore[union-attr]


@pytest.mark.distributed
def test_ranks_reduce_the_fp32_sums(tmp_path: Path) -> None:
    for result in run_ranks(reduced, 2, tmp_path):
        assert result.value == [1.0 + 0.5 * (2.0**-10 + 2.0**-11)] * 4


def without_an_expert(rendezvous: str) -> list[list[float]]:
    """The reduced gradients of three weights, of which the second has none on rank 1."""
    world = start_world(20.0, init_method=rendezvous)
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    reduction = GradientReduction(weights, weights, world.size)
    with reduction.around(last=True):
        used = weights if world.rank == 0 else [weights[0], weights[2]]
        torch.stack([place * weight for place, weight in enumerate(used, 1)]).sum().backward()
    return [weight.grad.tolist() for weight in weights]  # type: ignore[union-attr]


@pytest.mark.distributed
def test_a_rank_without_a_token_for_an_expert_adds_zero(tmp_path: Path) -> None:
    """Gradients of 1, 2 and 3 on rank 0; of 1, none and 2 on rank 1."""
    for result in run_ranks(without_an_expert, 2, tmp_path):
        assert result.value == [[1.0] * 2, [1.0] * 2, [2.5] * 2]
