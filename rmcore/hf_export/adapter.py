"""Writes a LoRA adapter with its score head in peft's format, and reloads it as peft does.

Input: the trained weights and the settings of LoRA. Output: adapter_config.json and adapter_model.safetensors, which
`AutoPeftModelForSequenceClassification` and `PeftModel.from_pretrained` load onto the base model, and config.json,
which describes the whole model. rmcore/model/adapter.py reads them.
Example: rank 16 on all linear layers of an 8b model: 168 MB in fp32, in place of 16 GB.

peft loads the base model in full precision. If the training stored it in fewer bits (`model.lora.base`), the adapter
belongs to the numbers that were stored: the check stores them again, and the difference without that is reported.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from rmcore.config import UserError
from rmcore.config.lora import LoraConfig
from rmcore.config.schema import ModelConfig
from rmcore.hf_export.parity import ExportError
from rmcore.host.model_directory import ADAPTER_WEIGHTS
from rmcore.model.adapter import HEAD, BaseWeights, StoredAdapter, stored_name
from rmcore.model.backbone import base_rows
from rmcore.model.classifier import is_made, text_model, text_prefix
from rmcore.model.lora import PREFIX, Adapted, store_base
from rmcore.model.meta_model import set_padding


class AdapterParts(NamedTuple):
    """What an adapter states besides its weights: the base model as the user gave it, with a fingerprint, and how LoRA
    was applied."""

    base: str
    revision: str | None
    lora: LoraConfig
    adapted: tuple[Adapted, ...]
    base_weights: BaseWeights | None  # where the weights are known, and not only their names


def adapter_parts(
    config: ModelConfig,
    adapted: Iterable[Adapted],
    model_class: type[PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    base_weights: BaseWeights | None = None,
) -> AdapterParts:
    """Raises UserError for a model whose adapter would not give the same rewards in peft."""
    if is_made(model_class):
        raise UserError(
            f"export.adapter: transformers has no class {model_class.__name__}, so peft could not load the adapter: "
            "leave export.adapter out, and the merged model loads in rmcore"
        )
    stored = StoredAdapter.of(config)
    base, revision = (stored.base, stored.base_revision) if stored else (config.name, config.revision)
    rows = base_rows(config)
    new = [token for token, number in tokenizer.get_vocab().items() if number >= rows and token != tokenizer.pad_token]
    if new:
        raise UserError(
            f"export.adapter: the base model has no embedding for {len(new)} tokens of the tokenizer, {min(new)!r} "
            "among them, and an adapter does not hold those that were drawn: leave export.adapter out"
        )
    return AdapterParts(base, revision, config.lora, tuple(adapted), base_weights)


def write_adapter(
    tensors: Iterable[tuple[str, Tensor]], parts: AdapterParts, skeleton: PreTrainedModel, to: Path
) -> None:
    """Write both files from the trained weights, in fp32; other weights are passed over.

    skeleton: the model without LoRA, on meta.
    """
    import peft

    prefix = text_prefix(skeleton)
    kept = {
        stored_name(name, prefix): tensor.detach().float().cpu().contiguous()
        for name, tensor in tensors
        if ".lora_" in name or name == HEAD
    }
    save_file(kept, to / ADAPTER_WEIGHTS, {"format": "pt"})
    targets = [prefix + layer.name.removeprefix(PREFIX) for layer in parts.adapted]
    ends = sorted({name.rpartition(".")[2] for name in targets})
    if sum(name.rpartition(".")[2] in ends for name, _ in skeleton.named_modules()) == len(targets):
        targets = ends  # the short names select the same layers
    arguments: dict[str, Any] = {
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": parts.base,
        "revision": parts.revision,
        "r": parts.lora.rank,
        "lora_alpha": parts.lora.scale_alpha,
        "target_modules": targets,
        "modules_to_save": ["score"],
        "use_dora": parts.lora.dora,
        "use_rslora": parts.lora.rslora,
        "fan_in_fan_out": any(layer.transposed for layer in parts.adapted),
        "inference_mode": True,
    }
    peft.LoraConfig(**arguments).save_pretrained(str(to))


def reloaded_adapter(directory: Path, hf_config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The directory as peft loads it onto its base model, in fp32. Raises ExportError if it cannot."""
    import peft

    given: dict[str, Any] = {"num_labels": hf_config.num_labels, "dtype": torch.float32}
    given |= {"trust_remote_code": True} if trust_remote_code else {}
    try:
        wrapped: Any = peft.AutoPeftModelForSequenceClassification.from_pretrained(str(directory), **given)
    except Exception as error:  # peft and transformers raise many kinds for what they cannot load
        raise ExportError(f"peft cannot load the adapter: {' '.join(str(error).split())[:300]}") from error
    model: PreTrainedModel = wrapped.get_base_model()
    set_padding(model.config, hf_config.get_text_config().pad_token_id)
    return model.eval()


def store_as_trained(model: PreTrainedModel, parts: AdapterParts) -> None:
    """Store the base of a reloaded adapter in as few bits as the training did."""
    # DoRA's norms are those of the training, and not those of the stored numbers.
    store_base(text_model(model), parts.lora.model_copy(update={"dora": False}))
