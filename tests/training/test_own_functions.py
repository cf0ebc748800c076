"""Functions of the user in a real run: an objective, a metric and a reader of rows, by their import paths."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import rmcore
from rmcore.config import SourceConfig, load_config
from rmcore.data.reading.sources import Source, load_sources
from tests.harness.small_run import arguments

MODULE = """
import torch.nn.functional as F
from rmcore import Traits

def own_hinge(rewards_A, data, settings):
    d = rewards_A[data.winner_P] - rewards_A[data.loser_P] - data.margin_P
    return (data.weight_P * F.relu(1.0 - d)).sum()

def squared(rewards_A, data, settings):
    return ((rewards_A - data.score_A) ** 2).sum()

squared.traits = Traits(scores=True, counts="answers")

def worst_margin(rewards_A, data):
    return (rewards_A[data.winner_P] - rewards_A[data.loser_P]).min()

worst_margin.better = "more"

def spread(rewards_A, data):
    return rewards_A.std()

spread.better = "less"

def undirected(rewards_A, data):
    return rewards_A.std()

def misdirected(rewards_A, data):
    return rewards_A.std()

misdirected.better = "higher"

def renamed(row):
    return {"prompt": row["q"], "chosen": row["good"], "rejected": row["bad"], "source": row["source"]}

def refuses(row):
    raise KeyError("q")
