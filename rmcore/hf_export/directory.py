"""Writes a directory that plain transformers, vLLM, SGLang and RewardBench load, and proves it by reloading.

Input: the reward model's weights, one after the other, its Hugging Face config, the tokenizer and the template.
Output: a directory with safetensors files, config.json (one label, problem_type regression, a padding token that is not
EOS), the tokenizer with the chat template, README.md (the model card) and rmcore_config.yaml.
Example: the engine's rewards are [0.3127, -1.0442], those of the reloaded model [0.3127, -1.0442]: the largest
difference is 1.2e-07, allowed are 1e-05.

rmcore writes a temporary directory next to the final one, reloads it with `AutoModelForSequenceClassification`,
compares its rewards with the engine's (rmcore/hf_export/parity.py) and renames it only after that.
"""

import copy
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from rmcore.config import UserError
from rmcore.data.tokens.encoder import TextEncoder
from rmcore.data.tokens.templates import Template
from rmcore.hf_export.parity import ExportError, Parity, Probe, check_export, check_tokenizer, probe_text, reloaded
from rmcore.hf_export.weights import SHARD_SIZE, check_shard_size, write_weights
from rmcore.host.files import fsync_directory
from rmcore.model.classifier import text_prefix
from rmcore.model.conversion import stored, stored_shapes
from rmcore.model.meta_model import set_padding
from rmcore.scoring.normalisation import KEY as NORMALISATION
from rmcore.scoring.normalisation import Normalisation


@dataclass(frozen=True)
class Package:
    """The contents of a model directory except the weights.

    `model_class`: the `*ForSequenceClassification` class of the model. `hf_config`: the config of the trained model,
    with its final vocabulary size. `dtype`: the dtype of the written weights (fp32 or bf16). `card`: README.md.
    `config_yaml`: the resolved configuration. `normalisation`: stored in config.json, without an effect on the weights
    and their rewards. `max_shard_size`: the largest size of one safetensors file, such as "5GB". `towers`: weights that
    were not trained (rmcore.model.classifier), by their names in transformers.
    """

    model_class: type[PreTrainedModel]
    hf_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    template: Template
    dtype: torch.dtype
    card: str
    config_yaml: str
    normalisation: Normalisation | None = None
    max_shard_size: str = SHARD_SIZE
    towers: Mapping[str, torch.Tensor] = field(default_factory=dict)


def export_model(
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    package: Package,
    directory: str | Path,
    probe: Probe,
) -> Parity:
    """Write, reload and compare the directory, and only then put it in its place; in one process.

    Args:
        shapes, tensors: of `backbone.*` and `score.weight`; whole weights, one after the other.
        probe: a few texts and the engine's rewards for them.
    Raises:
        UserError: `directory` holds something that is not a model, or the padding token equals EOS.
        ExportError: the weights do not fit the architecture, or a reloaded reward or token id differs. An existing
            directory is then untouched, and the new files are left in `<directory>.unverified`.
    """
    temporary = write_model(shapes, tensors, package, Path(directory))
    try:
        parity = check_export(reloaded(temporary), probe, package.dtype)
        check_tokenizer(temporary, package.tokenizer, package.template, probe.token_ids)
    except BaseException as error:
        raise ExportError(f"{error} (left in {set_aside(temporary, Path(directory))})") from error
    take_place(temporary, Path(directory))
    return parity


