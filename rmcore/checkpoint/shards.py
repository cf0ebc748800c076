"""One file a rank: slices of tensors as safetensors, hashed while they are written; and reading what is needed of them.

Enters: (key, first element, host tensor [n]) of each slice. Leaves: a file that any safetensors reader opens, whose
keys are `KEY@FIRST`, its size and its xxh3_128. Example: `exp_avg/score.weight@64`, F32 [64], is the second half of a
tensor of 128.

safetensors' own writer neither syncs nor hashes, and its files are 0600 whatever the umask; the format is a length (8
bytes), a JSON header and the bytes (https://github.com/huggingface/safetensors#format), so it is written here, and read
by the library.
"""

import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rmcore.host.faults import fault

CHUNK = 16 << 20  # bytes hashed and written at a time
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class Damaged(Exception):
    """A checkpoint that is not what was written; the message says what is wrong with it."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and xxh3_128 (hex) of a file."""

    bytes: int
    xxh3_128: str


def write_shard(path: Path, slices: Sequence[tuple[str, int, Tensor]]) -> FileRecord:
    """Write a new file and bring it to the disk. Raises OSError: it exists, or the disk is full or broken."""
    header: dict[str, dict[str, object]] = {}
    offset = 0
    for key, first, tensor in slices:
        where = [offset, offset + tensor.nbytes]
        header[f"{key}@{first}"] = {"dtype": DTYPES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": where}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = xxhash.xxh3_128(), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with open(handle, "wb", buffering=0) as file:
        for chunk in _chunks(struct.pack("<Q", len(text)) + text, slices):
            fault("save.write")
            digest.update(chunk)
            written = 0
            while written < len(chunk):  # a raw write may take less than it is given
                written += file.write(chunk[written:])
            size += len(chunk)
        fault("save.sync")
        os.fsync(handle)
    return FileRecord(size, digest.hexdigest())


def _chunks(header: bytes, slices: Sequence[tuple[str, int, Tensor]]) -> Iterator[memoryview]:
    yield memoryview(header)
    for _, _, tensor in slices:
        view = tensor.view(torch.uint8).numpy().data
        for start in range(0, len(view), CHUNK):
            yield view[start : start + CHUNK]


def hash_file(path: Path) -> FileRecord:
    """Size and hash of a file as it lies on the disk. Raises OSError."""
    digest, size = xxhash.xxh3_128(), 0
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(view):
            digest.update(view[:count])
            size += count
    return FileRecord(size, digest.hexdigest())


def read_slices(paths: Sequence[Path], wanted: dict[str, tuple[int, Tensor]]) -> None:
    """Fill tensors from files, in the order given, until everything is found; the other files are not opened.

    Args:
        wanted: key -> (first element, [n] tensor to fill, on any device).
    Raises:
        Damaged: a file cannot be read, or an element of what is wanted is in none of them.
    """
    lacking = {key: tensor.numel() for key, (_, tensor) in wanted.items()}
    left = sum(lacking.values())
    for path in paths:
        if not left:
            return
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                    key, _, first = name.rpartition("@")
                    if key in wanted:
                        found = _fill(*wanted[key], int(first), file, name)
                        lacking[key] -= found
                        left -= found
        except (OSError, SafetensorError, ValueError) as error:
            raise Damaged(f"{path.name}: {error}") from error
    if left:
        key = next(key for key, count in lacking.items() if count)
        raise Damaged(f"{key}: {lacking[key]} elements are in no file")


def _fill(start: int, tensor: Tensor, first: int, file: safe_open, name: str) -> int:
    """Copy what the slice `name`, which begins at `first`, has of `tensor`, which begins at `start`; says how much."""
    stored = file.get_slice(name)
    begin = max(start, first)
    end = min(start + tensor.numel(), first + stored.get_shape()[0])
    if begin >= end:
        return 0
    tensor[begin - start : end - start].copy_(stored[begin - first : end - first])
    return end - begin
