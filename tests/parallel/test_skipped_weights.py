"""Weights that no reward depends on, such as DeepSeek V3.2's indexers of keys, stop no strategy."""

from pathlib import Path

import pytest
import torch

from rmcore.bench.models import tiny_config
from rmcore.data.batches.batch import build_batch
from rmcore.data.synthetic import byte_tokenizer
from rmcore.model.classifier import decoder_class, new_classifier, text_model
from rmcore.model.meta_model import set_padding
from rmcore.model.reward_model import PADDED, SHARED, RewardModel
from rmcore.model.selftest import skips_weights
from tests.harness.oracle import odd_items, reward_model, tiny_model
from tests.harness.ranks import run_ranks
from tests.harness.walks import STEPS_OF_SEVEN, assert_close, walk

CPU = torch.device("cpu")


def test_the_weights_without_a_gradient_are_found() -> None:
    config = tiny_config("deepseek_v32")
    config.num_labels = 1
    hf_model = new_classifier(config)
    model = RewardModel(text_model(hf_model), hf_model.score, pad_token_id=0, path=PADDED)
    assert skips_weights(model, odd_items(), CPU)
    model(build_batch(odd_items(), range(4), share=False)).loss_sum.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without and all(".indexer." in name for name in without)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in without)
    assert not skips_weights(model, odd_items(), CPU)
    assert not skips_weights(reward_model(tiny_model("mixtral"), SHARED), odd_items(), CPU)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_take_the_steps_of_one(tmp_path: Path) -> None:
    """They differ from one rank only by the order of fp32 sums (1e-5, see tests/training/test_world_sizes.py)."""
    tokenizer, config = byte_tokenizer(), tiny_config("deepseek_v32")
    set_padding(config, 0)
    torch.manual_seed(0)
    decoder_class(type(config))._from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    base = [*STEPS_OF_SEVEN, "data.limit=18", f"model.name={tmp_path / 'model'}", "model.init=pretrained"]
    (one,) = run_ranks(walk, 1, tmp_path / "one", [base])
    [(path, expected)] = one.value
    assert path == "attention shared"
    strategies = ("ddp", "zero1", "zero2", "zero3")
    variants = [[*base, f"parallel.strategy={name}"] for name in strategies]
    for _, ours in run_ranks(walk, 2, tmp_path / "two", variants)[0].value:
        assert_close(ours, expected, 1e-5)
