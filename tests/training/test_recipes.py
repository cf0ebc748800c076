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
from rmcore.plan import main as plan
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


def preference_700k(rng: random.Random, number: int) -> dict[str, Any]:
    prompt = f"{text(rng)} {number}"
    sides = {"chosen": turns(prompt, text(rng)), "rejected": turns(prompt, text(rng))}
    return {**sides, "chosen_score": 8.0, "rejected_score": 4.5}


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
    "grm": ("llama", (preference_700k,), None),
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
    assert sorted(RECIPES) == sorted(path.stem for path in (ROOT / "configs" / "recipes").glob("*.yaml"))


def trained(tmp_path: Path, name: str, steps: int, *more: str) -> list[float]:
    """The losses of a run with the settings of the recipe, which is evaluated and exported."""
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
    overrides += ["batch.pairs=8", f"run.max_steps={steps}", "run.evals=1", "log.every=1", "log.tensorboard=false"]
    overrides += [f"data.cache={tmp_path / 'cache'}", f"run.dir={tmp_path / 'run'}", "log.report=none"]
    run_ranks(train_rank, 1, tmp_path / "ranks", [str(config), *overrides, *more], timeout=900)

    status = json.loads((tmp_path / "run" / "run_status.json").read_text())
    assert status["status"] == "completed" and status["step"] == steps and status["eval"]["count"] > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    several = {"helpsteer2_attributes": 5, "helpsteer2_scaled_bt": 5, "smorm": 6}
    assert model.config.num_labels == several.get(name, 1)
    return [line["train/rm/loss"] for line in lines if "train/rm/loss" in line]


@pytest.mark.parametrize("name", QUICK)
def test_a_recipe_trains_evaluates_and_exports(tmp_path: Path, name: str) -> None:
    assert len(trained(tmp_path, name, 3)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_loss_falls_within_twenty_steps(tmp_path: Path, name: str) -> None:
    """A tiny model learns its few rows by heart, with a learning rate of its size."""
    more = ["run.epochs=20", "optim.lr=5e-3", "optim.warmup_steps=0", "optim.warmup_ratio=0", "parallel.precision=fp32"]
    losses = trained(tmp_path, name, 20, *more)
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
    print(f"{name}: the mean loss of three steps fell from {first:.3f} to {last:.3f}")
    assert len(losses) == 20 and last < 0.95 * first


@pytest.mark.parametrize("name", [n if n in ("grm",) else pytest.param(n, marks=pytest.mark.slow) for n in RECIPES])
def test_it_can_be_planned_without_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shapes are in rmcore's table; a recipe that starts from the model of another one has one message."""

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no hub")

    monkeypatch.setattr("rmcore.model.backbone.AutoConfig.from_pretrained", unreachable)
    given = [str(ROOT / "configs" / "recipes" / f"{name}.yaml"), "--gpus", "8"]
    code = plan([*given, "--pairs", "100000", "--tokens-a-pair", "900"])
    shown = "".join(capsys.readouterr())
    if name == "helpsteer2_scaled_bt":
        assert code == 2 and "model.name=runs/helpsteer2_attributes/model: there is no such directory" in shown
    else:
        assert code == 0 and "GPU hours" in shown and "shape from rmcore's table" in shown
