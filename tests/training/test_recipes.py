"""Each recipe in configs/recipes/ trains a tiny random model of its family on rows of exactly its data's schema."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from rmcore.config import load_config
from rmcore.data.synthetic import byte_tokenizer
from tests.harness.paths import ROOT
from tests.harness.ranks import run_ranks, train_rank

pytestmark = pytest.mark.distributed
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
WORDS = ("river", "stone", "garden", "letter", "window", "morning", "train", "market")


def text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 9)))


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"content": c, "role": ("user", "assistant")[n % 2]} for n, c in enumerate(contents)]


def tulu(rng: random.Random, number: int) -> dict[str, Any]:
    prompt = f"{text(rng)} {number}"
    chosen, rejected = turns(prompt, text(rng)), turns(prompt, text(rng))
    return {"id": str(number), "source": "tulu", "prompt": prompt, "chosen": chosen, "rejected": rejected}


def skywork(rng: random.Random, number: int) -> dict[str, Any]:
    prompt = f"{text(rng)} {number}"
    return {"chosen": turns(prompt, text(rng)), "rejected": turns(prompt, text(rng)), "source": "magpie_pro"}


def helpsteer2(rng: random.Random, number: int) -> dict[str, Any]:
    levels = {name: rng.randint(0, 4) for name in ATTRIBUTES}
    return {"prompt": f"{WORDS[number // 2 % 8]} {number // 2}", "response": text(rng), **levels}


def helpsteer2_preference(rng: random.Random, number: int) -> dict[str, Any]:
    return {
        "split": "train",
        "prompt": f"{text(rng)} {number}",
        "response_1": text(rng),
        "response_2": text(rng),
        "preference_strength": rng.choice([-3, -2, -1, 1, 2, 3]),
        "preference_statement": "Response 1 is better.",
        "preference_elaboration": "It is shorter.",
        "three_most_similar_preferences": [{"statement": "a", "elaboration": "b", "strength": 1}],
        "all_preferences_unprocessed": [{"statement": "a", "elaboration": "b", "strength": 1}],
    }


def helpsteer3(rng: random.Random, number: int) -> dict[str, Any]:
    return {
        "domain": "general",
        "language": "english",
        "context": turns(f"{text(rng)} {number}"),
        "response1": text(rng),
        "response2": text(rng),
        "overall_preference": rng.randint(-3, 3),
        "individual_preference": [{"score": 1, "reasoning": "r", "feedback1": "f", "feedback2": "g"}],
    }


def argilla(rng: random.Random, number: int) -> dict[str, Any]:
    prompt = f"{text(rng)} {number}"
    rated = {"chosen-rating": 4.5, "chosen-model": "a", "rejected-rating": 2.0, "rejected-model": "b"}
    sides = {"chosen": turns(prompt, text(rng)), "rejected": turns(prompt, text(rng))}
    return {"source": "evol_instruct", "prompt": prompt, **sides, **rated}


def options(rng: random.Random, number: int) -> dict[str, Any]:
    answers = [f"Option {k} {text(rng)}." for k in range(20)]
    return {"prompt": f"{text(rng)} {number}", "answers": answers, "probabilities": [0.62] + [0.02] * 19}


Schema = Callable[[random.Random, int], dict[str, Any]]
RECIPES: dict[str, tuple[str, tuple[Schema, ...], Schema | None]] = {
    "tulu3_8b_rm": ("llama", (tulu,), None),
    "rewardbench2_8b_rm": ("llama", (tulu, skywork), tulu),
    "skywork_v2_0.6b": ("qwen3", (skywork,), None),
    "skywork_v2_8b": ("llama", (skywork,), None),
    "helpsteer2_attributes": ("llama", (helpsteer2,), helpsteer2),
    "helpsteer2_scaled_bt": ("llama", (helpsteer2_preference,), None),
    "smorm": ("llama", (skywork, helpsteer2), None),
    "internlm2_focal": ("qwen2", (argilla,), None),
    "qwen3_nemotron_32b": ("qwen3", (helpsteer3,), helpsteer3),
    "decision": ("qwen3", (options,), None),
}
QUICK = ("helpsteer2_attributes", "decision")
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def tiny_base(family: str, directory: Path, name: str) -> Path:
    """A language model without a score head; for a recipe that starts from the attribute model, one with its head."""
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = CONFIGS[family](
        vocab_size=len(tokenizer), intermediate_size=64, max_position_embeddings=8192, pad_token_id=None,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    kind: Any = AutoModelForCausalLM
    if name == "helpsteer2_scaled_bt":
        kind, config.id2label = AutoModelForSequenceClassification, dict(enumerate(ATTRIBUTES))
        config.rmcore = {"reward": dict(zip(ATTRIBUTES, (0.65, 0.8, 0.45, 0.55, -0.4), strict=True))}
    kind.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_every_recipe_is_tried() -> None:
    """GRM has a test of its own, test_recipe_grm.py."""
    assert sorted([*RECIPES, "grm"]) == sorted(path.stem for path in (ROOT / "configs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RECIPES])
def test_a_recipe_trains_evaluates_and_exports(tmp_path: Path, name: str) -> None:
    family, schemas, held_out = RECIPES[name]

    def write(schema: Schema, file: str, seed: int) -> Path:
        rng = random.Random(seed)
        lines = [json.dumps(schema(rng, number)) + "\n" for number in range(24)]
        (tmp_path / file).write_text("".join(lines))
        return tmp_path / file

    sources = [write(schema, f"train{number}.jsonl", number) for number, schema in enumerate(schemas)]
    overrides = [f"data.train.{number}.path={path}" for number, path in enumerate(sources)]
    overrides += [f"data.train.{number}.name=null" for number in range(len(sources))]
    config = ROOT / "configs" / "recipes" / f"{name}.yaml"
    if held_out is not None:
        columns = load_config(str(config), []).data.train[0].columns  # of data.eval too, until it has a path of its own
        overrides += [
            f"data.eval.path={write(held_out, 'eval.jsonl', 9)}",
            "data.eval.split=train",
            "data.eval.name=null",
            f"data.eval.columns={json.dumps(columns)}",
        ]
    else:
        overrides += ["data.eval_fraction=0.2"]
    overrides += [f"model.name={tiny_base(family, tmp_path / 'base', name)}", "data.template=simple_chat"]
    overrides += ["batch.pairs=8", "run.max_steps=3", "run.evals=1", "log.every=1", "log.tensorboard=false"]
    overrides += [f"data.cache={tmp_path / 'cache'}", f"run.dir={tmp_path / 'run'}", "log.report=none"]
    run_ranks(train_rank, 1, tmp_path / "ranks", [str(config), *overrides])

    status = json.loads((tmp_path / "run" / "run_status.json").read_text())
    assert status["status"] == "completed" and status["step"] == 3 and status["eval"]["count"] > 0
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in losses if "train/rm/loss" in line]) == 3
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    several = {"helpsteer2_attributes": 5, "helpsteer2_scaled_bt": 5, "smorm": 6}
    assert model.config.num_labels == several.get(name, 1)
