"""A trained model made ready: its config, its path, its rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rmcore.config import config_from_values, load_config
from rmcore.config.schema import Config
from rmcore.data.tokens.comparisons import TokenizedComparisons
from rmcore.evaluation.evaluate import Evaluation
from rmcore.evaluation.rewardbench import HUB_SPLITS
from rmcore.parallel.world import World

ENOUGH_TOKENS = 4096  # of a micro batch: more fills a device no better when nothing is kept for a backward

# What a model trained under some config still means when others evaluate it.
KEPT = {"data": ("template", "max_tokens", "max_prompt_tokens", "length_policy"), "parallel": ("precision",)}


def evaluation_config(model: str, data: str, overrides: list[str]) -> Config:
    """The config of an evaluation: `data.train` names the data, `model.head` is the stored one.

    `data.split`, `data.name`, `data.revision`, `data.amount` and `data.columns.*` override the source's own keys.
    Raises UserError listing every mistake.
    """
    saved = Path(model) / "rmcore_config.yaml"
    values: dict[str, dict[str, Any]] = {"data": {"template": "tokenizer"}}
    if saved.is_file():
        trained = load_config(str(saved), [])
        for section, keys in KEPT.items():
            values[section] = {key: getattr(getattr(trained, section), key) for key in keys}
        if str(values["data"]["template"]).endswith((".jinja", ".jinja2", ".j2")):
            values["data"]["template"] = "tokenizer"  # the file may be gone; the export holds what was in it
    values["model"] = {"name": model, "head": "stored"}
    values["run"] = {"evals": 0}
    values["data"].update({"train": {"path": data}, "shuffle": False})
    if data in HUB_SPLITS:
        values["data"]["train"]["split"] = HUB_SPLITS[data]
    source = ("data.split", "data.name", "data.revision", "data.amount", "data.columns")
    moved = [f"data.train.{o.removeprefix('data.')}" if o.startswith(source) else o for o in overrides]
    return config_from_values(values, moved, where="command line")


def evaluated(config: Config, world: World, tokenizer: Any, data: TokenizedComparisons) -> tuple[Evaluation, str]:
    """The evaluation of `config.model` on tokenised data, and the self-test's line on how it was computed."""
    from contextlib import nullcontext

    import torch

    from rmcore.data.tokens.comparisons import computed_tokens
    from rmcore.evaluation.evaluate import evaluate
    from rmcore.model.backbone import load_model
    from rmcore.model.reward_model import SHARED, RewardModel
    from rmcore.model.selftest import choose_path, trial_comparisons
    from rmcore.parallel.world import first_error

    pad = int(tokenizer.pad_token_id)
    hf_model: Any = first_error(
        world,
        "loading the model",
        lambda: load_model(config.model, seed=config.run.seed, vocabulary=len(tokenizer), pad_token_id=pad),
    )
    model = RewardModel(hf_model.base_model, hf_model.score, pad_token_id=pad).to(world.device)

    def half() -> Any:
        bf16 = config.parallel.precision == "bf16"
        return torch.autocast(world.device.type, dtype=torch.bfloat16) if bf16 else nullcontext()

    trial = half() if world.device.type == "cuda" and config.parallel.precision == "bf16" else None
    numbers = trial_comparisons(computed_tokens(data, share=True))
    path, line = first_error(
        world, "the self-test", lambda: choose_path(model, data, numbers, config.model.attention, trial)
    )
    budget = ENOUGH_TOKENS if config.batch.tokens == "auto" else config.batch.tokens
    return evaluate(model, data, world, token_budget=budget, share=path == SHARED, autocast=half), line
