"""Writes a directory for plain transformers, vLLM, SGLang and RewardBench, and proves it by reloading.

Input: the reward model's weights, one after the other, its Hugging Face config, the tokenizer and the template.
Output: a directory with safetensors files, config.json (one label, problem_type regression, a padding token that is not
EOS), the tokenizer with the chat template, README.md (the model card) and rmcore_config.yaml.
Example: the engine's rewards are [0.3127, -1.0442], those of the reloaded model [0.3127, -1.0442]: the largest
difference is 1.2e-07, allowed are 1e-05.

rmcore writes a temporary directory next to the final one, reloads it with `AutoModelForSequenceClassification`,
compares its rewards with the engine's (rmcore/hf_export/parity.py) and renames it only after that.
"""

import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from rmcore.config import UserError
from rmcore.data.tokens.encoder import TextEncoder, plain_backend_json
from rmcore.data.tokens.templates import Template
from rmcore.hf_export.adapter import AdapterParts, reloaded_adapter, store_as_trained, write_adapter
from rmcore.hf_export.parity import (
    PROBE_TURNS,
    ExportError,
    Parity,
    Probe,
    check_export,
    check_language_model,
    check_tokenizer,
    largest_difference,
    probe_text,
    reloaded,
)
from rmcore.hf_export.weights import SHARD_SIZE, check_shard_size, write_weights
from rmcore.host.command import LOST_OUTPUT
from rmcore.host.files import fsync_directory
from rmcore.host.model_directory import LORA_BASE
from rmcore.model.adapter import BASE_WEIGHTS
from rmcore.model.classifier import architecture, brings_code, code_of_decoder, is_custom_code, text_prefix
from rmcore.model.conversion import stored, stored_shapes
from rmcore.model.fp32_parts import kept_in_fp32
from rmcore.model.language_head import WEIGHT as LM_HEAD
from rmcore.model.language_head import name_in_files
from rmcore.model.meta_model import model_on_meta, set_padding
from rmcore.model.outputs import KEY as OUTPUTS
from rmcore.model.outputs import Outputs
from rmcore.scoring.normalisation import KEY as NORMALISATION
from rmcore.scoring.normalisation import Normalisation


@dataclass(frozen=True)
class Package:
    """The contents of a model directory except the weights.

    `model_class`: the `*ForSequenceClassification` class of the model. `hf_config`: the config of the trained model,
    with its final vocabulary size. `dtype`: the dtype of the written weights (fp32 or bf16). `card`: README.md.
    `config_yaml`: the resolved configuration. `normalisation`: stored in config.json, without an effect on the weights
    and their rewards, as `temperature` is (rmcore.scoring.calibration). `max_shard_size`: the largest size of one
    safetensors file, such as "5GB". `towers`: weights that were not trained (rmcore.model.classifier), by their names
    in transformers. `trust_remote_code`: whether classes of the base model's repository may run; their code is
    then copied into the directory. `lm_head`: the directory also holds the trained language-model head, which is the
    weight LM_HEAD of the engine, or the token embedding. `adapter`: write the adapter and the score head in place of
    the merged weights.
    """

    model_class: type[PreTrainedModel]
    hf_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    template: Template
    dtype: torch.dtype
    card: str
    config_yaml: str
    normalisation: Normalisation | None = None
    temperature: float | None = None
    max_shard_size: str = SHARD_SIZE
    towers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    trust_remote_code: bool = False
    lm_head: bool = False
    adapter: AdapterParts | None = None


