"""AdamW's parameter groups, and the learning rate as a pure function of the step.

Input: the section `optim`, parameters, a step.
Output: groups and arguments for AdamW; a learning rate.
Example: lr 1e-4, linear, 2 warm-up steps of 10 -> 0, 5e-5, 1e-4, 8.75e-5, ..., 1.25e-5 at steps 0, 1, 2, 3, ..., 9.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from rmcore.config.schema import OptimConfig
from rmcore.parallel.strategy import local


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` (0 based) of a run of `steps`, as transformers' schedules of the same names.

    The decay reaches zero one step after the last, over the whole run, whatever the number of epochs.
    """
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.schedule == "linear":
        return config.lr * max(0.0, 1.0 - progress)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def parameter_groups(parameters: Iterable[nn.Parameter], config: OptimConfig) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for vectors (norms, biases), as is usual. Without weight decay: one group."""
    trained = [p for p in parameters if p.requires_grad]
    if config.weight_decay == 0:
        return [{"params": trained, "weight_decay": 0.0}]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw_arguments(config: OptimConfig) -> dict[str, Any]:
    """Arguments of AdamW (Loshchilov and Hutter, arXiv 1711.05101). The fused kernel reads each tensor once."""
    return {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps, "fused": True}


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
