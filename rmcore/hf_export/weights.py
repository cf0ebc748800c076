"""Weights one by one into a model directory's safetensors files, without ever holding two of them.

Enters: names and shapes, then the tensors in any order. Leaves: model.safetensors, or numbered files of at most
SHARD_SIZE bytes with their index, as transformers writes and reads them. The place of every weight follows from the
shapes, so a header is written before the first weight is there.
Example: 13.5e9 bytes in bf16 -> model-00001-of-00003.safetensors to model-00003-of-00003.safetensors and
model.safetensors.index.json.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from rmcore.config import UserError

SHARD_SIZE = "5GB"  # of one file
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
CHUNK = 1 << 24  # elements that are converted at a time
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


class Place(NamedTuple):
    """Where a weight lies: its file, its first byte there, its shape."""

    file: str
    offset: int
    shape: tuple[int, ...]


def write_weights(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, torch.Tensor]],
    max_shard_size: str = SHARD_SIZE,
) -> None:
    """Write all weights, converted to `dtype`. Raises OSError; ValueError: a weight of another name or shape, or one
    that never came.
    """
    places = _begin(directory, shapes, dtype, in_bytes(max_shard_size))
    left = set(places)
    for name, tensor in tensors:
        place = places.get(name)
        if place is None or tuple(tensor.shape) != place.shape or name not in left:
            raise ValueError(f"weight {name} {tuple(tensor.shape)} came, {place and place.shape} was expected")
        left.remove(name)
        with open(directory / place.file, "r+b") as file:
            file.seek(place.offset)
            flat = tensor.reshape(-1)
            for start in range(0, flat.numel(), CHUNK):
                file.write(flat[start : start + CHUNK].to(dtype).view(torch.uint8).numpy().data)
    if left:
        raise ValueError(f"weight {min(left)} never came")


def in_bytes(size: str) -> int:
    """ "5GB" -> 5 * 10**9. Raises UserError."""
    number, unit = size[:-2], size[-2:].upper()
    if unit not in UNITS or not number.isdigit() or int(number) < 1:
        raise UserError(f"{size!r} is no size of a file: a whole number and KB, MB or GB, such as 5GB")
    return int(number) * UNITS[unit]


def _begin(directory: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, most: int) -> dict[str, Place]:
    """Make the files, with their headers, and the index where there are several."""
    size = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    groups: list[list[str]] = [[]]
    filled = 0
    for name in shapes:
        if groups[-1] and filled + size[name] > most:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size[name]
    places: dict[str, Place] = {}
    for number, names in enumerate(groups):
        several = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        file = several if len(groups) > 1 else "model.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            span = [offset, offset + size[name]]
            header[name] = {"dtype": NAMES[dtype], "shape": list(shapes[name]), "data_offsets": span}
            offset += size[name]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(directory / file, "xb") as handle:
            handle.write(struct.pack("<Q", len(text)) + text)
            start = handle.tell()
            os.ftruncate(handle.fileno(), start + offset)
        for name in names:
            places[name] = Place(file, start + header[name]["data_offsets"][0], tuple(shapes[name]))  # type: ignore[index]
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": {n: p.file for n, p in places.items()}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return places
