"""Computes the matrix products of the linear layers in FP8, by torchao: `parallel.fp8=true`.

Input: a decoder whose weights are fp32 masters. Output: the same modules and parameter names. For their products, the
linear layers now round inputs and weights to e4m3 and gradients to e5m2, with one scale per tensor that is computed
at each use; they return bf16.
Example: a decoder of 24 layers with 7 linear layers each -> 23 * 7 = 161 of them in FP8.

Three things stay as they are. The score head and the embeddings are not part of a decoder layer. The last decoder layer
runs on the scored tokens only, which are too few for FP8 to be faster, and it has hooks that a new module would lose.
Layers whose widths are not multiples of 16 cannot use the GPU's FP8 products; torchao pads the number of tokens to such
a multiple itself (`pad_inner_dim`). torchao is imported only when this option is set.
"""

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import nn

from rmcore.config import UserError
from rmcore.model.backbone import decoder_layers

MULTIPLE = 16  # torch._scaled_mm needs both widths of a layer to be multiples of this
CAPABILITY = (8, 9)  # compute capability of the first GPUs with FP8 products (Ada, then Hopper)


def check_fp8(device: torch.device) -> None:
    """Raises UserError unless this machine can train with `parallel.fp8`."""
    if find_spec("torchao") is None:
        raise UserError("parallel.fp8=true needs torchao, which is not installed: pip install 'rmcore[fp8]'")
    if device.type != "cuda":
        raise UserError(
            "parallel.fp8=true needs a GPU with FP8 products; this run is on the CPU: set parallel.fp8=false"
        )
    if (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        name, wanted = torch.cuda.get_device_name(device), ".".join(map(str, CAPABILITY))
        raise UserError(
            f"parallel.fp8=true needs compute capability {wanted} or more; {name} has {found[0]}.{found[1]}: "
            "set parallel.fp8=false"
        )


def use_fp8(backbone: nn.Module, *, emulate: bool = False) -> int:
    """Convert the linear layers of all decoder layers except the last; returns the number of converted layers.

    emulate: round to FP8 but multiply in full precision, which works on any device (for tests).
    """
    float8 = import_module("torchao.float8")
    config = float8.Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    for layer in decoder_layers(backbone)[:-1]:
        float8.convert_to_float8_training(layer, config=config, module_filter_fn=fits)
    return sum(type(module).__name__ == "Float8Linear" for module in backbone.modules())


def fits(module: nn.Module, name: str) -> bool:
    """Whether a module is a linear layer whose widths allow FP8 products; `name` is part of torchao's interface."""
    return isinstance(module, nn.Linear) and module.in_features % MULTIPLE == module.out_features % MULTIPLE == 0
