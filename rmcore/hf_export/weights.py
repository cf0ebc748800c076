"""Writes weights into a model directory's safetensors files one by one, without ever holding two of them.

Input: names and shapes, then the tensors in any order. Output: `model.safetensors`, or numbered files and their index,
with the names and the cut that huggingface_hub gives them and transformers reads.
Example: 13.5e9 bytes in bf16 -> model-00001-of-00003.safetensors to model-00003-of-00003.safetensors and
model.safetensors.index.json.

The place of every weight follows from the shapes, so each file gets its header and its full length first.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from rmcore.config import UserError
from rmcore.host.safetensors_file import chunks, layout

SHARD_SIZE = "5GB"  # of one file


def write_weights(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, torch.Tensor]],
    max_shard_size: str = SHARD_SIZE,
    in_fp32: Collection[str] = (),
) -> None:
    """Write all weights, converted to `dtype`; those in `in_fp32` to fp32.

    Raises OSError; UserError for a wrong `max_shard_size`; ValueError for a weight with another name or shape, or one
    that is missing at the end.
    """
    dtypes = {name: torch.float32 if name in in_fp32 else dtype for name in shapes}
    places = _write_headers(directory, shapes, dtypes, max_shard_size)
    missing = set(shapes)
    for name, tensor in tensors:
        if name not in missing or tuple(tensor.shape) != tuple(shapes[name]):
            raise ValueError(f"unexpected weight {name} {tuple(tensor.shape)}; expected {shapes.get(name)}, once")
        missing.remove(name)
        path, offset = places[name]
        with open(path, "r+b") as file:
            file.seek(offset)
            for chunk in chunks(tensor, dtypes[name]):
                file.write(chunk)
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, {min(missing)} among them")


def check_shard_size(size: str) -> None:
    """Raises UserError unless `size` is a whole number and KB, MB or GB."""
    if not re.fullmatch(r"0*[1-9][0-9]*[KMG]B", size, re.IGNORECASE):
        raise UserError(f"{size!r} is not the size of a file: expected a whole number and KB, MB or GB, such as 5GB")


def _write_headers(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], max_shard_size: str
) -> dict[str, tuple[Path, int]]:
    """Make all files, and the index if there are several; returns the file and the first byte of each weight."""
    check_shard_size(max_shard_size)
    bytes_of = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    split = split_state_dict_into_shards_factory(
        bytes_of,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    places: dict[str, tuple[Path, int]] = {}
    for file_name, names in split.filename_to_tensors.items():
        path = directory / file_name
        file_layout = layout({name: (dtypes[name], shapes[name]) for name in names}, {"format": "pt"})
        with open(path, "xb") as file:
            file.write(file_layout.header)
            file.truncate(file_layout.size)
        places |= {name: (path, offset) for name, offset in file_layout.offsets.items()}
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2) + "\n"
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return places