def write_model(
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    package: Package,
    directory: Path,
) -> Path:
    """Write everything to a temporary directory next to `directory`, and return its path.

    Raises as `export_model`; no files are left then.
    """
    if directory.exists() and any(directory.iterdir()) and not (directory / "config.json").exists():
        raise UserError(f"{directory} exists and is not an exported model: move it away, or export elsewhere")
    temporary = directory.with_name(f".tmp-{directory.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_weights(shapes, tensors, package, temporary)
        exported_tokenizer(package.tokenizer, package.template).save_pretrained(temporary)
        (temporary / "README.md").write_text(package.card, encoding="utf-8")
        (temporary / "rmcore_config.yaml").write_text(package.config_yaml, encoding="utf-8")
        _settle(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return temporary


def set_aside(temporary: Path, directory: Path) -> Path:
    """Keep a directory that failed the check, for people to look at; returns its new path."""
    aside = directory.with_name(f"{directory.name}.unverified")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(temporary, aside)
    return aside


def classifier_config(
    hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, normalisation: Normalisation | None = None
) -> PretrainedConfig:
    """The config that other programs need: one label, no sigmoid, a padding token that is not EOS."""
    config = copy.deepcopy(hf_config)
    config.id2label, config.label2id = {0: "reward"}, {"reward": 0}
    config.problem_type = "regression"  # without it the pipeline and vLLM apply a sigmoid to the reward
    # vLLM's score task and sentence-transformers' CrossEncoder read this, and use a sigmoid without it.
    config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    vars(config).pop(NORMALISATION, None)  # the base model may be an exported reward model with its own
    if normalisation is not None:
        setattr(config, NORMALISATION, normalisation.stored())
    set_padding(config, tokenizer.pad_token_id)
    stated = getattr(config.get_text_config(), "eos_token_id", None)
    eos = stated if isinstance(stated, list) else [stated]
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in (*eos, tokenizer.eos_token_id):
        raise UserError(
            f"the padding token {tokenizer.pad_token!r} is missing or equals EOS: a program that looks for the last "
            "token before the padding would read the wrong one; give the tokenizer a padding token of its own"
        )
    return config


def exported_tokenizer(tokenizer: PreTrainedTokenizerFast, template: Template) -> PreTrainedTokenizerFast:
    """A copy that pads on the right and holds the chat template of the training (none for plain texts).

    If the tokenizer puts BOS in front of a text by itself, training texts begin with it, but `apply_chat_template`
    would not add it; the exported template then writes it.
    """
    exported = copy.deepcopy(tokenizer)
    exported.padding_side = "right"
    exported.chat_template = template.chat_template
    if template.chat_template is not None and TextEncoder(tokenizer).bos is not None:
        text = probe_text(template)
        if text is not None and not text.startswith(str(tokenizer.bos_token)):
            exported.chat_template = "{{ bos_token }}" + template.chat_template
    return exported


def _write_weights(
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    package: Package,
    directory: Path,
) -> None:
    config = classifier_config(package.hf_config, package.tokenizer, package.normalisation)
    with torch.device("meta"):  # the class defines the names and shapes on disk; on meta it needs no memory
        skeleton: Any = package.model_class(config)
    skeleton.to(package.dtype)
    prefix = text_prefix(skeleton)

    def hf_name(name: str) -> str:
        return re.sub(r"^backbone\.", prefix, name)

    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    found = {hf_name(name): shape for name, shape in shapes.items()}
    found |= {name: tuple(tensor.shape) for name, tensor in package.towers.items()}
    renamed = chain(((hf_name(name), tensor) for name, tensor in tensors), package.towers.items())
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        shown = "; ".join(f"{name}: {found.get(name)}, expected {expected.get(name)}" for name in wrong[:5])
        raise ExportError(f"{len(wrong)} weights do not fit {package.model_class.__name__}: {shown}")
    floating = all(tensor.is_floating_point() for tensor in skeleton.state_dict().values())
    on_disk = stored_shapes(skeleton)
    special = skeleton.is_custom_code() or hasattr(config, "quantization_config")
    if special or on_disk is None or not floating:  # transformers must write these itself
        check_shard_size(package.max_shard_size)
        state = {name: t.to(package.dtype) if t.is_floating_point() else t for name, t in renamed}
        skeleton.save_pretrained(directory, state_dict=state, max_shard_size=package.max_shard_size)
        return
    config.architectures, config.dtype = [package.model_class.__name__], package.dtype
    config.save_pretrained(directory)
    write_weights(directory, on_disk, package.dtype, stored(skeleton, renamed), package.max_shard_size)


def _settle(directory: Path) -> None:
    """Give every file the mode that the umask allows (safetensors writes 0600) and bring it to the disk."""
    mode = directory.stat().st_mode & 0o666
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(mode)
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    fsync_directory(directory)


def take_place(temporary: Path, directory: Path) -> None:
    """Rename a directory that passed the check to its final name."""
    old = directory.with_name(f".old-{directory.name}-{os.getpid()}")
    if directory.exists():
        os.replace(directory, old)
    os.replace(temporary, directory)
    fsync_directory(directory.parent)
    shutil.rmtree(old, ignore_errors=True)
