"""Exports of tiny real models, for every test that needs an exported directory."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rmcore.config import Config, load_config
from rmcore.data.batches.batch import build_batch
from rmcore.data.synthetic import byte_tokenizer
from rmcore.data.tokens.comparisons import EncodedRow, TokenizedComparisons
from rmcore.data.tokens.limits import LengthLimits, in_memory
from rmcore.data.tokens.templates import load_template
from rmcore.hf_export.directory import Package, export_model
from rmcore.hf_export.parity import Probe
from rmcore.model.backbone import turn_dropout_off
from rmcore.model.classifier import text_model
from rmcore.model.outputs import Outputs
from rmcore.model.reward_model import SHARED, RewardModel
from tests.harness.oracle import FAMILIES


def classifier(family: str, tokenizer: Any) -> PreTrainedModel:
    """A small random model of the family over the tokenizer's vocabulary, dropout off."""
    class_name, arguments = FAMILIES[family]
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = getattr(transformers, class_name)(**{**arguments, "vocab_size": len(tokenizer), **ids})
    torch.manual_seed(1)
    return enlarged(AutoModelForSequenceClassification.from_config(config))


def enlarged(model: PreTrainedModel) -> PreTrainedModel:
    """A random model, its matrices three times as large, so that a wrong layer shows in a reward; dropout off."""
    for parameter in model.parameters():
        parameter.data.mul_(3.0 if parameter.ndim > 1 else 1.0)
    turn_dropout_off(model)
    return model


def texts(tokenizer: Any) -> TokenizedComparisons:
    """Three comparisons of unequal lengths, as token ids with EOS."""
    rows = []
    for prompt, answers in (("Hello ", ("there", "you")), ("A much longer prompt: ", ("x", "y z")), ("", ("a", "bc"))):
        ids = [
            np.array([*tokenizer.encode(prompt + a, add_special_tokens=False), tokenizer.eos_token_id], np.int32)
            for a in answers
        ]
        rows.append(EncodedRow(ids[0][:0], ids, [(0, 1)], [0.0], [1.0]))
    return in_memory(rows, LengthLimits(96))


def engine(model: PreTrainedModel, data: TokenizedComparisons, path: str) -> tuple[dict[str, torch.Tensor], Probe]:
    """The weights under the engine's names, and its outputs for every text, as a run gives them to the export."""
    assert isinstance(model.score, torch.nn.Linear)
    pad = model.config.get_text_config().pad_token_id
    reward_model = RewardModel(text_model(model), model.score, pad_token_id=pad, outputs=Outputs.stored(model.config))
    reward_model.use(path)
    with torch.no_grad():
        outputs_AK = reward_model(build_batch(data, range(len(data)), share=path == SHARED)).outputs_AK
    token_ids = [data.comparison(n).text(answer).tolist() for n in range(len(data)) for answer in (0, 1)]
    return reward_model.state_dict(), Probe(token_ids, outputs_AK.flatten().tolist())


def export(
    directory: Path, family: str = "llama", template: str = "simple_chat", tokenizer: Any = None, **changes: Any
) -> Probe:
    """Export `model` or a tiny one of the family; `changes` replace arguments of `export_model`. Returns the probe."""
    tokenizer = tokenizer or byte_tokenizer()
    model = changes.pop("model", None) or classifier(family, tokenizer)
    state, probe = engine(model, texts(tokenizer), SHARED)
    state, probe = changes.pop("state", state), changes.pop("probe", probe)
    arguments: dict[str, Any] = {
        "model_class": type(model),
        "hf_config": model.config,
        "tokenizer": tokenizer,
        "template": load_template(template, tokenizer),
        "dtype": torch.float32,
        "card": "a card\n",
        "config_yaml": run_config().dump_yaml(),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    parity = export_model(shapes, state.items(), Package(**{**arguments, **changes}), directory, probe)
    assert 0 <= parity.difference <= parity.allowed
    return probe


def run_config(*overrides: str) -> Config:
    """The config of a small run on the synthetic task."""
    needed = ["model.name=synthetic", "model.init=random", "data.train.path=synthetic", "data.template=simple_chat"]
    return load_config(None, [*needed, "data.max_tokens=90", "parallel.precision=fp32", *overrides])
