"""Compiles the decoder layers with torch.compile, for any number of tokens, and with recompute inside.

Input: a decoder, and what the backward computes again (`none`, `selective`, `full`).
Output: layers whose forward is compiled; the last one is not, because it runs on other shapes (rmcore.model.pruning).
Example: the 23 equal layers of a 1.4b GPT-NeoX share one compilation: one graph per direction, also for later batches.

Two things keep a layer in one graph. The layout of the packed row is an argument of what is compiled, because the
compiler cannot read a context variable. And the recompute is inside: around a compiled layer, selective recompute does
not see the products and would compute everything again.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from rmcore.model.backbone import decoder_layers, keep_products, recompute_activations
from rmcore.model.cpu_layers import without_cpu_ops
from rmcore.model.layout_context import Layout, current, traced_layout


def compile_layers(backbone: PreTrainedModel, recompute: str = "none", **options: Any) -> None:
    """Compile each decoder layer except the last, with `recompute` inside.

    options: arguments of torch.compile. Hooks of the layers stay outside, those of FSDP2 included.
    """
    compiled = torch.compile(_forward, dynamic=True, **options)
    for layer in decoder_layers(backbone)[:-1]:
        without_cpu_ops(layer)
        layer.forward = partial(_call, compiled, layer, recompute)


def speed_up(backbone: PreTrainedModel, *, recompute: str, compiled: bool) -> None:
    """Put recompute on the layers of a decoder, and compile them if `compiled`."""
    if compiled:
        compile_layers(backbone, recompute)
    else:
        recompute_activations(backbone, recompute)


def _call(compiled: Any, layer: nn.Module, recompute: str, *arguments: Any, **keywords: Any) -> Any:
    again = recompute if layer.training and torch.is_grad_enabled() else "none"
    return compiled(layer, current(), again, arguments, keywords)


def _forward(layer: nn.Module, layout: Layout, recompute: str, arguments: Any, keywords: Any) -> Any:
    """What is compiled: the layer's own forward. It reads the layout through `rmcore.model.layout_context`."""

    def forward(*inputs: Any) -> Any:
        return type(layer).forward(layer, *inputs, **keywords)

    traced_layout(layout)
    if recompute == "none":
        out = forward(*arguments)
    elif recompute == "selective":
        keep = partial(create_selective_checkpoint_contexts, keep_products)
        out = checkpoint(forward, *arguments, use_reentrant=False, context_fn=keep)
    else:
        out = checkpoint(forward, *arguments, use_reentrant=False)
    traced_layout(None)
    return out
