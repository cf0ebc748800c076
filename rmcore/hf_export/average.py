"""Averages the weights of reward models of one architecture, file by file, and proves the result by reloading it.

Input: directories of reward models. Output: a directory whose files, names and dtypes are those of the first, with the
mean of every weight; and lines about it.
Example: a weight of 1.0, 2.0 and 4.0 in three models in bf16: the mean is 2.3333 in fp64, and 2.328125 is written.

Ramé et al., arXiv 2401.12187 (WARM): uniform average of models that were fine-tuned from the same weights. One block of
a weight is in memory at a time. The check has another way to the average: transformers loads one model after the other,
the engine adds up their weights in fp32 and computes rewards, and the written directory must give the same ones. It
needs memory for two fp32 copies of the model.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerFast

from rmcore.config import UserError
from rmcore.config.schema import Config
from rmcore.data.tokens.templates import template_of
from rmcore.data.tokens.tokenizer import load_tokenizer, tokenizer_fingerprint
from rmcore.evaluation.trained import TrainedModel, evaluation_config
from rmcore.hf_export.card import average_card
from rmcore.hf_export.directory import empty_temporary, set_aside, settle, take_place
from rmcore.hf_export.from_checkpoint import built_in
from rmcore.hf_export.parity import ExportError, Parity, Probe, check_export, reloaded
from rmcore.hf_export.probe import probe_of
from rmcore.hf_export.upload import exported_files
from rmcore.host.model_directory import indexed_files
from rmcore.host.safetensors_file import CHUNK, DTYPES, chunks, layout
from rmcore.model.backbone import load_model_config, position_limit
from rmcore.model.classifier import classifier_class, is_made
from rmcore.scoring.normalisation import KEY as NORMALISATION

DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}
INDEX = "model.safetensors.index.json"
# Of config.json: who wrote it, and what holds for one model only.
PERSONAL = ("_name_or_path", "transformers_version", NORMALISATION)


class Stored(NamedTuple):
    """One weight of a model: its file, dtype (as safetensors calls it) and shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def average(models: Sequence[str], out: str) -> list[str]:
    """Write and check the average in `out`; returns lines about it.

    Raises:
        UserError: fewer than two models, or models that differ in more than their weights.
        ExportError: the written model does not give the rewards of the average.
    """
    if len(models) < 2:
        raise UserError(f"an average needs two models or more, not {len(models)}")
    folders = [Path(model) for model in models]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not the directory of a model; `hf download` fetches one from the hub")
    contents = [stored_weights(folder) for folder in folders]
    tokenizer, configs = _of_one_kind(folders, contents)
    temporary = empty_temporary(Path(out))
    try:
        _write(folders, contents, temporary)
        lines = _write_texts(folders, temporary, is_made(classifier_class(load_model_config(configs[0].model))))
        settle(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        parity = _checked(configs, tokenizer, contents[0], temporary)
    except BaseException as error:
        raise ExportError(f"{error} (left in {set_aside(temporary, Path(out))})") from error
    take_place(temporary, Path(out))
    difference = f"differ by {parity.difference:.1e} (allowed {parity.allowed:.1e})"
    return [
        *lines,
        f"{out}: the average of {len(models)} models; rewards reloaded by transformers {difference}",
        *parity.notes,
    ]


def stored_weights(folder: Path) -> dict[str, Stored]:
    """Every weight in the safetensors files of a model. Raises UserError if they cannot be read or averaged."""
    names = indexed_files(folder / INDEX) if (folder / INDEX).is_file() else ["model.safetensors"]
    found: dict[str, Stored] = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                    part = file.get_slice(key)
                    found[key] = Stored(name, part.get_dtype(), tuple(part.get_shape()))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / name} cannot be read: {error}") from None
    if whole := next((key for key, one in found.items() if one.dtype not in DTYPE_OF), None):
        raise UserError(f"{folder}: {whole} holds {found[whole].dtype}, which cannot be averaged")
    return found


