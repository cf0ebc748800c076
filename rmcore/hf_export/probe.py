"""Computes the engine's rewards for a few texts, which the parity check compares with the exported model's.

Input: the engine's model and the run's comparisons. Output: a `Probe` of texts and rewards.
Example: 4 comparisons of two answers -> 8 texts of token ids, 8 rewards.
"""

from typing import Any

import torch
from torch import nn

from rmcore.data.batches.batch import build_batch
from rmcore.data.tokens.comparisons import TokenizedComparisons
from rmcore.data.tokens.encoder import TextEncoder
from rmcore.data.tokens.templates import Template
from rmcore.hf_export.parity import Probe
from rmcore.model.selftest import trial_comparisons
from rmcore.scoring.rows import comparison_of, trial_rows
from rmcore.scoring.scorer import pack


@torch.no_grad()
def probe_of(
    model: nn.Module, data: TokenizedComparisons, device: torch.device, share: bool, precision: torch.dtype
) -> Probe:
    """The texts of the longest comparison of `data` and of a few others, with the rewards of `model`."""
    numbers, texts = _texts(data)
    batch = build_batch(data, numbers, share).on(device)
    was_training = model.training
    model.eval()
    rewards_A = model(batch).rewards_A
    model.train(was_training)
    return Probe(texts, rewards_A.tolist(), precision)


def probe_texts(data: TokenizedComparisons) -> list[list[int]]:
    """The token ids of the texts of `probe_of`, without their rewards."""
    return _texts(data)[1]


def built_in(template: Template, tokenizer: Any, positions: int | None) -> TokenizedComparisons:
    """Comparisons of built-in texts, from a few to some hundred words, rendered with a template."""
    encoder = TextEncoder(tokenizer)
    pairs = [template.render(comparison_of(row, template, where)[0])[1] for row, where in trial_rows()]
    return pack([[ids[:positions] for ids in encoder.encode(pair)] for pair in pairs])


def _texts(data: TokenizedComparisons) -> tuple[list[int], list[list[int]]]:
    numbers = trial_comparisons(data.tokens_N)
    items = [data.comparison(number) for number in numbers]
    return numbers, [item.text(answer).tolist() for item in items for answer in range(len(item.tails))]
