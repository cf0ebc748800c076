"""Exports the untrained model, so that what would fail after the training fails before it.

Input: a config, its tokenizer, template and data. A run rehearses with the engine's own weights instead
(rmcore/training/rehearsal.py). Output: a line about the check, or a UserError. No file stays.
Example: "export rehearsed in 0.4 s: rewards reloaded by transformers differ by 1.2e-07 (allowed 1.0e-05)".

A model whose files take at most WHOLE bytes is written, reloaded by transformers and compared, as at the end of a run.
Of a larger one, rmcore writes and reloads everything except the weights, and compares their names and shapes.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rmcore.config import Config, UserError
from rmcore.data.tokens.comparisons import TokenizedComparisons
from rmcore.data.tokens.templates import Template
from rmcore.evaluation.trained import TrainedModel
from rmcore.hf_export.adapter import adapter_parts
from rmcore.hf_export.directory import Package, check_without_weights, check_written, write_model
from rmcore.hf_export.parity import Parity
from rmcore.hf_export.parts import exported_parts
from rmcore.hf_export.probe import probe_of, probe_texts
from rmcore.host.command import ExplainedError
from rmcore.host.memory import available_memory
from rmcore.model.adapter import check_adapter
from rmcore.model.backbone import (
    check_score,
    load_model,
    load_model_config,
    reward_config,
    train_text_only,
    unreadable,
)
from rmcore.model.classifier import brings_code, new_classifier, text_model, towers
from rmcore.model.language_head import empty_head, language_head
from rmcore.model.lora import add_lora, merged, store_base, visible_changes
from rmcore.model.meta_model import grow, model_on_meta
from rmcore.model.outputs import Outputs
from rmcore.model.reward_model import RewardModel
from rmcore.model.router_balance import RouterBalance

WHOLE = 2 * 10**9  # bytes of weights; a slow disk writes and reads them within half a minute
MEMORY_SHARE = 0.25  # share of the available host memory that the reloaded fp32 copy may take


class Sizes(NamedTuple):
    """Of a model: the number of its weights, the number of those that are trained, and the bytes of its export."""

    weights: int
    trained: int
    exported: int

    @property
    def small(self) -> bool:
        """Whether a rehearsal writes and reloads the whole model: it takes little time, disk and memory."""
        read = max(self.exported, 2 * self.weights)  # of an adapter, also its base model
        return read <= WHOLE and 4 * self.weights <= MEMORY_SHARE * available_memory()


@contextmanager
def refused() -> Iterator[None]:
    """Turn any error of a rehearsal into the UserError that a run and `rmcore validate` print."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers raises many kinds for what it cannot write or read
        kind = "" if isinstance(error, ExplainedError) else f"{type(error).__name__}: "
        reason = " ".join(str(error).split())[:600]
        raise UserError(f"the trained model could not be exported, so no training starts: {kind}{reason}") from error


def passed(parity: Parity | None, began: float) -> str:
    """The line about a rehearsal that began at `began` (time.monotonic) and passed; no parity: without the weights."""
    seconds = f"{time.monotonic() - began:.1f} s"
    if parity is None:
        return f"export rehearsed in {seconds} without its weights: config, names and shapes, tokenizer, chat template"
    difference = f"differ by {parity.difference:.1e} (allowed {parity.allowed:.1e})"
    return f"export rehearsed in {seconds}: rewards reloaded by transformers {difference}"


def rehearse(
    config: Config, tokenizer: PreTrainedTokenizerFast, template: Template, data: TokenizedComparisons
) -> tuple[Sizes, str]:
    """Rehearse the export of a run that would start from this config, with random weights; in one process.

    The base model's weights are not read: what an export needs does not depend on their values.
    Raises UserError.
    """
    try:
        return _rehearsed(config, tokenizer, template, data)
    except ExplainedError:
        raise
    except Exception as error:  # code of a model, with a config that does not fit it, raises anything
        raise UserError(unreadable(config.model, error)) from error


