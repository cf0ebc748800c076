"""Checks that all commands use a trained model with the same token budget, precision and path."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rmcore.config import UserError, load_config
from rmcore.data.tokens.comparisons import EncodedRow
from rmcore.data.tokens.limits import LengthLimits, in_memory
from rmcore.data.tokens.tokenizer import load_tokenizer
from rmcore.evaluation.trained import TOKEN_BUDGET, TrainedModel, evaluation_config
from rmcore.parallel.world import World
from rmcore.scoring.scorer import Scorer
from tests.harness.exporting import export

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("trained") / "model"
    export(directory)
    return str(directory)


def loaded(model: str, *overrides: str) -> TrainedModel:
    config = evaluation_config(model, "synthetic", list(overrides))
    return TrainedModel.load(config, load_tokenizer(config), CPU)


def test_one_token_budget(model: str) -> None:
    """`rmcore evaluate` and `rmcore score` have the same; batch.tokens sets it."""
    assert TOKEN_BUDGET == {"cpu": 4096, "cuda": 32768}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert loaded(model).token_budget == 4096 and Scorer(model).token_budget == TOKEN_BUDGET[device]
    assert loaded(model, "batch.tokens=100").token_budget == Scorer(model, ["batch.tokens=100"]).token_budget == 100


def test_the_precision_of_the_config(model: str) -> None:
    products = {}
    for precision in ("fp32", "bf16"):
        trained = loaded(model, f"parallel.precision={precision}")
        with trained.autocast():
            products[precision] = torch.ones(2, 2) @ torch.ones(2, 2)
        assert products[precision].dtype == trained.dtype
    assert products["bf16"].dtype == torch.bfloat16 and products["fp32"].dtype == torch.float32


def test_the_path_is_chosen_and_used(model: str) -> None:
    """The shared and the padded path give the same rewards."""
    generator = np.random.Generator(np.random.PCG64(2))
    texts = [generator.integers(20, 61, size=size, dtype=np.int32) for size in (9, 12, 7, 15)]
    rows = [EncodedRow(texts[0][:0], texts[i : i + 2], [(0, 1)], [0.0], [1.0]) for i in (0, 2)]
    data, world = in_memory(rows, LengthLimits(90)), World(0, 1, 0, 1, CPU)
    shared, padded = (
        loaded(model, "parallel.precision=fp32"),
        loaded(model, "model.attention=padded", "parallel.precision=fp32"),
    )
    assert not shared.share, "until a path is chosen"
    assert shared.choose_path(data).startswith("attention shared") and shared.share
    assert padded.choose_path(data).startswith("attention padded") and not padded.share
    rewards = [trained.evaluate(data, world).rewards_A for trained in (shared, padded)]
    np.testing.assert_allclose(*rewards, atol=1e-5)
    assert not shared.model.training


def test_a_model_of_a_training_that_is_refused_now_is_still_used(tmp_path: Path) -> None:
    """Earlier versions trained with a reward of which no loss trains a part; model.reward can choose another output."""
    refused = "model: {name: base, outputs: [r, a]}\ndata: {train: {path: x}, template: zephyr}\nloss: {output: a}\n"
    (tmp_path / "rmcore_config.yaml").write_text(refused)
    with pytest.raises(UserError, match=r"model\.reward has weight on r"):
        load_config(str(tmp_path / "rmcore_config.yaml"), [])
    config = evaluation_config(str(tmp_path), "pairs.jsonl", ["model.reward=a"])
    assert config.data.template == "zephyr" and config.model.reward == "a"
