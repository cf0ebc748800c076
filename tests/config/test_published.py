"""The files in configs/: each of them loads and has the values of the reference run."""

import shlex

import pytest

from rmcore.config import SourceConfig, load_config
from tests.harness.paths import ROOT

PYTHIA, TRL, SPACE = "EleutherAI/pythia", "trl-internal-testing", "simple_concat_with_space"
FIELDS = [
    "model",
    "data",
    "train_split",
    "eval_split",
    "template",
    "max_tokens",
    "max_prompt_tokens",
    "pairs",
    "strategy",
    "precision",
]
# `pairs` is pairs per device x accumulation steps x GPUs
REFERENCE = {
    "sentiment_14m": (
        *(f"{PYTHIA}-14m", f"{TRL}/sentiment-trl-style", "train", "test"),
        *(SPACE, 512, 512, 1 * 32, "ddp", "fp32"),  # the reference run's 1024 exceed the model's positions
    ),
    "sentiment_1b": (
        *(f"{PYTHIA}-1b-deduped", f"{TRL}/sentiment-trl-style", "train", "test"),
        *(SPACE, 1024, 1024, 32 * 1, "ddp", "fp32"),
    ),
    "descriptiveness_1b": (
        *(f"{PYTHIA}-1b-deduped", f"{TRL}/descriptiveness-trl-style", "train", "test"),
        *(SPACE, 1024, 1024, 32 * 1, "ddp", "fp32"),
    ),
    "tldr": (
        *(f"{PYTHIA}-2.8b-deduped", f"{TRL}/tldr-preference-trl-style", "train", "validation"),
        *(SPACE, 1024, 512, 1 * 32 * 8, "zero2", "bf16"),
    ),
    "hh": (
        *(f"{PYTHIA}-2.8b-deduped", f"{TRL}/hh-rlhf-trl-style", "train", "validation"),
        *("simple_chat", 2048, 1024, 4 * 8 * 8, "zero2", "bf16"),
    ),
    "zephyr_7b": (
        *("HuggingFaceH4/mistral-7b-sft-beta", "HuggingFaceH4/ultrafeedback_binarized", "train_prefs", "test_prefs"),
        *("zephyr", 1024, 1024, 1 * 32 * 8, "zero2", "bf16"),
    ),
}
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_of_this_repository_loads(name: str) -> None:
    config = load_config(str(ROOT / "configs" / f"{name}.yaml"), [])
    assert config.run.dir == f"runs/{name}"
    assert config.data.eval
    assert not config.hub.push


@pytest.mark.parametrize("name", REFERENCE)
def test_a_config_has_the_values_of_the_reference_run(name: str) -> None:
    config = load_config(str(ROOT / "configs" / f"{name}.yaml"), [])
    (train,), (held,) = config.data.train, config.data.eval
    data, optim, parallel = config.data, config.optim, config.parallel
    found = (config.model.name, train.path, train.split, held.split, data.template, data.max_tokens)
    found += (data.max_prompt_tokens, config.batch.pairs, parallel.strategy, parallel.precision)
    assert dict(zip(FIELDS, found, strict=True)) == dict(zip(FIELDS, REFERENCE[name], strict=True))
    assert held == train.model_copy(update={"split": held.split})
    assert data.limit == (100 if name == "sentiment_14m" else None)  # level 0 is the sanity check
    assert (optim.lr, optim.schedule, optim.warmup_steps, optim.eps, optim.weight_decay) == (3e-6, "linear", 0, 1e-5, 0)
    assert (config.run.epochs, config.run.evals) == (1, 1)
    assert (config.model.init, config.model.head) == ("pretrained", "fresh")


def test_the_embedded_task_is_a_config() -> None:
    config = load_config(str(ROOT / "configs" / "quickstart.yaml"), [])
    assert (config.model.name, config.model.init) == ("synthetic", "random")
    assert config.data.train == (SourceConfig(path="synthetic", split="train"),)
    assert config.data.eval == (SourceConfig(path="synthetic", split="test"),)


def test_the_commands_that_the_project_promises() -> None:
    hh = str(ROOT / "configs" / "hh.yaml")
    real = load_config(
        hh,
        shlex.split(
            "model.name=../shared/data/stories260k data.train.path=../shared/data/pairs/hh_helpful_base.jsonl.gz "
            "data.eval_fraction=0.1 data.max_tokens=512 parallel.precision=fp32 run.dir=runs/hh-real"
        ),
    )
    assert (real.data.eval, real.data.eval_fraction, real.run.dir) == ((), 0.1, "runs/hh-real")
    assert real.data.max_prompt_tokens == 1024  # above max_tokens: no effect, but not an error
    oracle = load_config(
        hh,
        shlex.split(
            "model.name=../shared/oracle/model model.head=stored data.train.path=../shared/oracle/rows160.jsonl.gz "
            "data.shuffle=false data.template=none data.max_tokens=1024 data.max_prompt_tokens=1024 batch.pairs=8 "
            "optim.lr=1e-4 optim.schedule=constant optim.eps=1e-8 optim.weight_decay=0 optim.max_grad_norm=0 "
            "parallel.strategy=zero2 parallel.precision=fp32 run.epochs=1 run.evals=0 log.every=1 run.dir=runs/oracle"
        ),
    )
    assert (oracle.optim.lr, oracle.optim.eps, oracle.optim.max_grad_norm, oracle.batch.pairs) == (1e-4, 1e-8, 0.0, 8)
    assert (oracle.data.shuffle, oracle.data.template, oracle.run.evals) == (False, "none", 0)