def _of_one_kind(
    folders: Sequence[Path], contents: Sequence[dict[str, Stored]]
) -> tuple[PreTrainedTokenizerFast, list[Config]]:
    """The tokenizer of all models and the config of each, in fp32. Raises UserError for the first difference."""
    configs = [evaluation_config(str(folder), "-", ["parallel.precision=fp32"]) for folder in folders]
    shapes = [_plain(load_model_config(config.model).to_dict()) for config in configs]
    tokenizers = [load_tokenizer(config) for config in configs]
    first = folders[0]
    for folder, shape, tokenizer, content in zip(folders[1:], shapes[1:], tokenizers[1:], contents[1:], strict=True):

        def refused(what: str, folder: Path = folder) -> UserError:
            return UserError(f"{folder} and {first} cannot be averaged: {what}")

        if key := next((key for key in shapes[0] | shape if shapes[0].get(key) != shape.get(key)), None):
            raise refused(f"{key} of config.json is {_short(shape.get(key))} and {_short(shapes[0].get(key))}")
        if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(tokenizers[0]):
            raise refused("their tokenizers differ")
        if tokenizer.chat_template != tokenizers[0].chat_template:
            raise refused("their chat templates differ, so that they read other texts")
        ours = {name: one._replace(file="") for name, one in content.items()}
        theirs = {name: one._replace(file="") for name, one in contents[0].items()}
        if name := min((name for name in ours | theirs if ours.get(name) != theirs.get(name)), default=None):
            kinds = [
                f"{one[name].dtype} {list(one[name].shape)}" if name in one else "missing" for one in (ours, theirs)
            ]
            raise refused(f"{name} is {kinds[0]} and {kinds[1]}")
    return tokenizers[0], configs


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in PERSONAL}


def _short(value: Any) -> str:
    return json.dumps(value, default=str)[:60]


def _write(folders: Sequence[Path], contents: Sequence[dict[str, Stored]], target: Path) -> None:
    """The files of the first model with the average of each weight. Raises UserError for NaN and Inf."""
    for file_name in sorted({one.file for one in contents[0].values()}):
        mine = {name: one for name, one in contents[0].items() if one.file == file_name}
        plan = layout({name: (DTYPE_OF[one.dtype], one.shape) for name, one in mine.items()}, {"format": "pt"})
        with open(target / file_name, "xb") as out:
            out.write(plan.header)
            for name, one in mine.items():  # in the order of the layout
                places = [folder / content[name].file for folder, content in zip(folders, contents, strict=True)]
                for block in _mean_blocks(places, name, one.shape):
                    if not bool(torch.isfinite(block).all()):
                        raise UserError(f"{name} holds NaN or Inf in one of the models, which cannot be averaged")
                    for chunk in chunks(block, DTYPE_OF[one.dtype]):
                        out.write(chunk)


def _mean_blocks(places: Sequence[Path], name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """The fp64 mean of one weight, in blocks of rows."""
    opened = [safe_open(place, framework="pt") for place in places]
    if not shape:
        yield torch.stack([file.get_tensor(name).double() for file in opened]).mean(0)
        return
    parts = [file.get_slice(name) for file in opened]
    row = torch.Size(shape[1:]).numel() * torch.float64.itemsize
    step = max(1, CHUNK // max(1, row))
    for start in range(0, shape[0], step):
        total = parts[0][start : start + step].double()
        for part in parts[1:]:
            total += part[start : start + step].double()
        yield total / len(parts)


def _write_texts(folders: Sequence[Path], target: Path, made: bool) -> list[str]:
    """Everything except the weights, from the first model; config.json without its normalisation. Returns notes."""
    first, notes = folders[0], []
    for name in exported_files(first)[0]:
        if not name.endswith(".safetensors"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(first / name, target / name)
    values = json.loads((target / "config.json").read_text(encoding="utf-8"))
    if values.pop(NORMALISATION, None) is not None:
        notes.append(
            "note: the average has no mean and deviation of its own yet: those of the first model are left out"
        )
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (target / "config.json").write_text(text, encoding="utf-8")
    (target / "README.md").write_text(average_card([str(folder) for folder in folders], made=made), encoding="utf-8")
    return notes


def _checked(
    configs: Sequence[Config], tokenizer: PreTrainedTokenizerFast, weights: dict[str, Stored], written: Path
) -> Parity:
    """Compare the rewards of the written directory with those of the weights that transformers loads and the engine
    averages."""
    cpu = torch.device("cpu")
    mean = TrainedModel.load(configs[0], tokenizer, cpu)
    total = {name: tensor for name, tensor in mean.model.state_dict().items() if tensor.is_floating_point()}
    for config in configs[1:]:
        other = TrainedModel.load(config, tokenizer, cpu).model.state_dict()
        for name, tensor in total.items():
            tensor.add_(other[name])
        del other
    for tensor in total.values():
        tensor.div_(len(configs))
    trial = built_in(template_of(configs[0], tokenizer), tokenizer, position_limit(load_model_config(configs[0].model)))
    mean.choose_path(trial)
    probe: Probe = probe_of(mean.model, trial, cpu, mean.share, torch.float32)
    del total
    coarsest = max((DTYPE_OF[one.dtype] for one in weights.values()), key=lambda dtype: torch.finfo(dtype).eps)
    return check_export(reloaded(written), probe, coarsest)