"""

BEST = "run.metrics=[own_functions:{0}];run.best_metric=eval/rm/{0};run.evals=1;data.eval.path=pairs.jsonl"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory with the module own_functions and rows that rmcore itself does not read."""
    (tmp_path / "own_functions.py").write_text(MODULE)
    base(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    other = [{"q": r["prompt"], "good": r["chosen"], "bad": r["rejected"], "source": r["source"]} for r in rows]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("own_functions", None)


def base(folder: Path, *more: str) -> list[str]:
    return arguments(folder, "data.template=simple_chat", "log.report=none", "run.max_steps=4", *more)


def fit(folder: Path, name: str, *more: str) -> rmcore.FinishedRun:
    given = {argument.split("=")[0] for argument in more}
    kept = [argument for argument in base(folder) if argument.split("=")[0] not in given]
    return rmcore.fit(load_config(None, [*kept, *more, f"run.dir={folder / name}"]))


def weights(run: rmcore.FinishedRun) -> dict[str, torch.Tensor]:
    return load_file(run.model_dir / "model.safetensors")


def test_own_functions_train_as_those_of_rmcore(folder: Path) -> None:
    own = fit(
        folder,
        "own",
        "loss.name=own_functions:own_hinge",
        "run.metrics=[own_functions:worst_margin]",
        "run.evals=1",
        "data.train={path: other.jsonl, format: 'own_functions:renamed'}",
        "data.eval.path=pairs.jsonl",
    )
    theirs = fit(folder, "theirs", "loss.name=hinge", "run.evals=1", "data.eval.path=pairs.jsonl")
    ours, hinge = weights(own), weights(theirs)
    for name in hinge:  # fp32 sums of the same terms in another order; the weights of bradley_terry differ by 1e-3
        torch.testing.assert_close(ours[name], hinge[name], atol=1e-4, rtol=0)

    logged = own.evaluations[-1]
    rewards = own.load(device="cpu")
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    pairs = [rewards.score(row["prompt"], [row["chosen"], row["rejected"]]) for row in rows]
    expected = min(pair[0] - pair[1] for pair in pairs if pair[0] is not None and pair[1] is not None)
    assert logged["eval/rm/worst_margin"] == pytest.approx(expected, abs=1e-5)
    assert own.metrics["own"]["worst_margin"] == logged["eval/rm/worst_margin"]
    assert logged["eval/rm/objective_loss"] == pytest.approx(theirs.evaluations[-1]["eval/rm/objective_loss"], abs=1e-4)

    # The model does not need the functions that it was trained with.
    (folder / "own_functions.py").unlink()
    del sys.modules["own_functions"]
    assert rmcore.load(own.model_dir, device="cpu").score("Why?", ["So."])[0] is not None


@pytest.mark.parametrize(("metric", "best"), [("worst_margin", max), ("spread", min)])
def test_the_best_checkpoint_by_an_own_metric_is_exported(folder: Path, metric: str, best: Any) -> None:
    run = fit(folder, metric, *BEST.format(metric).split(";"), "run.evals=4", "optim.lr=0.1", "run.save_minutes=null")
    values = {row["step"]: row[f"eval/rm/{metric}"] for row in run.evaluations}
    chosen = best(values.values())
    assert len(set(values.values())) == 4
    assert run.status["best"] == {"step": run.status["best"]["step"], "metric": f"eval/rm/{metric}", "value": chosen}
    assert run.metrics["own"][metric] == pytest.approx(chosen, abs=1e-6)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    model = run.load(device="cpu")
    rewards = np.array([model.score(row["prompt"], [row["chosen"], row["rejected"]]) for row in rows], dtype=float)
    found = {"worst_margin": (rewards[:, 0] - rewards[:, 1]).min(), "spread": rewards.std(ddof=1)}[metric]
    assert found == pytest.approx(chosen, rel=1e-4, abs=1e-4), "the exported weights are those of the best evaluation"


def test_traits_say_what_an_objective_reads(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    scored = [row | {"score_chosen": 1.0, "score_rejected": float(n % 2)} for n, row in enumerate(rows)]
    (folder / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    mine, theirs = (
        fit(folder, name.replace(":", "-"), f"loss.name={name}", "data.train.path=scored.jsonl")
        for name in ("own_functions:squared", "regression")
    )
    ours, regression = weights(mine), weights(theirs)
    for name in regression:
        torch.testing.assert_close(ours[name], regression[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("loss.name=own_functions:hing", "loss.name=own_functions:hing: the module own_functions has no function hing"),
        ("loss.name=lost:hinge", "the module lost cannot be imported: ModuleNotFoundError: No module named 'lost'"),
        ("loss.name=broken:f", "broken.py:1: ZeroDivisionError"),
        ("run.metrics=[own_functions:accuracy]", "run.metrics: there is a metric accuracy already"),
        ("run.metrics=[own_functions:lost]", "has no function lost"),
        (
            BEST.format("undirected"),
            "run.best_metric: eval/rm/undirected does not state whether more or less of it is better: set "
            'undirected.better = "more" or "less"',
        ),
        (BEST.format("misdirected"), 'run.metrics: misdirected.better must be "more" or "less", not \'higher\''),
        (BEST.format("spread").replace("eval/rm/spread", "eval/rm/spred"), "did you mean eval/rm/spread?"),
        (BEST.format("spread").replace("eval/rm", "eval/other"), "have no eval/other/spread"),
        ("data.train.format=own_functions:refuses", "pairs.jsonl:1: data.train.format failed: KeyError: 'q'"),
        ("data.train.format=builtins:len", "pairs.jsonl:1: data.train.format must return a row (a dict), not int"),
        ("data.train.format=own functions", "expected module:function | null, got `own functions`"),
        ("loss.name=hinges", "did you mean hinge?"),
    ],
)
def test_mistakes_are_one_message(folder: Path, override: str, words: str) -> None:
    (folder / "broken.py").write_text("1 / 0\n")
    with pytest.raises(rmcore.UserError) as caught:
        fit(folder, "wrong", *override.split(";"))
    assert words in str(caught.value)


def test_another_version_of_a_reader_is_not_read_from_the_cache(folder: Path) -> None:
    source = SourceConfig(path="other.jsonl", format="own_functions:renamed")

    def loaded() -> Source:
        return load_sources([source], seed=1, limit=None, cache_dir=folder / "cache")[0]

    first, same = loaded(), loaded()
    swapped = MODULE.replace('"chosen": row["good"]', '"chosen": row["bad"] + row["good"]')
    (folder / "own_functions.py").write_text(swapped)
    del sys.modules["own_functions"]
    second = loaded()
    assert first.fingerprint == same.fingerprint != second.fingerprint
    (row, place), (other, _) = next(iter(first)), next(iter(second))
    assert place == "other.jsonl:1" and other["chosen"] == row["rejected"] + row["chosen"]
    plain = load_sources([SourceConfig(path="pairs.jsonl")], seed=1, limit=None, cache_dir=folder / "cache")[0]
    assert next(iter(plain))[0] == row
