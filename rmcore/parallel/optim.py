"""Builds AdamW, and computes the learning rate as a pure function of the step.

Input: the config, parameters by name, a step.
Output: an optimizer; a learning rate.
Example: lr 1e-4, linear, 2 warm-up steps of 10 -> 0, 5e-5, 1e-4, 8.75e-5, ..., 1.25e-5 at steps 0, 1, 2, 3, ..., 9.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from rmcore.config import Config
from rmcore.config.schema import OptimConfig
from rmcore.parallel.adamw import AdamW


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
    """Arguments of every AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""
    return {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}


def adamw_class(config: Config, parameters: Mapping[str, nn.Parameter]) -> Callable[..., torch.optim.Optimizer]:
    """torch's AdamW, whose fused kernel reads each tensor once; or rmcore's, where something is not stored in fp32.

    parameters: all of the model, under the names that they have under every strategy.
    """
    if config.optim.states == "fp32" and not config.model.trains_bf16:
        return partial(torch.optim.AdamW, fused=True)
    names = {parameter: name for name, parameter in parameters.items()}
    return partial(AdamW, names=names, states=config.optim.states, seed=config.run.seed)


def trained_dtype(config: Config) -> torch.dtype:
    """The dtype of the weights that the optimizer updates."""
    return torch.bfloat16 if config.model.trains_bf16 else torch.float32


def trained_in_bf16(model: nn.Module) -> None:
    """Make bf16 weights of fp32 ones, one after the other; buffers keep their dtype, and gradients will be fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
