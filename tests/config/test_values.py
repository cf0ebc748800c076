"""`config_from_values`: a nested dict is checked as a file is, and overrides on top keep their places in messages."""

from typing import Any

import pytest

from rmcore.config import UserError, config_from_values, load_config
from rmcore.evaluation.trained import evaluation_config
from tests.harness.configs import NEEDED

VALUES: dict[str, Any] = {"model": {"name": "m"}, "data": {"train": {"path": "p"}}}


def test_values_give_the_config_that_overrides_give() -> None:
    assert config_from_values(VALUES) == load_config(None, NEEDED)
    nested = {**VALUES, "optim": {"betas": (0.8, 0.9), "lr": 1e-5}, "run": {"max_steps": None}}
    assert config_from_values(nested) == load_config(None, [*NEEDED, "optim.betas=[0.8, 0.9]", "optim.lr=1e-5"])


def test_texts_are_never_read_as_yaml() -> None:
    names = ["1e5", "no", "null", "[a]", "'x'", "*a", "a: b"]
    for name in names:
        config = config_from_values({"model": {"name": name}, "data": {"train": {"path": name}}})
        assert (config.model.name, config.data.train[0].path) == (name, name)
        assert evaluation_config(name, name, []).data.train[0].path == name


def test_a_dumped_config_comes_back() -> None:
    config = load_config(None, [*NEEDED, "data.eval_fraction=0.25", "data.train.columns={chosen: better}"])
    values = config.model_dump(mode="json")
    assert config_from_values(values) == config
    moved = config_from_values(values, ["data.train.path=q", "data.eval.path=r"])  # replaces data.eval_fraction
    assert (moved.data.train[0].path, moved.data.eval[0].path, moved.data.eval_fraction) == ("q", "r", 0.0)
    assert values == config.model_dump(mode="json"), "the values of the caller are unchanged"


def test_mistakes_have_their_places() -> None:
    wrong = {**VALUES, "optim": {"lr": "1e-5", "lrr": 1}, "hub": {"push": True}}
    with pytest.raises(UserError) as raised:
        config_from_values(wrong, ["run.seed=-1"], where="the checkpoint")
    assert str(raised.value).splitlines()[1:] == [
        "  the checkpoint: optim.lr: expected number > 0, got `1e-5` (remove the quotes)",
        "  the checkpoint: optim.lrr: unknown key; did you mean optim.lr?",
        "  the checkpoint: hub.push needs hub.repo, the user/name to push to",
        "  override `run.seed=-1`: run.seed: expected whole number >= 0, < 2147483648, got `-1`",
    ]
    with pytest.raises(UserError, match=r"the settings: data\.train\.path is missing"):
        config_from_values({"model": {"name": "m"}})
    with pytest.raises(
        UserError, match=r"override `data\.train\.splt=x`: data\.train\.splt: unknown key; did you mean"
    ):
        evaluation_config("m", "rows.jsonl", ["data.train.splt=x"])
