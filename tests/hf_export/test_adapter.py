"""export.adapter: peft and rmcore load the adapter with the rewards of the merged model, and a training continues it."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import rmcore
from rmcore.config import UserError, load_config
from rmcore.data.synthetic import byte_tokenizer
from rmcore.hf_export.from_checkpoint import export
from rmcore.model.adapter import check_adapter
from rmcore.train import fit
from tests.harness.configs import NEEDED, mistakes

TEXTS = ["Anna has a red lamp. What colour is it? It is red.", "Ben was.", "Who? Carl has it, and so has Dora."]


def save_base(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A base model on disk: a causal model without a score head."""
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(seed)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = LlamaConfig(**{**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 512, **ids, **changes})
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(3.0 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def settings(base: Path | str, directory: Path, *more: str) -> list[str]:
    return [
        *(f"model.name={base}", "data.train.path=synthetic", "data.template=none", "data.max_tokens=200"),
        *("data.limit=32", "optim.lr=1e-2", "optim.schedule=constant", "parallel.precision=fp32", "run.evals=0"),
        *("log.every=1", "log.tensorboard=false", "log.report=none", "batch.pairs=8", "run.save_every=2"),
        *("model.lora.rank=4", "model.lora.alpha=12", "export.adapter=true", f"run.dir={directory}", *more),
    ]


def train(base: Path | str, directory: Path, *more: str) -> Path:
    fit({}, settings(base, directory, *more))
    return directory / "model"


def by_peft(directory: Path) -> list[float]:
    """Rewards as peft alone computes them."""
    model: Any = peft.AutoPeftModelForSequenceClassification.from_pretrained(directory, num_labels=1).eval()
    return forward(model)


def forward(model: Any) -> list[float]:
    tokenizer = byte_tokenizer()
    ids = [tokenizer(text + tokenizer.eos_token, return_tensors="pt").input_ids for text in TEXTS]
    with torch.no_grad():
        return [float(model(input_ids=one).logits[0, 0]) for one in ids]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("adapter")
    base = save_base(folder / "base")
    train(base, folder / "run", "model.lora.dora=true", "model.lora.rslora=true")
    return base, folder / "run"


def test_peft_and_rmcore_compute_the_rewards_of_the_merged_model(trained: Any, tmp_path: Path) -> None:
    base, run = trained
    assert not list((run / "model").glob("model*.safetensors"))
    said = export(str(run), str(tmp_path / "merged"), ["export.adapter=false"])[-1]
    assert "rewards reloaded by transformers differ by" in said
    expected = forward(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval())
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    on_plain: Any = peft.PeftModel.from_pretrained(plain, run / "model").eval()
    # fp32: some roundings of 1e-7 of numbers near 1, and two layers
    for found in (by_peft(run / "model"), forward(on_plain), rmcore.load(run / "model").score_texts(TEXTS)):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert len({round(value, 3) for value in expected}) == len(TEXTS)
    stored = json.loads((run / "model" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(base) and stored["modules_to_save"] == ["score"]
    assert stored["target_modules"] and all("." not in name for name in stored["target_modules"])
