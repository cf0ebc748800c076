"""The moving average of the weights: its formula, every strategy, kill and resume, evaluation and export."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from rmcore.config import UserError
from rmcore.hf_export.from_checkpoint import export
from tests.harness.configs import NEEDED, mistakes
from tests.harness.crash import Fault, Outcome, run
from tests.harness.small_run import ROUNDING, STEPS, arguments, metrics, same, stored_weights

DECAY = 0.75
# The rate of the first step is 0, so the average is the initial weights after it.
EMA = [f"optim.ema={DECAY}", "optim.warmup_steps=1"]
JUDGED = [*EMA, "run.weights=ema", "run.evals=2", "log.samples=0"]


def held_out(folder: Path) -> list[str]:
    return [f"data.eval.path={folder}/pairs.jsonl", "data.eval.split=train[:30%]"]


def checkpoint(outcome: Outcome, step: int = STEPS) -> Path:
    return outcome.directory / "checkpoints" / f"step-{step}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ema")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Outcome:
    """On one rank, with every checkpoint kept."""
    every = ("run.save_every=1", "run.keep=9")
    outcome = run(folder / "alone", arguments(folder, *EMA, *every), 1)
    assert outcome.codes == [0], outcome.text
    return outcome


def test_the_average_is_that_of_the_formula(alone: Outcome) -> None:
    """In fp64 from the weights after each step. A lerp in fp32 rounds three times, by 6e-8 of a weight of up to 1."""
    first = checkpoint(alone, 1)
    averages = {name: value.astype(np.float64) for name, value in stored_weights(first).items()}
    for step in range(2, STEPS + 1):
        for name, weight in stored_weights(checkpoint(alone, step)).items():
            averages[name] = DECAY * averages[name] + (1 - DECAY) * weight
        found = stored_weights(checkpoint(alone, step), "ema")
        assert found.keys() == averages.keys()
        for name, average in averages.items():
            scale = max(1.0, float(np.abs(average).max()))
            np.testing.assert_allclose(found[name], average, rtol=0, atol=3 * step * 6e-8 * scale, err_msg=name)
    start, end = stored_weights(first), stored_weights(checkpoint(alone))
    assert max(np.abs(end[name] - start[name]).max() for name in end) > 1e-3, "the weights moved"


@pytest.mark.distributed
@pytest.mark.parametrize(
    "strategy", ["zero2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero1", "zero3", "hsdp"))]
)
def test_every_strategy_keeps_the_same_average_and_trains_on_as_without(
    folder: Path, alone: Outcome, strategy: str
) -> None:
    """An evaluation of the average between two steps does not change what is trained."""
    more = [*JUDGED, *held_out(folder), f"parallel.strategy={strategy}"]
    ours = run(folder / strategy, arguments(folder, *more), 2)
    assert ours.codes == [0, 0], ours.text
    for kind in ("weight", "ema"):
        found, expected = stored_weights(checkpoint(ours), kind), stored_weights(checkpoint(alone), kind)
        assert max(np.abs(found[name] - expected[name]).max() for name in expected) < ROUNDING, kind
    average = stored_weights(checkpoint(ours), "ema")
    assert all(np.array_equal(ours.weights[name].ravel(), average[name]) for name in average), "what is exported"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_killed_and_resumed_the_average_is_equal_to_the_last_bit(folder: Path, strategy: str) -> None:
    more = [*JUDGED, *held_out(folder), f"parallel.strategy={strategy}"]
    whole = run(folder / f"whole-{strategy}", arguments(folder, *more), 2)
    place = folder / f"killed-{strategy}"
    assert run(place, arguments(folder, *more), 2, [Fault("compute", "kill", rank=1, nth=6)]).codes != [0, 0]
    again = run(place, arguments(folder, *more), 2)
    assert again.codes == [0, 0] and same(again, whole), again.text


@pytest.mark.slow
def test_killed_and_resumed_on_one_rank(folder: Path, alone: Outcome) -> None:
    place = folder / "killed"
    assert run(place, arguments(folder, *EMA), 1, [Fault("compute", "kill", nth=6)]).codes != [0]
    again = run(place, arguments(folder, *EMA), 1)
    assert again.codes == [0] and same(again, alone), again.text
    found, expected = stored_weights(checkpoint(again), "ema"), stored_weights(checkpoint(alone), "ema")
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_checkpoint_without_an_average_begins_it_and_exports_none(folder: Path, alone: Outcome) -> None:
    place = folder / "new"
    assert run(place, arguments(folder, EMA[1]), 1, [Fault("compute", "kill", nth=6)]).codes != [0]
    again = run(place, arguments(folder, *EMA, "run.save_every=1", "run.keep=9"), 1)
    assert again.codes == [0] and "optim.ema: null -> 0.75" in again.text and same(again, alone)
    before, after = (stored_weights(checkpoint(again, step)) for step in (4, 5))
    for name, average in stored_weights(checkpoint(again, 5), "ema").items():
        np.testing.assert_allclose(average, DECAY * before[name] + (1 - DECAY) * after[name], rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"holds no moving average: export it with run\.weights=trained"):
        export(str(checkpoint(again, 4)), str(folder / "none"), ["optim.ema=0.9", "run.weights=ema"])


def test_evaluated_and_exported_on_request(folder: Path, alone: Outcome) -> None:
    """A run with run.weights=ema, and afterwards `rmcore export` of the one and the other."""
    ours = run(folder / "judged", arguments(folder, *JUDGED, *held_out(folder)), 1, publish=True)
    assert ours.codes == [0], ours.text
    plain = run(folder / "plain", arguments(folder, *JUDGED, *held_out(folder), "run.weights=trained"), 1)
    losses = [[line["eval/rm/loss"] for line in metrics(one) if "eval/rm/loss" in line] for one in (ours, plain)]
    assert len(losses[0]) == len(losses[1]) == 2 and losses[0] != losses[1]
    exported = load_file(ours.directory / "model" / "model.safetensors")
    average, last = (stored_weights(checkpoint(alone), kind)["score.weight"] for kind in ("ema", "weight"))
    assert np.array_equal(exported["score.weight"].ravel(), average)
    again, other = folder / "ema-model", folder / "trained-model"
    export(str(ours.directory), str(again))
    assert (again / "model.safetensors").read_bytes() == (ours.directory / "model" / "model.safetensors").read_bytes()
    export(str(ours.directory), str(other), ["run.weights=trained"])
    assert np.array_equal(load_file(other / "model.safetensors")["score.weight"].ravel(), last)
    loss = f"{json.loads((ours.directory / 'run_status.json').read_text())['eval']['loss']:.4f}"
    assert loss in (again / "README.md").read_text() and loss not in (other / "README.md").read_text()


def test_what_an_average_needs(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, None, [*NEEDED, "run.weights=ema"])
    assert "run.weights of ema needs optim.ema" in line
