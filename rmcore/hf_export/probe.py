"""A few texts and the rewards that the engine gives them, to compare an export with."""

import torch
from torch import nn

from rmcore.data.batches.batch import build_batch
from rmcore.data.tokens.comparisons import TokenizedComparisons
from rmcore.hf_export.parity import Probe
from rmcore.model.selftest import trial_comparisons


@torch.no_grad()
def probe_of(
    model: nn.Module, data: TokenizedComparisons, device: torch.device, share: bool, precision: torch.dtype
) -> Probe:
    """The longest comparison of `data` and a few others, with the rewards that `model` gives them."""
    numbers = trial_comparisons(data.tokens_N)
    batch = build_batch(data, numbers, share).on(device)
    was_training = model.training
    model.eval()
    rewards_A = model(batch).rewards_A
    model.train(was_training)
    items = [data.comparison(number) for number in numbers]
    texts = [item.text(answer).tolist() for item in items for answer in range(len(item.tails))]
    return Probe(texts, rewards_A.tolist(), precision)
