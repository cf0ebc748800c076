"""Puts the scans of `rmcore.model.recurrent.scans` in the place of the functions that transformers' layers call.

Input: a backbone. Output: None; from then on its recurrent layers read `current_layout()`.
Example: Qwen3.5's layers call `torch_chunk_gated_delta_rule`, a function of transformers' modeling_qwen3_5. Within a
packed forward that name runs `delta_rule`, anywhere else the function itself.
"""

import functools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rmcore.config import UserError
from rmcore.data.batches.batch import AttentionLayout
from rmcore.model.layout_context import current_layout, current_part, packed_layout
from rmcore.model.recurrent import scans
from rmcore.model.recurrent.pieces import arrange, restore, window_of

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": scans.causal_conv,
    "torch_chunk_gated_delta_rule": scans.delta_rule,
    "chunk_gated_delta_rule": scans.delta_rule,  # its name in flash-linear-attention
    "chunk_kimi_delta_attention": scans.delta_rule,
    "mamba_selective_scan": scans.selective_scan,
    "mamba_inner_fn": scans.fused_layer,
    "mamba2_chunk_scan": scans.chunk_scan,
    "mamba2_split_conv1d_scan_combined": scans.fused_layer,
    "rwkv_linear_attention": scans.wkv,
}
METHODS: dict[tuple[str, str], Callable[..., Any]] = {
    ("RecurrentGemmaRglru", "_rnn_scan"): scans.linear_recurrence,
    ("xLSTMBackend", "forward"): scans.mlstm,
    ("MiniMaxLightningAttention", "forward"): scans.lightning_attention,
}


def substitute_scans(backbone: nn.Module) -> None:
    """Replace what the recurrent layers of `backbone` call.

    Outside a packed forward they call what they called; on the CPU, transformers' PyTorch functions in any case.
    """
    kinds = {type(module) for module in backbone.modules()}
    for namespace in {sys.modules[kind.__module__] for kind in kinds}:
        for name in FUNCTIONS.keys() & vars(namespace).keys():
            _substitute(namespace, name, FUNCTIONS[name])
    for module in backbone.modules():  # older versions of transformers keep some as attributes
        for name, value in list(vars(module).items()):
            if (function := getattr(value, "__name__", None)) in FUNCTIONS:
                _substitute(module, name, FUNCTIONS[function])
    for kind in kinds:
        for (owner, name), scan in METHODS.items():
            if kind.__name__ == owner:
                _substitute(kind, name, scan)
    _watch_windows(backbone)


def _substitute(owner: Any, name: str, scan: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if hasattr(original, "rmcore_original"):
        return
    in_pytorch = scans.reference(original)

    scan = torch.compiler.disable(scan)  # its calls depend on lengths that change with every batch

    @functools.wraps(original)
    def chosen(*arguments: Any, **keywords: Any) -> Any:
        rows = next((value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor)), None)
        function = original if rows is None or scans.runs_kernels(rows) else in_pytorch
        layout = _whole_layout()
        if layout is None:
            return function(*arguments, **keywords)
        with packed_layout(None):  # what the scan calls computes batches, which are not packed rows
            return scan(function, layout, *arguments, **keywords)

    chosen.rmcore_original = original  # type: ignore[attr-defined]
    setattr(owner, name, chosen)


def _whole_layout() -> AttentionLayout | None:
    """The layout of the packed row. Raises UserError if ranks have parts of it: a state runs along the whole text."""
    if current_part() is not None:
        raise UserError(
            "parallel.context: this model has recurrent layers, whose state runs along the text and is not split over "
            "ranks; set parallel.context=1"
        )
    return current_layout()


def _watch_windows(backbone: nn.Module) -> None:
    """Put hooks on the modules that look back over a few tokens, for the layers that call them as modules."""
    for module in backbone.modules():
        if type(module) is nn.Conv1d and module.groups == module.in_channels > 1:
            (width,), tokens = module.kernel_size, 2  # [1, D, T]
            causal = module.padding == (width - 1,) and module.stride == module.dilation == (1,)
        else:
            width, tokens = 2, 1  # RWKV's shift by one token, [1, T, D]
            causal = isinstance(module, nn.ZeroPad2d) and module.padding == (0, 0, 1, -1)
        if causal and not hasattr(module, "rmcore_window"):
            setattr(module, "rmcore_window", width)  # noqa: B010 (an int, not a module)
            module.register_forward_pre_hook(partial(_widen, width, tokens))
            module.register_forward_hook(partial(_narrow, width, tokens))


@torch.compiler.disable
def _widen(width: int, tokens: int, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor] | None:
    layout, rows = _whole_layout(), arguments[0]
    if layout is None:
        return None
    places = window_of(layout, width, rows.device)
    return (arrange(rows.movedim(tokens, 0), places).movedim(0, tokens),)


@torch.compiler.disable
def _narrow(width: int, tokens: int, module: nn.Module, arguments: tuple, output: Tensor) -> Tensor | None:
    layout = current_layout()
    if layout is None:
        return None
    places = window_of(layout, width, output.device)
    rows = output.movedim(tokens, 0)[: len(places.source_N)]  # a convolution pads on the right, too
    return restore(rows, places).movedim(0, tokens)
