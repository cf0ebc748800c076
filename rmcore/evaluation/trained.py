"""Loads a trained model and prepares it to compute rewards: for evaluation, scoring, serving and export.

Input: the directory or hub id of a reward model, and overrides. Output: the `Config` under which it is used, and a
`TrainedModel`.
Example: runs/hh/model was trained in bf16 with the template simple_chat. evaluation_config("runs/hh/model",
"pairs.jsonl", []) keeps both, and TrainedModel.load(config, tokenizer, cpu) computes micro batches of 4,096 tokens.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from rmcore.config import config_from_values, load_config
from rmcore.config.schema import ONLY_SPLIT, Config
from rmcore.data.tokens.comparisons import TokenizedComparisons
from rmcore.data.tokens.templates import NAMED_TEMPLATES
from rmcore.evaluation.evaluate import Evaluation, evaluate
from rmcore.host.memory import keep_freed_memory
from rmcore.model.backbone import load_model
from rmcore.model.classifier import text_model
from rmcore.model.outputs import Outputs
from rmcore.model.reward_model import SHARED, RewardModel
from rmcore.model.selftest import choose_path, trial_comparisons
from rmcore.parallel.world import World, broadcast_json

# Tokens of a micro batch if batch.tokens is auto. Without a backward pass, more tokens make a device hardly faster.
TOKEN_BUDGET = {"cpu": 4096, "cuda": 32768}

# The keys of the training's config that an evaluation keeps.
KEPT = {
    "data": ("template", "max_tokens", "max_prompt_tokens", "length_policy"),
    "parallel": ("precision",),
}


def evaluation_config(model: str, data: str, overrides: list[str]) -> Config:
    """The config of an evaluation: `data.train` is the data, `model.head` the stored one.

    `data.split`, `data.name`, `data.revision`, `data.amount`, `data.format` and `data.columns.*` override the source's
    own keys. Raises UserError listing every mistake.
    """
    saved = Path(model) / "rmcore_config.yaml"
    values: dict[str, dict[str, Any]] = {"data": {"template": "tokenizer"}}
    if saved.is_file():
        trained = load_config(str(saved), ["model.head=stored"])  # whatever trained the head, the export holds it
        for section, keys in KEPT.items():
            values[section] = {key: getattr(getattr(trained, section), key) for key in keys}
        template = str(values["data"]["template"])
        whole = template.endswith((".jinja", ".jinja2", ".j2")) or template.startswith("tokenizer:")
        if whole or _is_changed(template, saved.parent):
            # The tokenizer of the export holds this one template; its file may no longer exist.
            values["data"]["template"] = "tokenizer"
    values["model"] = {"name": model, "head": "stored"}
    values["run"] = {"evals": 0}
    values["data"].update({"train": {"path": data}, "shuffle": False})
    if data in ONLY_SPLIT:
        values["data"]["train"]["split"] = ONLY_SPLIT[data]
    source = ("data.split", "data.name", "data.revision", "data.amount", "data.columns", "data.format")
    moved = [f"data.train.{o.removeprefix('data.')}" if o.startswith(source) else o for o in overrides]
    return config_from_values(values, moved, where="command line")


def _is_changed(template: str, directory: Path) -> bool:
    """Whether the exported form of a named template differs from it: it writes BOS if the base's tokenizer added it."""
    exported = directory / "chat_template.jinja"
    named = NAMED_TEMPLATES.get(template)
    return named is not None and exported.is_file() and exported.read_text(encoding="utf-8") != named


def on_one_day(config: Config, world: World, day: str | None = None) -> Config:
    """The config with a date for chat templates that read the clock, the same on every rank; a collective.

    The date of the config comes first, then `day`, then today's on rank 0.
    """
    chosen = broadcast_json(world, config.data.date or day or date.today().isoformat())
    return config.model_copy(update={"data": config.data.model_copy(update={"date": chosen})})


class TrainedModel:
    """A reward model on one device, in eval mode, with the settings under which it computes rewards.

    Args:
        config: its model, precision, attention and batch.tokens are used.
        hf_model: the model as transformers loads it; it is moved to `device`.
        tokenizer: only its padding token is used.
        device: where rewards are computed.
        lm_head: the language-model head, for exports that hold it (`RewardModel`).

    Attributes:
        model: the engine's model around `hf_model`.
        share: whether texts of one prompt share it; False until `choose_path` has found a path that can.
    """

    def __init__(
        self,
        config: Config,
        hf_model: PreTrainedModel,
        tokenizer: Any,
        device: torch.device,
        lm_head: nn.Linear | None = None,
    ) -> None:
        self.config, self.hf_model, self.tokenizer, self.device = config, hf_model, tokenizer, device
        text, score = text_model(hf_model), cast(nn.Linear, hf_model.score)
        outputs = Outputs.stored(hf_model.config)
        pad = int(tokenizer.pad_token_id)
        model = RewardModel(text, score, pad_token_id=pad, outputs=outputs, lm_head=lm_head)
        self.model = model.to(device).eval()
        self.share = False

    @classmethod
    def load(cls, config: Config, tokenizer: Any, device: torch.device) -> TrainedModel:
        """Read `config.model` from its files. Raises UserError if they cannot be used."""
        pad = int(tokenizer.pad_token_id)
        hf_model = load_model(config.model, seed=config.run.seed, vocabulary=len(tokenizer), pad_token_id=pad)
        keep_freed_memory()
        return cls(config, hf_model, tokenizer, device)

    @property
    def token_budget(self) -> int:
        """Most computed tokens of a micro batch."""
        tokens = self.config.batch.tokens
        return TOKEN_BUDGET[self.device.type] if tokens == "auto" else tokens

    def to(self, device: torch.device) -> None:
        """Move the model; call `choose_path` again on a device of another type."""
        self.device = device
        self.model.to(device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's arithmetic."""
        return torch.bfloat16 if self.config.parallel.bf16 else torch.float32

    def autocast(self) -> AbstractContextManager[Any]:
        """A context in which a forward runs in the precision of the config."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def choose_path(self, data: TokenizedComparisons) -> str:
        """Take the fastest path that is exact on some of these data; return a line about it.

        See rmcore.model.selftest. Raises UserError if no path is exact.
        """
        # On CUDA some kernels exist only in bf16, so that the self-test must use it.
        half = self.autocast() if self.device.type == "cuda" and self.dtype == torch.bfloat16 else None
        numbers = trial_comparisons(data.tokens_N)
        path, line = choose_path(self.model, data, numbers, self.device, self.config.model.attention, half)
        self.share = path == SHARED
        return line

    def evaluate(self, data: TokenizedComparisons, world: World, rewardbench: int | None = None) -> Evaluation:
        """Score every comparison over all ranks; `rewardbench`: by the rules of this version, too. A collective."""
        return evaluate(
            self.model,
            data,
            world,
            token_budget=self.token_budget,
            share=self.share,
            autocast=self.autocast,
            outputs=self.model.outputs,
            rewardbench=rewardbench,
        )
