"""The keys of several outputs and several objectives: what fits together, and what is refused in one sentence."""

import pytest
import yaml

from rmcore.config import Config, UserError, config_from_values, load_config
from rmcore.config.loss import LossConfig, distinct_names

ATTRIBUTES = {"name": "regression", "output": ["a", "b"]}


def config(model: dict | None = None, **sections: object) -> Config:
    data = {"train": [{"path": "x"}, {"path": "y", "loss": ATTRIBUTES}], **sections.pop("data", {})}  # type: ignore[dict-item]
    return config_from_values(
        {"model": {"name": "m", "outputs": ["r", "a", "b"], **(model or {})}, "data": data, **sections}
    )


def test_sources_with_equal_settings_share_an_objective() -> None:
    many = config(data={"train": [{"path": "x"}, {"path": "y", "loss": ATTRIBUTES}, {"path": "z", "loss": ATTRIBUTES}]})
    assert many.losses == (LossConfig(), LossConfig(name="regression", output=["a", "b"]))
    assert [many.loss_number(source.loss) for source in many.data.train] == [0, 1, 1]
    assert many.attributes == ("a", "b") and many.unit == "pairs and scored answers"
    alone = config({"reward": "b"}, data={"train": [{"path": "y", "loss": ATTRIBUTES}], "eval": [{"path": "z"}]})
    assert alone.losses == (LossConfig(name="regression", output=["a", "b"]),) and alone.loss_number(None) == 0
    apart = config(data={"train": [{"path": "x", "loss": {"name": "hinge"}}, {"path": "y", "loss": ATTRIBUTES}]})
    assert apart.loss_number(None) == -1  # an evaluation source without a loss, where no train source has the section's


def test_names_of_objectives_are_distinct() -> None:
    losses = [LossConfig(), LossConfig(name="hinge"), LossConfig(output="a"), LossConfig(output="b")]
    assert distinct_names(losses) == ("bradley_terry", "hinge", "bradley_terry_2", "bradley_terry_3")


def test_a_dump_reads_back_and_leaves_out_what_a_source_does_not_set(tmp_path) -> None:
    dumped = config().dump_yaml()
    (tmp_path / "c.yaml").write_text(dumped)
    assert load_config(str(tmp_path / "c.yaml"), []) == config()
    plain, own = yaml.safe_load(dumped)["data"]["train"]
    assert "loss" not in plain and own["loss"] == ATTRIBUTES


REFUSED = [
    ({"model": {"reward": "c"}}, "model.reward has c, which is not one of model.outputs: r, a, b"),
    ({"model": {"reward": {"a": 0.0}}}, "model.reward must have a weight that is not 0"),
    ({"model": {"outputs": ["a", "a"]}}, "model.outputs must have at least one name, and each only once"),
    ({"model": {"outputs": ["r", "a"]}}, "data.train.1.loss.output has b, which is not one of model.outputs: r, a"),
    ({"loss": {"output": "z"}}, "loss.output has z, which is not one of model.outputs: r, a, b"),
    ({"loss": {"output": ["r"]}}, "loss.output must be one output: loss.name=bradley_terry does not train several"),
    (
        {"loss": {"name": "quantile_regression", "output": "r"}},
        "loss.output must list the outputs that loss.name=quantile_regression trains as quantiles",
    ),
    ({"loss": {"gamma": 1.0}}, "loss.gamma has no effect on loss.name=bradley_terry"),
    (
        {"data": {"eval": [{"path": "z", "loss": {"name": "hinge"}}]}},
        "data.eval.0.loss must be the loss of a source of data.train, or be left out",
    ),
    ({"data": {"group_by_prompt": True}}, "data.group_by_prompt merges rows of pairs, from which loss.name=regression"),
]


UNTRAINED = [  # keys of model, losses; outputs with weight in the reward that no loss trains
    (
        {},
        [{"name": "regression", "output": ["a"]}],
        "model.reward has weight on r (by default the first output), which no loss trains",
    ),
    ({"reward": "b"}, [{"output": "a"}, {"output": "r"}], "model.reward has weight on b, which no loss trains"),
    (
        {"reward": {"r": 0.5, "a": 0.0, "b": 1.0}},
        [{"name": "quantile_regression", "output": ["a", "r"]}],
        "model.reward has weight on b, which no loss trains",
    ),
    ({"reward": {"r": 0.5, "a": 0.0, "b": 1.0}}, [{"name": "regression", "output": ["r", "b"]}], ""),
    ({"reward": "a"}, [{"output": "r"}, {}], ""),  # a loss without output trains the reward
    ({"head": "stored", "reward": "b"}, [{"output": "a"}], ""),  # an earlier training trained it
]


@pytest.mark.parametrize("model, losses, message", UNTRAINED)
def test_a_reward_that_no_loss_trains_is_refused(model: dict, losses: list[dict], message: str) -> None:
    sources = [{"path": f"{number}", "loss": loss} for number, loss in enumerate(losses)]
    values = {"model": {"name": "m", "outputs": ["r", "a", "b"], **model}, "data": {"train": sources}}
    if not message:
        config_from_values(values)
        return
    with pytest.raises(UserError) as error:
        config_from_values(values)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("1 mistake in the configuration") and message in lines[1]


def test_outputs_that_no_loss_trains() -> None:
    assert config().untrained == () and config(data={"train": [{"path": "x"}]}).untrained == ("a", "b")
    alone = {"name": "m", "outputs": ["a", "b"], "reward": "b"}
    loss = {"name": "regression", "output": ["b"]}
    values = {"model": alone, "data": {"train": [{"path": "x"}]}, "loss": loss}
    assert config_from_values(values).untrained == ("a",)
    assert config_from_values({**values, "model": {**alone, "head": "stored"}}).untrained == ()
    assert config_from_values({"model": {"name": "m"}, "data": {"train": [{"path": "x"}]}}).untrained == ()


@pytest.mark.parametrize("values, message", REFUSED, ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_what_does_not_fit_is_one_sentence(values: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        config(**values)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("1 mistake in the configuration") and message in lines[1]