def export_model(
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    package: Package,
    directory: str | Path,
    probe: Probe,
) -> Parity:
    """Write, reload and compare the directory, and only then put it in its place; in one process.

    Args:
        shapes, tensors: of `backbone.*` and `score.weight`, and of LM_HEAD where the package states it; whole weights,
            one after the other.
        probe: a few texts and the engine's rewards for them.
    Raises:
        UserError: `directory` holds something that is not a model, or the padding token equals EOS.
        ExportError: the weights do not fit the architecture, or a reloaded reward or token id differs. An existing
            directory is then untouched, and the new files are left in `<directory>.unverified`.
    """
    temporary = write_model(shapes, tensors, package, Path(directory))
    try:
        parity = check_written(temporary, package, probe)
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
    temporary = empty_temporary(directory)
    try:
        if package.adapter is None:
            _write_weights(shapes, tensors, package, temporary)
        else:
            _write_adapter(tensors, package, package.adapter, temporary)
        _write_texts(package, temporary)
        settle(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return temporary


def check_written(directory: Path, package: Package, probe: Probe) -> Parity:
    """Reload a directory that was written from `package` and compare it. Raises ExportError."""
    parity = check_weights(directory, package, probe)
    check_texts(directory, package, probe.token_ids)
    return parity


def check_weights(
    directory: Path,
    package: Package,
    probe: Probe,
    on_device: Callable[[PreTrainedModel], PreTrainedModel] = lambda model: model,
) -> Parity:
    """Reload the model and compare its rewards, and the logits of a language-model head; `on_device` moves the model.

    Raises ExportError.
    """
    if package.adapter is None:
        parity = check_export(on_device(reloaded(directory, package.trust_remote_code)), probe, package.dtype)
        if package.lm_head:
            parity = parity._replace(language=check_language_model(directory, probe, package.dtype))
        return parity
    model = on_device(reloaded_adapter(directory, package.hf_config, package.trust_remote_code))
    plain = 0.0
    if (stored := package.adapter.lora.base) != "fp32":
        plain = largest_difference(model, probe)
        store_as_trained(model, package.adapter)
    parity = check_export(model, probe, torch.float32)
    return parity._replace(plain=plain, stored=stored)


def check_without_weights(
    shapes: Mapping[str, tuple[int, ...]], package: Package, directory: Path, token_ids: Sequence[Sequence[int]]
) -> None:
    """Check what can be checked of an export before its weights are written; nothing stays on the disk.

    The weights must have the names and shapes of the class, for the config in memory and for the one that is written
    and reloaded. The tokenizer and the chat template are written, reloaded and compared. Raises as `export_model`.
    """
    temporary = empty_temporary(directory)
    try:
        config, skeleton = _fitting(shapes, package)
        config.architectures, config.dtype = [architecture(config, package.model_class)], package.dtype
        config.save_pretrained(temporary)
        _write_texts(package, temporary)
        kept = AutoConfig.from_pretrained(temporary, trust_remote_code=package.trust_remote_code)
        if brings_code(kept, trust_remote_code=package.trust_remote_code):
            with torch.device("meta"):
                again = package.model_class(kept)
        else:
            again = model_on_meta(kept)
        _compare_shapes(_shapes(again), _shapes(skeleton), f"{type(again).__name__} of the exported config.json")
        check_texts(temporary, package, token_ids)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_texts(directory: Path, package: Package, token_ids: Sequence[Sequence[int]]) -> None:
    """`check_tokenizer` for a directory that was written from `package`. Raises ExportError."""
    check_tokenizer(directory, package.tokenizer, package.template, token_ids, package.trust_remote_code)


def set_aside(temporary: Path, directory: Path) -> Path:
    """Keep a directory that failed the check, for people to look at; returns its new path."""
    aside = directory.with_name(f"{directory.name}.unverified")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(temporary, aside)
    return aside


def classifier_config(
    hf_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    normalisation: Normalisation | None = None,
    temperature: float | None = None,
) -> PretrainedConfig:
    """The config that other programs need: a label per output, no sigmoid, a padding token that is not EOS."""
    config = copy.deepcopy(hf_config)
    own = {} if temperature is None else {"temperature": temperature}  # the base model may have one of its own
    outputs = Outputs.stored(config)
    setattr(config, OUTPUTS, own)
    outputs.store(config)
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
    """A copy that pads on the right, holds the chat template of the training, and adds no token to its texts.

    Pipelines, RewardBench and vLLM tokenise a rendered text with special tokens, others without. Both must give the
    ids of the training, which has one BOS if the base model's tokenizer adds it, and nothing else that the text does
    not spell. So the exported template writes BOS and the exported tokenizer does not add it. Plain texts have no
    template: for them the tokenizer adds BOS.
    """
    exported = copy.deepcopy(tokenizer)
    exported.padding_side = "right"
    exported.chat_template = template.chat_template
    encoder = TextEncoder(tokenizer)
    if template.chat_template is not None and encoder.bos is not None:
        exported.chat_template = _bos_in_front(template, encoder, str(tokenizer.bos_token)) + template.chat_template
    _add_only([str(tokenizer.bos_token)] if template.wants_text and encoder.bos is not None else [], exported)
    return exported


def _bos_in_front(template: Template, encoder: TextEncoder, bos: str) -> str:
    """What to put in front of a template so that it writes the BOS that `encoder` adds; "" if it writes BOS itself.

    Tokenizers that mark the first word of a text as if a space preceded it do not mark the word behind a written BOS:
    they need the space.
    """
    texts = [text for turns in PROBE_TURNS if (text := probe_text(template, turns)) is not None]
    if any(text.startswith(bos) for text in texts) or (not texts and template.front):
        return ""
    expected = [ids.tolist() for ids in encoder.encode(texts)]
    spaced = [ids.tolist() for ids in encoder.encode([f"{bos} {text}" for text in texts])]
    plain = [ids.tolist() for ids in encoder.encode([bos + text for text in texts])]
    return "{{ bos_token }} " if spaced == expected != plain else "{{ bos_token }}"


def _add_only(front: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    """Let the tokenizer put `front` in front of a text, and add nothing else; one that does so is not changed.

    Of a pair of texts, which vLLM makes of a prompt and an answer, the tokens are those of both, `front` only once.
    """
    backend = tokenizer.backend_tokenizer
    ids = [tokenizer.convert_tokens_to_ids(token) for token in front]
    bare = backend.encode("a", add_special_tokens=False).ids
    if backend.encode("a").ids == [*ids, *bare] and backend.encode("a", "a").ids == [*ids, *bare, *bare]:
        return
    stored = plain_backend_json(tokenizer)["post_processor"] or {"type": "none"}
    steps = stored["processors"] if stored["type"] == "Sequence" else [stored]
    offsets = [processors.ByteLevel(trim_offsets=s["trim_offsets"]) for s in steps if s["type"] == "ByteLevel"]
    before = "".join(f"{token}:0 " for token in front)
    added = processors.TemplateProcessing(
        single=f"{before}$A:0", pair=f"{before}$A:0 $B:1", special_tokens=list(zip(front, ids, strict=True))
    )
    backend.post_processor = processors.Sequence([*offsets, added]) if offsets else added


def empty_temporary(directory: Path) -> Path:
    """A new directory next to `directory`, to write into.

    Raises UserError if `directory` holds something else, or cannot be made (a file, a read-only disk).
    """
    temporary = directory.with_name(f".tmp-{directory.name}-{os.getpid()}")
    try:
        if directory.exists() and any(directory.iterdir()) and not (directory / "config.json").exists():
            raise UserError(f"{directory} exists and is not an exported model: move it away, or export elsewhere")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        if error.errno in LOST_OUTPUT:  # a failure of the disk is not a mistake
            raise
        raise UserError(f"{directory} cannot be written: {error.strerror or error}: export elsewhere") from None
    return temporary


def _fitting(shapes: Mapping[str, tuple[int, ...]], package: Package) -> tuple[PretrainedConfig, Any]:
    """The exported config, and a model of the class on meta, which defines the names and shapes on disk.

    Raises ExportError if the weights have other names or shapes.
    """
    config = classifier_config(package.hf_config, package.tokenizer, package.normalisation, package.temperature)
    with torch.device("meta"):
        skeleton: Any = package.model_class(config)
    prefix = text_prefix(skeleton)
    found = {re.sub(r"^backbone\.", prefix, name): shape for name, shape in shapes.items()}
    found |= {name: tuple(tensor.shape) for name, tensor in package.towers.items()}
    if package.lm_head and (head := found.pop(LM_HEAD, None)) is not None:
        rows = tuple(skeleton.get_input_embeddings().weight.shape)
        _compare_shapes({LM_HEAD: head}, {LM_HEAD: rows}, "the language model")
    _compare_shapes(found, _shapes(skeleton), package.model_class.__name__)
    return config, skeleton


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _compare_shapes(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], what: str) -> None:
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        shown = "; ".join(f"{name}: {found.get(name)}, expected {expected.get(name)}" for name in wrong[:5])
        raise ExportError(f"{len(wrong)} weights do not fit {what}: {shown}")


def _write_weights(
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    package: Package,
    directory: Path,
) -> None:
    config, skeleton = _fitting(shapes, package)
    prefix, head = text_prefix(skeleton), name_in_files(config) if LM_HEAD in shapes else ""
    renamed = ((re.sub(r"^backbone\.", prefix, name), tensor) for name, tensor in tensors)
    weights = chain(renamed, package.towers.items())
    # Stored buffers keep their dtype, and so does what transformers loads in fp32 whatever the dtype of the others: in
    # bf16 the weights and biases of a router can choose other experts.
    buffers = {name for name, _ in skeleton.named_buffers() if name in skeleton.state_dict()}
    kept = kept_in_fp32(skeleton)
    on_disk = stored_shapes(skeleton)
    special = is_custom_code(type(skeleton)) or hasattr(config, "quantization_config") or buffers

    def in_files() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            yield from [(head, tensor)] if name == LM_HEAD else stored(skeleton, [(name, tensor)])

    if special or on_disk is None:  # transformers must write these itself
        check_shard_size(package.max_shard_size)
        exact = buffers | kept
        state = {name: tensor if name in exact else tensor.to(package.dtype) for name, tensor in weights}
        state |= {head: state.pop(LM_HEAD)} if head else {}
        skeleton.to(package.dtype).save_pretrained(directory, state_dict=state, max_shard_size=package.max_shard_size)
        return
    config.architectures, config.dtype = [architecture(config, package.model_class)], package.dtype
    config.save_pretrained(directory)
    on_disk |= {head: shapes[LM_HEAD]} if head else {}
    in_fp32 = {name for name, _ in stored(skeleton, ((name, skeleton.get_parameter(name)) for name in kept))}
    write_weights(directory, on_disk, package.dtype, in_files(), package.max_shard_size, in_fp32)


def _write_adapter(
    tensors: Iterable[tuple[str, torch.Tensor]], package: Package, adapter: AdapterParts, directory: Path
) -> None:
    """The adapter, and the config of the whole model, with which rmcore reads the directory."""
    config = classifier_config(package.hf_config, package.tokenizer, package.normalisation, package.temperature)
    own: dict[str, Any] = {LORA_BASE: adapter.lora.base}
    own |= {BASE_WEIGHTS: adapter.base_weights._asdict()} if adapter.base_weights else {}
    setattr(config, OUTPUTS, {**(getattr(config, OUTPUTS, None) or {}), **own})
    with torch.device("meta"):
        skeleton = package.model_class(config)
    write_adapter(tensors, adapter, skeleton, directory)
    config.architectures, config.dtype = [architecture(config, package.model_class)], torch.float32
    config.save_pretrained(directory)


def _write_texts(package: Package, directory: Path) -> None:
    """The tokenizer, the model card and the configuration; after config.json is there."""
    for file in code_of_decoder(package.model_class):
        shutil.copy(file, directory)
    exported = exported_tokenizer(package.tokenizer, package.template)
    exported.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    # transformers 4 has tokenizer classes that add BOS without these keys; transformers 5 reads tokenizer.json.
    wanted = exported("a").input_ids
    values |= {"add_bos_token": wanted != exported("a", add_special_tokens=False).input_ids, "add_eos_token": False}
    _write_json(path, values)
    again: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=package.trust_remote_code)
    if again("a").input_ids != wanted:  # a class that adds BOS whatever its files say, such as CodeLlama's
        _write_json(path, values | {"tokenizer_class": "PreTrainedTokenizerFast"})
    for written in (path, directory / "config.json"):
        values = json.loads(written.read_text(encoding="utf-8"))
        if _keep_present_code(values, directory, package.trust_remote_code):
            _write_json(written, values)
    (directory / "README.md").write_text(package.card, encoding="utf-8")
    (directory / "rmcore_config.yaml").write_text(package.config_yaml, encoding="utf-8")


def _keep_present_code(values: Any, directory: Path, trusted: bool) -> bool:
    """Drop entries of `auto_map` whose code is neither in the directory nor on the hub; returns whether any was.

    Without trust_remote_code, transformers' own classes were trained, so that no entry stays.
    """
    if not isinstance(values, dict):
        return False
    changed = False
    if isinstance(entries := values.get("auto_map"), dict | list):
        entries = entries if isinstance(entries, dict) else {"AutoTokenizer": entries}
        kept = {}
        for name, classes in entries.items():
            modules = [c.partition(".")[0] for c in (classes if isinstance(classes, list) else [classes]) if c]
            if trusted and all("--" in module or (directory / f"{module}.py").is_file() for module in modules):
                kept[name] = classes
        changed = kept != entries
        values["auto_map"] = kept
        if not kept:
            del values["auto_map"]
    return any([changed, *(_keep_present_code(value, directory, trusted) for value in values.values())])


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def settle(directory: Path) -> None:
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
