"""Numbers in 8 or 4 bits, in blocks with one fp32 scale each, by bitsandbytes (extra `bitsandbytes`).

Input: a tensor; or codes and scales. Output: codes and scales; or the tensor that they stand for.
Example: `functional().create_dynamic_map(signed=True)` are the 256 values of the 8-bit codes, from -1 to 1.

bitsandbytes is imported only when something is stored in these formats. Importing it makes its operators known to torch
(`torch.ops.bitsandbytes`); it has them for CUDA, ROCm, XPU and the CPU.
"""

import logging
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from rmcore.config import UserError


def check_bitsandbytes(key: str) -> None:
    """Raises UserError if bitsandbytes, which the setting `key` needs, is not installed."""
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{key} needs bitsandbytes, which is not installed: pip install 'rmcore[bitsandbytes]'")


def functional() -> ModuleType:
    """`bitsandbytes.functional`. Its import warns of a kernel for inference that rmcore does not use: not shown."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    return import_module("bitsandbytes.functional")