def _rehearsed(
    config: Config, tokenizer: PreTrainedTokenizerFast, template: Template, data: TokenizedComparisons
) -> tuple[Sizes, str]:
    began = time.monotonic()
    lora, seed, pad = config.model.lora, config.run.seed, int(tokenizer.pad_token_id)
    dtype = torch.bfloat16 if config.parallel.bf16 else torch.float32
    check_adapter(config.model)
    skeleton = _on_meta(config, tokenizer)
    if config.loss.router_aux:
        RouterBalance(text_model(skeleton))  # the run would refuse a model without routers
    parts = exported_parts(config, type(skeleton), skeleton.config, towers(skeleton))
    package = Package(
        model_class=parts.model_class,
        hf_config=parts.hf_config,
        tokenizer=tokenizer,
        template=template,
        dtype=dtype,
        card="",
        config_yaml=config.dump_yaml(),
        towers=parts.towers,
        trust_remote_code=config.model.trust_remote_code,
        lm_head=config.export.lm_head,
    )
    left_out = towers(skeleton).keys() - parts.towers.keys()
    count = sum(p.numel() for name, p in skeleton.named_parameters() if name not in left_out)
    # The run would refuse a model whose logits are more than a product with its head.
    head = empty_head(skeleton, "meta") if config.loss.sft else None
    adapted = add_lora(text_model(skeleton), lora, seed) if lora.rank else []
    trained = sum(p.numel() for p in skeleton.parameters() if p.requires_grad)
    sizes = Sizes(count, trained, 4 * trained if config.export.adapter else count * dtype.itemsize)

    with tempfile.TemporaryDirectory(prefix="rmcore-") as folder:
        place = Path(folder) / "model"
        if config.export.adapter:  # peft would read the base model's weights
            with refused():
                adapter_parts(config.model, adapted, type(skeleton), tokenizer)
        if config.export.adapter or not sizes.small:
            outputs = Outputs.stored(skeleton.config)
            engine = RewardModel(
                text_model(skeleton),
                cast(nn.Linear, skeleton.score),
                pad_token_id=pad,
                outputs=outputs,
                lm_head=head if config.export.lm_head else None,
            )
            with refused():
                check_without_weights(_shapes(merged(engine.state_dict(), adapted)), package, place, probe_texts(data))
            return sizes, passed(None, began)
        settled = Outputs.settled(config.model, load_model_config(config.model))
        random = settled.model_copy(update={"init": "random", "head": "fresh"})
        hf_model = load_model(random, seed=seed, vocabulary=len(tokenizer), pad_token_id=pad)
        package = replace(package, towers=towers(hf_model) if package.towers else {})
        if lora.rank:
            adapted = add_lora(text_model(hf_model), lora, seed)
            store_base(text_model(hf_model), lora)
        head = language_head(random, hf_model, seed) if config.export.lm_head else None
        whole = TrainedModel(config, hf_model, tokenizer, torch.device("cpu"), head)
        whole.choose_path(data)
        with refused(), visible_changes(lambda: dict(whole.model.named_parameters()), adapted):
            with whole.autocast():
                logits = config.export.lm_head
                probe = probe_of(whole.model, data, whole.device, whole.share, whole.dtype, logits=logits)
            state = merged(whole.model.state_dict(), adapted)
            parity = check_written(write_model(_shapes(state), state.items(), package, place), package, probe)
    return sizes, passed(parity, began)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _on_meta(config: Config, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The model that a run would train, without memory for its weights. Raises UserError."""
    pad = int(tokenizer.pad_token_id)
    hf_config = reward_config(config.model, pad)
    try:
        if brings_code(hf_config, trust_remote_code=config.model.trust_remote_code):
            with torch.device("meta"):
                model = new_classifier(hf_config, trust_remote_code=True)
        else:
            model = model_on_meta(hf_config)
    except ValueError as error:
        raise UserError(unreadable(config.model, error)) from None
    check_score(config.model, model)
    grow(model, len(tokenizer), pad)
    return train_text_only(model)
