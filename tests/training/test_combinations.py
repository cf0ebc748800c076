"""Every pair of settings of formats, LoRA, averages and strategies: a run trains, or the config refuses it."""

import json
import math
from itertools import combinations
from pathlib import Path

import pytest

import rmcore
from rmcore.config import UserError, load_config
from tests.harness.small_run import arguments

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

LORA = "model.lora.rank=4"
SETTINGS: dict[str, list[str]] = {
    "bf16 weights": ["model.weights=bf16"],
    "bf16 states": ["optim.states=bf16"],
    "int8 states": ["optim.states=int8"],
    "ema": ["optim.ema=0.9", "run.weights=ema"],
    "lora": [LORA],
    "dora on bf16": [LORA, "model.lora.base=bf16", "model.lora.dora=true"],
    "rslora on int8": [LORA, "model.lora.base=int8", "model.lora.rslora=true"],
    "lora on nf4": [LORA, "model.lora.base=nf4"],
    "sft": ["loss.sft=0.1"],
    "decorrelation": ["loss.length_decorrelation=0.1"],
    "offload": ["parallel.recompute=offload"],
    "zero1": ["parallel.strategy=zero1"],
    "zero3": ["parallel.strategy=zero3"],
    "context": ["parallel.context=2"],
    "fp8": ["parallel.fp8=true"],
}


def pairs() -> list[tuple[str, str]]:
    """Pairs of settings that do not give one key two values."""

    def keys(name: str) -> dict[str, str]:
        return dict(argument.split("=") for argument in SETTINGS[name])

    return [
        (a, b)
        for a, b in combinations(SETTINGS, 2)
        if all(keys(b).get(key, value) == value for key, value in keys(a).items())
    ]


def outcome(folder: Path, *names: str) -> str:
    """`trains`, or why the configuration, or the start on one rank on a CPU, refuses these settings."""
    more = [argument for name in names for argument in SETTINGS[name]]
    given = arguments(folder, "parallel.precision=bf16", "run.max_steps=2", "log.report=none", *more, rows=16)
    try:
        config = load_config(None, [*given, f"run.dir={folder / 'run'}"])
    except UserError as refusal:
        return str(refusal)
    if config.parallel.context > 1 or config.parallel.fp8:
        return "not on one rank on a CPU"
    log = (rmcore.fit(config).dir / "metrics.jsonl").read_text(encoding="utf-8")
    losses = [line["train/rm/loss"] for line in map(json.loads, log.splitlines()) if "train/rm/loss" in line]
    assert losses and all(map(math.isfinite, losses))
    return "trains"


@pytest.mark.slow
@pytest.mark.parametrize("names", pairs(), ids=" and ".join)
def test_a_pair_of_settings_trains_or_is_refused_by_the_config(names: tuple[str, str], tmp_path: Path) -> None:
    found = outcome(tmp_path, *names)
    assert "\n" not in found.strip() and len(found) < 300
