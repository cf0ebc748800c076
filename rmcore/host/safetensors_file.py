"""The safetensors format, written by hand: the header of a file, and the bytes of its tensors.

Input: names, dtypes and shapes, in the order in which the tensors lie in the file. Output: a `Layout`, from which a
writer can write the header before it has any tensor, and then the tensors in any order, one at a time.
Example: {"a": (fp32, [2]), "b": (bf16, [3])} -> a header of 136 bytes, `a` from byte 136, `b` from byte 144, and a
file of 150 bytes.

A file is the length of its header (8 bytes, little endian), the header (JSON, filled up with spaces to a multiple of 8)
and the bytes of the tensors: https://github.com/huggingface/safetensors#format. The library's own writer takes all
tensors at once, neither hashes nor syncs, and gives its files the mode 0600 whatever the umask; so rmcore writes files
here and reads them with the library.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 16 << 20  # bytes that are converted, hashed and written at a time
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.uint8: "U8"}


class Layout(NamedTuple):
    """Where everything lies in a file; all numbers are bytes from its beginning."""

    header: bytes
    offsets: dict[str, int]
    size: int


def layout(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> Layout:
    """The layout of a file with these tensors, in this order. `metadata` is stored under `__metadata__`."""
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    starts: dict[str, int] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return Layout(header, {name: len(header) + start for name, start in starts.items()}, len(header) + end)


def chunks(tensor: Tensor, dtype: torch.dtype | None = None) -> Iterator[memoryview]:
    """The bytes of a CPU tensor, at most CHUNK at a time, converted to `dtype` where one is given."""
    dtype = dtype or tensor.dtype
    flat, step = tensor.reshape(-1), CHUNK // dtype.itemsize
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step].to(dtype).view(torch.uint8).numpy().data
