"""Learning rates against transformers' schedules, and the score head's own rate under every strategy."""

import json
from pathlib import Path

import pytest
import torch
from transformers import optimization

from rmcore.config.optim import OptimConfig
from rmcore.parallel.optim import learning_rate, parameter_groups, set_learning_rates
from tests.harness.configs import NEEDED, mistakes
from tests.harness.crash import Fault, run
from tests.harness.small_run import arguments, reference, same

STEPS = 40
CASES = [
    (
        {"schedule": "wsd", "warmup_steps": 4, "decay_ratio": 0.25, "min_lr_ratio": 0.1},
        lambda o: optimization.get_wsd_schedule(o, 4, 10, num_stable_steps=26, decay_type="linear", min_lr_ratio=0.1),
        4,  # transformers' warm-up of this schedule begins at the minimum, ours at zero
    ),
    (
        {"schedule": "cosine", "warmup_ratio": 0.11, "min_lr_ratio": 0.2},
        lambda o: optimization.get_cosine_with_min_lr_schedule_with_warmup(o, 5, STEPS, min_lr_rate=0.2),
        0,
    ),
    (
        {"schedule": "linear", "warmup_ratio": 0.1},
        lambda o: optimization.get_linear_schedule_with_warmup(o, 4, STEPS),
        0,
    ),
    ({"schedule": "constant", "warmup_ratio": 0.1}, lambda o: optimization.get_constant_schedule_with_warmup(o, 4), 0),
]


@pytest.mark.parametrize(("keys", "theirs", "first"), CASES, ids=[case[0]["schedule"] for case in CASES])
def test_the_schedules_are_those_of_transformers(keys, theirs, first) -> None:
    config = OptimConfig(lr=1e-4, **keys)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    schedule = theirs(optimizer)
    for step in range(STEPS):
        if step >= first:
            assert learning_rate(config, step, STEPS) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12), step
        optimizer.step()
        schedule.step()


def test_the_decay_of_wsd_begins_after_the_warm_up_and_ends_at_the_minimum() -> None:
    config = OptimConfig(lr=1.0, schedule="wsd", warmup_steps=8, decay_ratio=0.5, min_lr_ratio=0.25)
    rates = [learning_rate(config, step, 10) for step in range(11)]
    assert rates == [0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 0.625, 0.25]


def test_the_head_has_a_group_of_its_own() -> None:
    parameters = {
        "backbone.a": torch.nn.Parameter(torch.zeros(2, 2)),
        "backbone.b": torch.nn.Parameter(torch.zeros(2)),
        "score.weight": torch.nn.Parameter(torch.zeros(1, 2)),
    }
    config = OptimConfig(lr=1e-3, head_lr=1e-2, weight_decay=0.1, warmup_steps=2)
    optimizer = torch.optim.AdamW(parameter_groups(parameters, config))
    assert set_learning_rates(optimizer, config, 1, 4) == {"train/rm/lr": 5e-4, "train/rm/head_lr": 5e-3}
    of = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert [of[id(p)] for p in parameters.values()] == [(5e-4, 0.1), (5e-4, 0.0), (5e-3, 0.1)]
    assert len(parameter_groups(parameters, OptimConfig())) == 1, "as before without the key"


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["optim.warmup_steps=2", "optim.warmup_ratio=0.1"], "optim.warmup_ratio and optim.warmup_steps exclude"),
        (["optim.decay_ratio=0.2"], "optim.decay_ratio has no effect on optim.schedule=linear, only on wsd"),
        (["optim.schedule=constant", "optim.min_lr_ratio=0.1"], "optim.min_lr_ratio has no effect"),
        (["optim.schedule=wsd", "optim.warmup_ratio=0.6", "optim.decay_ratio=0.5"], "more than the whole run"),
    ],
)
def test_combinations_without_a_meaning(tmp_path: Path, overrides: list[str], text: str) -> None:
    (line,) = mistakes(tmp_path, None, [*NEEDED, *overrides])
    assert text in line


HEAD = ["optim.head_lr=1e-2", "optim.weight_decay=0.1", "optim.schedule=wsd", "optim.warmup_ratio=0.25"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("head-lr")


@pytest.mark.distributed
@pytest.mark.parametrize(
    "strategy", ["zero3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero1", "zero2", "hsdp"))]
)
def test_a_rate_of_its_own_under_every_strategy(folder: Path, strategy: str) -> None:
    """The score head follows one rank to the rounding, and its rate is the tenfold; AdamW's state has two groups."""
    alone = reference(folder, *HEAD, size=1)
    ours = run(folder / strategy, arguments(folder, *HEAD, f"parallel.strategy={strategy}"), 2)
    assert ours.codes == [0, 0], ours.text
    for name in alone.weights:
        # Two world sizes add in another order; lr * 1e-7 / eps per step (see small_run.ROUNDING) is ten times as much.
        assert abs(ours.weights[name] - alone.weights[name]).max() < 1e-3, name
    lines = [json.loads(line) for line in (ours.directory / "metrics.jsonl").read_text().splitlines()]
    rates = [(line["train/rm/lr"], line["train/rm/head_lr"]) for line in lines]
    assert len(rates) == 4 and all(head == pytest.approx(10 * lr) for lr, head in rates)


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_and_resumed(folder: Path) -> None:
    whole = reference(folder, *HEAD)
    killed = run(folder / "killed", arguments(folder, *HEAD), 2, [Fault("compute", "kill", rank=1, nth=6)])
    assert killed.codes != [0, 0]
    again = run(folder / "killed", arguments(folder, *HEAD), 2)
    assert again.codes == [0, 0] and same(again, whole)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_checkpoint_without_the_key_resumes_with_it(folder: Path) -> None:
    killed = run(folder / "before", arguments(folder), 1, [Fault("compute", "kill", nth=6)])
    assert killed.codes != [0]
    after = run(folder / "before", arguments(folder, "optim.head_lr=1e-2"), 1)
    assert after.codes == [0] and "optim.head_lr: null -> 0.01" in after.text, after.text
