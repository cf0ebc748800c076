"""Loads the LoRA adapters that rmcore exports, in peft's format, onto their base model.

Input: a directory or hub id with adapter_config.json, adapter_model.safetensors (adapters and score head) and
config.json. Output: the base model with the adapters, to train them further; or merged, to compute rewards.
Example: rank 16 on all linear layers of an 8b model: 168 MB, next to a base model of 16 GB.

config.json describes the whole model, and has the key `rmcore.lora_base`: how the training stored the frozen weights of
the adapted layers (`model.lora.base`). With an nf4 base, rewards are those of the nf4 numbers, so rmcore makes them
again from the base model's files. The key `rmcore.base_weights` has a fingerprint of these files' weights.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from rmcore.config import UserError
from rmcore.config.lora import LoraConfig
from rmcore.config.schema import ModelConfig
from rmcore.host.model_directory import ADAPTER, ADAPTER_WEIGHTS, LORA_BASE, refuse_missing_directory
from rmcore.model.classifier import text_model, text_prefix
from rmcore.model.found_weights import listed
from rmcore.model.lora import PREFIX, add_lora, frozen_fingerprint, merged, store_base
from rmcore.model.outputs import KEY
from rmcore.model.synthetic_model import SYNTHETIC

ROOT = "base_model.model."  # in front of peft's names
BASE_WEIGHTS = "base_weights"  # in `rmcore` of config.json


class BaseWeights(NamedTuple):
    """The tokens in the embedding of a base model, and a fingerprint of the weights that LoRA did not train."""

    rows: int
    fingerprint: str

    @classmethod
    def of(cls, backbone: PreTrainedModel, rows: int) -> "BaseWeights":
        """Of a text model with LoRA whose base is not yet stored in fewer bits (`store_base`)."""
        return cls(rows, frozen_fingerprint(backbone, rows))


class StoredAdapter(NamedTuple):
    """An adapter of rmcore's: where it is, its base model, and the settings `model.lora` of its training.

    `base_weights`: None for adapters of earlier versions, whose base model is not checked.
    """

    source: str
    revision: str | None
    base: str
    base_revision: str | None
    lora: LoraConfig
    base_weights: BaseWeights | None = None

    @classmethod
    def of(cls, config: ModelConfig) -> "StoredAdapter | None":
        """The adapter that `config.name` is; None if it is a whole model. Raises UserError for a broken one."""
        if config.init == "random" or config.name == SYNTHETIC:
            return None
        path = _file(config.name, config.revision, ADAPTER)
        if path is None:
            return None
        own = _json(_file(config.name, config.revision, "config.json")).get(KEY)
        stored = _json(path)
        if not isinstance(own, dict) or LORA_BASE not in own:
            raise UserError(
                f"model.name {config.name} is an adapter of {stored.get('base_model_name_or_path')}, which rmcore did "
                "not export: `rmcore convert DIR -o DIR` makes a plain reward model of it"
            )
        try:
            lora = LoraConfig.model_validate(
                {
                    "rank": stored["r"],
                    "alpha": float(stored["lora_alpha"]),
                    "targets": stored["target_modules"],
                    "base": own[LORA_BASE],
                    "dora": stored["use_dora"],
                    "rslora": stored["use_rslora"],
                }
            )
            known = own.get(BASE_WEIGHTS)
            return cls(
                config.name,
                config.revision,
                str(stored["base_model_name_or_path"]),
                stored.get("revision"),
                lora,
                None if known is None else BaseWeights(int(known["rows"]), str(known["fingerprint"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is not the config of a LoRA adapter: {' '.join(str(error).split())[:200]}"
            ) from None

    def check_settings(self, config: ModelConfig) -> None:
        """Raises UserError unless a training with these settings continues with this adapter as it is."""
        own = {"rank", "alpha", "base", "dora", "rslora"}
        wanted = {key: getattr(self.lora, key) for key in own}
        given = {key: getattr(config.lora, key) for key in own} | {"alpha": config.lora.scale_alpha}
        different = [
            f"model.lora.{key}={json.dumps(wanted[key]).strip(chr(34))}"
            for key in sorted(own)
            if wanted[key] != given[key]
        ]
        if config.head != "stored":
            different.append("model.head=stored")
        if different:
            raise UserError(
                f"model.name {self.source} is a LoRA adapter of {self.base}: to train it further, set "
                f"{' '.join(different)}; to train all weights, merge it first (`rmcore export {self.source} -o DIR`)"
            )

    def base_config(self, config: ModelConfig) -> ModelConfig:
        """The section `model` for the base model. Raises UserError if its directory is missing."""
        try:
            refuse_missing_directory(self.base)
        except UserError as error:
            raise UserError(
                f"{self.source} is an adapter, and its base model is missing: {error}; put it there, or correct "
                f"base_model_name_or_path in {ADAPTER}"
            ) from None
        return config.model_copy(
            update={"name": self.base, "revision": self.base_revision, "head": "fresh", "lora": LoraConfig()}
        )

    def check_base(self, backbone: PreTrainedModel) -> None:
        """Raises UserError unless the adapter was trained on these weights; see `BaseWeights.of`."""
        if self.base_weights is None:
            return
        found = BaseWeights.of(backbone, self.base_weights.rows)
        if found != self.base_weights:
            raise UserError(
                f"the weights of {self.base} are not those on which the adapter {self.source} was trained (fingerprint "
                f"{self.base_weights.fingerprint[:12]} then, {found.fingerprint[:12]} now), so its rewards would be "
                f"others: bring the old ones back (`revision` in {ADAPTER} pins a hub model)"
            )

    def load_head(self, model: PreTrainedModel) -> None:
        """Give the base model the adapter's score head."""
        with torch.no_grad():
            head = self._tensors().get(stored_name(HEAD, ""))
            score = cast(nn.Linear, model.score).weight
            if head is None or head.shape != score.shape:
                found = "no score head" if head is None else f"a score head {list(head.shape)}"
                raise UserError(f"{self.source} has {found}; {list(score.shape)} fits {self.base}")
            score.copy_(head)

    def load_adapters(self, model: PreTrainedModel) -> None:
        """Fill the adapters that `add_lora` put into the model, and the score head.

        Raises UserError unless the file holds exactly these.
        """
        prefix, tensors = text_prefix(model), self._tensors()
        wanted: dict[str, Tensor] = {
            stored_name(f"{PREFIX}{n}", prefix): p for n, p in text_model(model).named_parameters() if ".lora_" in n
        }
        wanted[stored_name(HEAD, prefix)] = cast(nn.Linear, model.score).weight
        wrong = [n for n in wanted.keys() & tensors.keys() if wanted[n].shape != tensors[n].shape]
        faults = [
            *listed("missing:", sorted(wanted.keys() - tensors.keys())),
            *listed("unexpected:", sorted(tensors.keys() - wanted.keys())),
            *listed(
                "of another shape:",
                [f"{n} {list(tensors[n].shape)} (expected {list(wanted[n].shape)})" for n in sorted(wrong)],
            ),
            *listed("NaN or Inf in", sorted(n for n, t in tensors.items() if not bool(torch.isfinite(t).all()))),
        ]
        if faults:
            raise UserError(
                f"{self.source}: {ADAPTER_WEIGHTS} does not fit {self.base} and model.lora.targets: {'; '.join(faults)}"
            )
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(tensors[name])

    def merge_into(self, model: PreTrainedModel) -> None:
        """Make the trained model of the base model, in place: plain layers with merged weights, and the score head.

        Raises UserError if the two do not fit each other.
        """
        backbone = text_model(model)
        plain = dict(backbone.named_modules())
        adapted = add_lora(backbone, self._lora_of(model), seed=0)
        self.check_base(backbone)
        store_base(backbone, self.lora)
        self.load_adapters(model)
        parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in backbone.state_dict().items():
            owner = next((end for end in (".lora_", ".base_layer.") if end in name), None)
            if owner is not None:
                parts[f"{PREFIX}{name.partition(owner)[0]}"][f"{PREFIX}{name}"] = tensor
        for layer in adapted:
            name = layer.name.removeprefix(PREFIX)
            linear = cast(nn.Linear, plain[name])
            linear.weight = nn.Parameter(merged(parts.pop(layer.name), [layer])[f"{layer.name}.weight"])
            backbone.set_submodule(name, linear)

    def _lora_of(self, model: PreTrainedModel) -> LoraConfig:
        """The settings with targets as they are called in the text model."""
        prefix = text_prefix(model)
        return self.lora.model_copy(update={"targets": [t.removeprefix(prefix) for t in self.lora.targets]})

    def _tensors(self) -> Mapping[str, Tensor]:
        path = _file(self.source, self.revision, ADAPTER_WEIGHTS)
        if path is None:
            raise UserError(f"{self.source} is an adapter without {ADAPTER_WEIGHTS}")
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None


HEAD = "score.weight"


def check_adapter(config: ModelConfig) -> None:
    """Raises UserError if the model to train is an adapter, and the settings would not continue with it as it is."""
    if (adapter := StoredAdapter.of(config)) is not None:
        adapter.check_settings(config)


def stored_name(name: str, prefix: str) -> str:
    """peft's name of a trained weight of the reward model. `prefix`: see `text_prefix`.

    Example: backbone.layers.0.mlp.up_proj.lora_A.default.weight and the prefix "model." ->
    base_model.model.model.layers.0.mlp.up_proj.lora_A.weight.
    """
    if name.startswith(PREFIX):
        name = prefix + name.removeprefix(PREFIX)
    name = name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector")
    return ROOT + name.replace(".default.weight", ".weight")


def _file(source: str, revision: str | None, name: str) -> Path | None:
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    try:
        found = cached_file(source, name, revision=revision, **quiet)
    except (OSError, ValueError):  # no such model: whoever loads it reports this
        return None
    return None if found is None else Path(found)


def _json(path: Path | None) -> dict:
    try:
        values = json.loads(path.read_bytes()) if path is not None else {}
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
