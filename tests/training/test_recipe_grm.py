"""configs/recipes/grm.yaml trains a tiny Llama with tied embeddings on rows of its data set's schema."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig

from rmcore.config import load_config
from rmcore.data.synthetic import byte_tokenizer, synthetic_rows
from tests.harness.paths import ROOT
from tests.harness.ranks import run_ranks, train_rank

RECIPE = ROOT / "configs" / "recipes" / "grm.yaml"


def test_the_weight_of_the_regulariser() -> None:
    """The sum of 0.99 and 0.01 times the two losses, divided by 0.99."""
    assert load_config(str(RECIPE), []).loss.sft == pytest.approx(0.01 / 0.99, rel=1e-3)


@pytest.mark.distributed
def test_the_recipe_trains_evaluates_and_exports(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    ids = {"pad_token_id": None, "bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = LlamaConfig(
        **sizes, **ids, vocab_size=len(tokenizer), max_position_embeddings=4096, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with open(tmp_path / "train.jsonl", "w", encoding="utf-8") as file:
        for row in synthetic_rows(24, 0, "train"):
            turns = {
                name: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name]}]
                for name in ("chosen", "rejected")
            }
            file.write(json.dumps({**turns, "chosen_score": 8.0, "rejected_score": 4.5}) + "\n")
    run_ranks(
        train_rank,
        2,
        tmp_path / "ranks",
        [
            *(str(RECIPE), f"model.name={tmp_path / 'base'}", f"data.train.path={tmp_path / 'train.jsonl'}"),
            *("data.eval_fraction=0.2", "batch.pairs=8", "run.evals=1", f"run.dir={tmp_path / 'run'}"),
            *("log.every=1", "log.tensorboard=false", "log.report=none", "parallel.precision=fp32"),
            "export.lm_head=true",
        ],
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/rm/sft_loss"] for line in lines if "train/rm/sft_loss" in line]
    assert len(losses) >= 2 and all(4.0 < loss < 6.5 for loss in losses), "about log 264 = 5.58"
    with safe_open(tmp_path / "run" / "model" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "score.weight" in names and not any("lm_head" in name for name in names), "the embedding is the head"
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) == {"score.weight"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
