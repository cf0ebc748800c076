"""FLOPs of a pair compared with those that torch counts."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, GPTNeoXConfig, MixtralConfig, PretrainedConfig

from rmcore.bench.models import families, tiny_config
from rmcore.config import UserError
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


def test_heads_of_several_sizes_count_by_their_mean() -> None:
    gemma4 = pytest.importorskip("transformers.models.gemma4.configuration_gemma4")  # not in transformers 5.3
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16}
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "hidden_size_per_layer_input": 8}
    config = gemma4.Gemma4TextConfig(**layers, **heads, **small, vocab_size_per_layer_input=64)
    assert DryRun(config).sizes.width == 4 * (8 + 16) / 2


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_a_plan_knows_the_sizes_of_every_family(family: str) -> None:
    if family == "granite4_vision":
        pytest.skip("its towers need a width of 64")
    try:
        config = tiny_config(family)
    except Exception as error:
        pytest.skip(f"no tiny config: {error}")
    try:
        assert DryRun(config).sizes.total > 0
    except (UserError, ValueError, OSError):  # what the callers of DryRun report in one sentence
        return


SHAPES = {"vocab_size": 64, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_labels": 1}
MIXTURE = {**SHAPES, "intermediate_size": 192, "num_local_experts": 8, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    "shape",
    [
        GPTNeoXConfig(**SHAPES, intermediate_size=384, pad_token_id=1),
        MixtralConfig(**MIXTURE, num_key_value_heads=4, pad_token_id=1),
    ],
    ids=lambda shape: shape.model_type,
)
def test_flops_are_those_that_torch_counts(shape: PretrainedConfig) -> None:
    """Torch does not count the attention op, so none is visible here. The scored rows of the last layer (one in 400)
    are not in the prediction.
    """
    hf_model = AutoModelForSequenceClassification.from_config(
        shape, dtype=torch.float32, experts_implementation="eager"
    )
    model = RewardModel(hf_model.base_model, hf_model.score, pad_token_id=1)
    model.use(SHARED, pruned=True)
    counter = FlopCounterMode(display=False)
    with counter:
        model(build_batch(Rows(), range(2))).loss_sum.backward()
    data = DataSize(1, 800.0, 1200.0, visible=0.0, longest=800, rows=None, notes=())
    assert 2 * flops_of_pair(DryRun(shape), data) == pytest.approx(counter.get_total_flops(), rel=0.03)
