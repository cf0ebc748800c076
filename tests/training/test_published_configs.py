"""Each config in configs/ trains a tiny random model of its architecture family on rows of its data set's schema."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTNeoXConfig,
    MistralConfig,
)

from rmcore.data.synthetic import byte_tokenizer
from tests.harness.paths import ROOT
from tests.harness.ranks import run_ranks, train_rank
from tests.harness.schema_rows import write_schema_rows

RUNS = {
    "sentiment_14m": ("sentiment-trl-style", "gpt_neox", ("train", "test"), 1),
    "sentiment_1b": ("sentiment-trl-style", "gpt_neox", ("train", "test"), 1),
    "descriptiveness_1b": ("descriptiveness-trl-style", "gpt_neox", ("train", "test"), 1),
    "tldr": ("tldr-preference-trl-style", "gpt_neox", ("train", "validation"), 2),
    "hh": ("hh-rlhf-trl-style", "gpt_neox", ("train", "validation"), 2),
    "zephyr_7b": ("ultrafeedback_binarized", "mistral", ("train_prefs", "test_prefs"), 2),
}


def tiny_base(family: str, directory: Path) -> Path:
    """A causal language model with its tokenizer, without a score head, as base models are on the hub."""
    tokenizer = byte_tokenizer()
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 4096,
        "pad_token_id": None,
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = (
        GPTNeoXConfig(**common)
        if family == "gpt_neox"
        else MistralConfig(**common, num_key_value_heads=2, sliding_window=None)
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", RUNS)
def test_the_config_trains_evaluates_and_exports(tmp_path, name):
    schema, family, splits, ranks = RUNS[name]
    data = tmp_path / "data"
    data.mkdir()
    for seed, split in enumerate(splits):
        write_schema_rows(schema, data / f"{split}.jsonl", 24, seed)
    run_dir = tmp_path / "run"
    overrides = [
        str(ROOT / "configs" / f"{name}.yaml"),
        f"model.name={tiny_base(family, tmp_path / 'base')}",
        f"data.train.path={data}",
        "data.max_tokens=4096",
        "data.max_prompt_tokens=4096",
        "batch.pairs=8",
        "run.max_steps=3",
        "log.every=1",
        f"run.dir={run_dir}",
    ]
    run_ranks(train_rank, ranks, tmp_path / "ranks", overrides)

    status = json.loads((run_dir / "run_status.json").read_text())
    assert status["status"] == "completed" and status["step"] == 3 and status["eval"]["count"] > 0
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if "train/rm/loss" in s] == [1, 2, 3]
    assert any("eval/rm/accuracy" in s for s in steps)
    model = AutoModelForSequenceClassification.from_pretrained(run_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    assert model.config.num_labels == 1 and model.config.pad_token_id != tokenizer.eos_token_id
    turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It."}]
    ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
    assert model(input_ids=ids).logits.shape == (1, 1)
