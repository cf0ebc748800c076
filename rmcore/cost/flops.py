"""FLOPs of training, and the peaks of devices."""

from __future__ import annotations

from typing import Any

import torch

from rmcore.cost.data_size import DataFigures
from rmcore.cost.dry_run import DryRun

# Dense bf16 matrix peak in FLOP/s, from NVIDIA's data sheets (without sparsity). First match wins.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "A100": 312e12,
}


def device_peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None where no data sheet figure is known here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if all(word in name for word in part.split())), None)


def model_flops_per_token(config: Any, matmul_parameters: int, mean_length: float) -> float:
    """Training FLOPs of one token, forward and backward: 6 N + 6 L D S.

    Args:
        config: the Hugging Face model config (num_hidden_layers, hidden_size, and where present num_attention_heads,
            head_dim).
        matmul_parameters: N, the parameters that a token is multiplied with (no embedding table).
        mean_length: S, mean length of a sequence in tokens. A token attends to S / 2 others on average, which halves
            the 12 L D S of the full square.
    Source: Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), appendix B, with the causal half of attention only.
    """
    heads = getattr(config, "num_attention_heads", 1)
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 6.0 * matmul_parameters + 6.0 * config.num_hidden_layers * heads * head_width * mean_length


def flops_of_pair(model: DryRun, data: DataFigures) -> float:
    """Training FLOPs of a mean pair, without recompute."""
    sizes = model.sizes
    attention = 12.0 * sizes.width * (sizes.layers - 1) * data.visible
    return 6.0 * data.tokens * (sizes.products + sizes.last) + attention


def extra_of(recompute: str, model: DryRun, data: DataFigures) -> float:
    """FLOPs that recompute adds, as a share of the training FLOPs."""
    sizes = model.sizes
    attention = 4.0 * sizes.width * (sizes.layers - 1) * data.visible
    again = {"none": 0.0, "selective": attention, "full": attention + 2.0 * data.tokens * sizes.products}
    return again[recompute] / flops_of_pair(model, data)
