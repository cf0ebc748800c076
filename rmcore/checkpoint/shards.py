"""One file per rank: slices of tensors as safetensors, hashed while they are written; and the reading of slices.

Input: (key, first element, host tensor [n]) of each slice. Output: a file that any safetensors reader opens, whose keys
are `KEY@FIRST`, and its size and xxh3_128.
Example: `exp_avg/score.weight@64`, F32 [64], is the second half of a tensor of 128 elements.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rmcore.host.faults import fault
from rmcore.host.safetensors_file import CHUNK, chunks, layout


class Damaged(Exception):
    """A checkpoint that differs from what was written; the message says how."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and xxh3_128 (hex) of a file."""

    bytes: int
    xxh3_128: str


def write_shard(path: Path, slices: Sequence[tuple[str, int, Tensor]]) -> FileRecord:
    """Write a new file and bring it to the disk (fsync). Raises OSError: it exists, or the disk is full or broken."""
    tensors = {f"{key}@{first}": tensor for key, first, tensor in slices}
    header = layout({name: (tensor.dtype, [tensor.numel()]) for name, tensor in tensors.items()}).header

    def content() -> Iterator[memoryview]:
        yield memoryview(header)
        for tensor in tensors.values():
            yield from chunks(tensor)

    digest, size = xxhash.xxh3_128(), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with open(handle, "wb", buffering=0) as file:
        for chunk in content():
            fault("save.write")
            digest.update(chunk)
            written = 0
            while written < len(chunk):  # a raw write may take less than it is given
                written += file.write(chunk[written:])
            size += len(chunk)
        fault("save.sync")
        os.fsync(handle)
    return FileRecord(size, digest.hexdigest())


def hash_file(path: Path) -> FileRecord:
    """Size and hash of a file on the disk. Raises OSError."""
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
        Damaged: a file cannot be read, or an element of a wanted tensor is in none of them.
    """
    missing = {key: tensor.numel() for key, (_, tensor) in wanted.items()}
    left = sum(missing.values())
    for path in paths:
        if not left:
            return
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                    key, _, first = name.rpartition("@")
                    if key in wanted:
                        found = _fill(*wanted[key], int(first), file, name)
                        missing[key] -= found
                        left -= found
        except (OSError, SafetensorError, ValueError) as error:
            raise Damaged(f"{path.name}: {error}") from error
    if left:
        key = next(key for key, count in missing.items() if count)
        raise Damaged(f"{key}: {missing[key]} elements are in no file")


def _fill(start: int, tensor: Tensor, first: int, file: safe_open, name: str) -> int:
    """Copy the common part of the slice `name` (from element `first` on) and `tensor` (from `start` on); its length."""
    stored = file.get_slice(name)
    begin = max(start, first)
    end = min(start + tensor.numel(), first + stored.get_shape()[0])
    if begin >= end:
        return 0
    tensor[begin - start : end - start].copy_(stored[begin - first : end - first])
    return end - begin
