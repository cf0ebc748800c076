"""Numbers in 8 or 4 bits, in blocks with one fp32 scale each, by bitsandbytes (extra `bitsandbytes`).

Input: a tensor; or codes and scales. Output: codes and scales; or the tensor that they stand for.
Example: `functional().create_dynamic_map(signed=True)` are the 256 values of the 8-bit codes, from -1 to 1.

bitsandbytes is imported only when something is stored in these formats. Importing it makes its operators known to torch
(`torch.ops.bitsandbytes`); it has them for CUDA, ROCm, XPU and the CPU.
"""

import logging
import math
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from rmcore.config import UserError

INT8_BLOCK, NF4_BLOCK = 256, 64  # elements of a weight with one scale: 8.1 and 4.5 bits per element


def check_bitsandbytes(key: str) -> None:
    """Raises UserError if bitsandbytes, which the setting `key` needs, is not installed."""
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{key} needs bitsandbytes, which is not installed: pip install 'rmcore[bitsandbytes]'")


def functional() -> ModuleType:
    """`bitsandbytes.functional`. Its import warns of a kernel for inference that rmcore does not use: not shown."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    return import_module("bitsandbytes.functional")


def stored_as(kind: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a weight. Kinds: bf16 (the codes are the numbers, there are no scales), int8, nf4.

    The codes are flat. int8 has one byte per element; nf4 one for two elements. Quantise on the CPU: other devices may
    choose another code for a number halfway between two of them.
    """
    flat = weight.detach().float().contiguous().flatten()
    if kind == "bf16":
        return flat.to(torch.bfloat16), flat.new_empty(0)
    functional()
    if kind == "int8":
        codes, scale = torch.ops.bitsandbytes.quantize_blockwise(flat, _table(flat.device), INT8_BLOCK)
    else:
        codes, scale = torch.ops.bitsandbytes.quantize_4bit(flat, NF4_BLOCK, kind, torch.uint8)
    return codes.flatten(), scale


def restored(codes: Tensor, scale: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The numbers that codes and scales of `stored_as` stand for."""
    if codes.dtype == torch.bfloat16:
        return codes.view(shape).to(dtype)
    functional()
    if codes.numel() == math.prod(shape):
        table = _table(codes.device)
        return torch.ops.bitsandbytes.dequantize_blockwise(codes, scale, table, INT8_BLOCK, dtype).view(shape)
    # As one row of an even length: for other shapes bitsandbytes has slower code on the CPU.
    row = [2 * codes.numel()]
    numbers = torch.ops.bitsandbytes.dequantize_4bit(codes.view(-1, 1), scale, NF4_BLOCK, "nf4", row, dtype)
    return numbers.view(-1)[: math.prod(shape)].view(shape)


@cache
def _table(device: torch.device) -> Tensor:
    """The values of the 256 codes of int8, relative to the scale of their block."""
    table: Tensor = functional().create_dynamic_map(signed=True).to(device)
    return table
