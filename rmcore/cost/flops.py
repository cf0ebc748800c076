"""Counts the FLOPs of training, forward and backward.

Input: the sizes of a model and the means of a pair; or, for a model that is running, the mean length of its texts.
Output: FLOPs per pair, or per token.
Example: Pythia 2.8b and pairs of 227 computed tokens: 3.4 TFLOP per pair, 863 TFLOP per step of 256 pairs.
"""

from typing import Any

from rmcore.cost.data_size import DataSize
from rmcore.cost.dry_run import DryRun


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


def flops_of_pair(model: DryRun, data: DataSize) -> float:
    """Training FLOPs of a mean pair, without recompute.

    6 per token and matrix element (Kaplan et al., arXiv 2001.08361, section 2.1); 12 per visible pair of tokens, layer
    and unit of width. In the last layer all tokens need keys and values only; the rest runs on the scored tokens.
    """
    sizes = model.sizes
    attention = 12.0 * sizes.width * (sizes.layers - 1) * data.visible
    return 6.0 * data.tokens * (sizes.products + sizes.last) + attention


def recompute_share(recompute: str, model: DryRun, data: DataSize) -> float:
    """FLOPs that recompute adds, as a share of `flops_of_pair`: a forward (full, offload), attention's (selective), or
    none.
    """
    sizes = model.sizes
    attention = 4.0 * sizes.width * (sizes.layers - 1) * data.visible
    forward = attention + 2.0 * data.tokens * sizes.products
    again = {"none": 0.0, "selective": attention, "full": forward, "offload": forward}
    return again[recompute] / flops_of_pair(model, data)
