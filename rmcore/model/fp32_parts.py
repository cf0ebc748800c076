"""The weights that transformers keeps in fp32 where it loads the others in bf16: those of routers, gates, sinks.

Input: a model that contains a decoder of transformers.
Output: the names of these weights, and the modules that hold no others.
Example: DeepSeek V3's `mlp.gate`, since transformers 5.24. With weights or products in bf16 it can send tokens to
other experts than the exported model does. Inkling 2's router cannot compute with bf16 weights at all.

The classes of transformers list them in `_keep_in_fp32_modules_strict`. In training with bf16 these modules compute
without autocast, FSDP gathers them in fp32, and these weights have no bf16 copies. A weight that shares its module with
others, such as the sinks of an attention, is gathered in bf16 under FSDP.
"""

import functools
import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def kept_in_fp32(model: nn.Module) -> set[str]:
    """The names of these weights in `model`."""
    names: set[str] = set()
    for place, module in model.named_modules():
        # transformers searches for these patterns, in which * stands for anything, in the names of weights.
        patterns = module._keep_in_fp32_modules_strict if isinstance(module, PreTrainedModel) else None
        if patterns:
            kept = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns))
            own = {name for name, _ in module.named_parameters() if kept.search(name)}
            names |= {f"{place}.{name}" if place else name for name in own}
    return names


def fp32_modules(model: nn.Module) -> list[nn.Module]:
    """The largest modules with a forward that hold such weights only, without convolutions: scans read their weights
    from outside, where FSDP would not have gathered them.
    """
    kept = kept_in_fp32(model)
    weights = {parameter for name, parameter in model.named_parameters() if name in kept}
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        own = set(module.parameters())
        if own and own <= weights and not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Conv1d):
            found.append(module)
        elif own & weights:
            for child in module.children():
                look(child)

    look(model)
    return found


def compute_in_fp32(model: nn.Module) -> None:
    """Let these modules compute without autocast, as they do where transformers has loaded the model in bf16."""
    for module in fp32_modules(model):
        if "forward" not in vars(module):  # else it computes by an op that takes fp32 only
            module.forward = functools.partial(_without_autocast, module)


def _without_autocast(module: nn.Module, *inputs: Any, **named: Any) -> Any:
    device = next(module.parameters()).device
    with torch.autocast(device.type, enabled=False):
        return type(module).forward(module, *inputs, **named)
