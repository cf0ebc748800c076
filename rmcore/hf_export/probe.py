"""Computes the engine's rewards for a few texts, which the parity check compares with the exported model's.

Input: the engine's model and the run's comparisons. Output: a `Probe` of texts and rewards.
Example: 4 comparisons of two answers -> 8 texts of token ids, 8 rewards.
"""

from typing import Any

import torch
from torch import nn

from rmcore.data.batches.batch import Comparisons, build_batch
from rmcore.data.tokens.comparisons import TokenizedComparisons
from rmcore.data.tokens.encoder import TextEncoder
from rmcore.data.tokens.templates import Template
from rmcore.hf_export.parity import Probe
from rmcore.model.reward_model import computes_alone
from rmcore.model.selftest import BEYOND_LONGEST, Shortened, trial_comparisons
from rmcore.scoring.rows import comparison_of, trial_rows
from rmcore.scoring.scorer import pack


@torch.no_grad()
def probe_of(
    model: nn.Module,
    data: TokenizedComparisons,
    device: torch.device,
    share: bool,
    precision: torch.dtype,
    multiple: int = 1,
    *,
    logits: bool = False,
) -> Probe:
    """The texts of the longest comparison of `data` and of a few others, with the outputs of `model`.

    multiple: ranks that compute a row together; the texts are then cut to what one rank computes with ease.
    logits: of the language-model head, too.
    """
    numbers = trial_comparisons(data.tokens_N)
    comparisons = data if multiple == 1 else Shortened(data, BEYOND_LONGEST)
    texts = _texts(comparisons, numbers)
    batch = build_batch(comparisons, numbers, share, multiple=multiple).on(device)
    was_training = model.training
    model.eval()
    output = model(batch, logits=True) if logits else model(batch)
    model.train(was_training)
    logits_AV = output.logits_AV.cpu() if logits else None
    return Probe(texts, output.outputs_AK.flatten().tolist(), precision, computes_alone(model), logits_AV)


def probe_texts(data: TokenizedComparisons) -> list[list[int]]:
    """The token ids of the texts of `probe_of`, without their rewards."""
    return _texts(data, trial_comparisons(data.tokens_N))


def built_in(template: Template, tokenizer: Any, positions: int | None) -> TokenizedComparisons:
    """Comparisons of built-in texts, from a few to some hundred words, rendered with a template."""
    encoder = TextEncoder(tokenizer)
    pairs = [template.render(comparison_of(row, template, where)[0])[1] for row, where in trial_rows()]
    return pack([[ids[:positions] for ids in encoder.encode(pair)] for pair in pairs])


def _texts(data: Comparisons, numbers: list[int]) -> list[list[int]]:
    items = [data.comparison(number) for number in numbers]
    return [item.text(answer).tolist() for item in items for answer in range(len(item.tails))]
