"""Builds AdamW, and computes the learning rates as pure functions of the step.

Input: the config, named parameters, a step.
Output: an optimizer; the learning rates of a step.
Example: lr 1e-4, linear, 2 warm-up steps of 10 -> 0, 5e-5, 1e-4, 8.75e-5, ..., 1.25e-5 at steps 0, 1, 2, 3, ..., 9.
With head_lr 1e-3 the score head's rate is ten times that at every step.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from rmcore.config import Config
from rmcore.config.optim import OptimConfig
from rmcore.parallel.adamw import AdamW
from rmcore.parallel.strategy import local

HEAD = "score."  # the names of the score head's parameters begin with this


def learning_rate(config: OptimConfig, step: int, steps: int, peak: float | None = None) -> float:
    """The learning rate of step `step` (0 based) of a run of `steps`, as transformers' schedules of the same names.

    The decay ends one step after the last, over the whole run, whatever the number of epochs. `wsd`: Hu et al., arXiv
    2404.06395, with the linear decay of Hägele et al., arXiv 2405.18392.

    Args:
        peak: optim.lr if None.
    """
    peak = config.lr if peak is None else peak
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return peak * step / warmup
    if config.schedule == "constant":
        return peak
    begin = warmup if config.schedule != "wsd" else max(warmup, steps - math.ceil(config.decay_ratio * steps))
    progress = min(1.0, max(0.0, (step - begin) / max(1, steps - begin)))
    left = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
    return peak * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left) if config.min_lr_ratio else peak * left


def set_learning_rates(
    optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, steps: int
) -> dict[str, float]:
    """Set the rates of every group for a step, and return them by their names in the log."""
    rates = {"train/rm/lr": learning_rate(config, step, steps)}
    if config.head_lr is not None:
        rates["train/rm/head_lr"] = learning_rate(config, step, steps, config.head_lr)
    for group in optimizer.param_groups:
        group["lr"] = rates["train/rm/head_lr" if group.get("head") else "train/rm/lr"]
    return rates


def parameter_groups(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> list[dict[str, Any]]:
    """The trained parameters in groups: with optim.head_lr the score head by itself; with optim.weight_decay the
    matrices apart from the vectors (norms, biases), which do not decay, as is usual. Without both: one group.
    """
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    head = [p for name, p in trained.items() if name.startswith(HEAD)] if config.head_lr is not None else []
    of_head = set(map(id, head))
    groups = _decaying([p for p in trained.values() if id(p) not in of_head], config)
    return groups + [{**group, "head": True} for group in _decaying(head, config)]


def _decaying(parameters: list[nn.Parameter], config: OptimConfig) -> list[dict[str, Any]]:
    if config.weight_decay == 0:
        groups = [{"params": parameters, "weight_decay": 0.0}]
    else:
        matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw_arguments(config: OptimConfig) -> dict[str, Any]:
    """Arguments of every AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""
    return {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}


def adamw_class(
    config: Config, parameters: Mapping[str, nn.Parameter], of_torch: type[torch.optim.AdamW] = torch.optim.AdamW
) -> Callable[..., torch.optim.Optimizer]:
    """torch's AdamW, whose fused kernel reads each tensor once; or rmcore's, where something is not stored in fp32.

    parameters: all of the model, under the names that they have under every strategy.
    """
    if config.optim.states == "fp32" and not config.model.trains_bf16:
        return partial(of_torch, fused=True)
    names = {parameter: name for name, parameter in parameters.items()}
    return partial(AdamW, names=names, states=config.optim.states, seed=config.run.seed)


def trained_dtype(config: Config) -> torch.dtype:
    """The dtype of the weights that the optimizer updates."""
    return torch.bfloat16 if config.model.trains_bf16 else torch.float32


def trained_in_bf16(model: nn.Module) -> None:
    """Make bf16 weights of fp32 ones, one after the other; buffers keep their dtype, and gradients will be fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


class LocalAdamW(torch.optim.AdamW):
    """AdamW for DTensors, whose kernel gets what this rank holds of them. The state is made of DTensors as before.

    AdamW works element by element, so the result is the same. The host saves the dispatch of DTensors: 3.3 in place of
    7.7 ms for 300 parameters on an EPYC.
    """

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [local(tensor) for tensor in tensors]
        return has_complex
