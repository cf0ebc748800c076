"""FLOPs of a pair compared with those that torch counts."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, GPTNeoXConfig

from rmcore.cost.data_size import DataSize
from rmcore.cost.dry_run import DryRun
from rmcore.cost.flops import flops_of_pair
from rmcore.data.batches.batch import build_batch
from rmcore.data.tokens.comparisons import TokenizedComparison
from rmcore.model.reward_model import SHARED, RewardModel


class Rows:
    """Comparisons of a prompt of 400 tokens and two answers of 200."""

    def comparison(self, number: int) -> TokenizedComparison:
        one = np.ones(1, dtype=np.float32)
        tail = np.full(200, 3, dtype=np.int32)
        return TokenizedComparison(
            prefix=np.full(400, 2, dtype=np.int32),
            tails=[tail, tail],
            pairs=np.array([[0, 1]]),
            margin=0 * one,
            weight=one,
            ties=np.zeros((0, 2), dtype=np.int64),
            tie_weight=one[:0],
            score=np.zeros(2),
        )


def test_flops_are_those_that_torch_counts() -> None:
    """Torch does not count the attention op, so none is visible here. The scored rows of the last layer (one in 400)
    are not in the prediction.
    """
    shape = GPTNeoXConfig(
        vocab_size=64,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=384,
        num_labels=1,
        pad_token_id=1,
    )
    hf_model = AutoModelForSequenceClassification.from_config(shape, dtype=torch.float32)
    model = RewardModel(hf_model.base_model, hf_model.score, pad_token_id=1)
    model.use(SHARED, pruned=True)
    counter = FlopCounterMode(display=False)
    with counter:
        model(build_batch(Rows(), range(2))).loss_sum.backward()
    data = DataSize(1, 800.0, 1200.0, visible=0.0, longest=800, rows=None, notes=())
    assert 2 * flops_of_pair(DryRun(shape), data) == pytest.approx(counter.get_total_flops(), rel=0.03)
