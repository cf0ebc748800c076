"""Recurrent layers share prompts exactly: rewards and every gradient equal the padded oracle, for each family."""

import pytest
import torch

from rmcore.data.batches.batch import build_batch
from rmcore.model.reward_model import PACKED, PADDED, SHARED, RewardModel
from rmcore.model.selftest import choose_path
from tests.harness.oracle import BOUND, PAD, Items, assert_close, odd_items, padded
from tests.harness.recurrent_models import RECURRENT, precision, recurrent_model

CPU = torch.device("cpu")


def reward_model(model, path):
    return RewardModel(model.base_model, model.score, pad_token_id=PAD, path=path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("family", RECURRENT)
def test_packed_and_shared_equals_the_padded_oracle(family, dtype):
    items = odd_items()
    with precision(dtype):
        model = recurrent_model(family, dtype)
        loss, rewards = padded(model, items)
        loss.backward()
        expected = {name: p.grad for name, p in model.named_parameters()}
        for path in (SHARED, PACKED):
            model.zero_grad(set_to_none=True)
            out = reward_model(model, path)(build_batch(items, range(len(items)), share=path == SHARED))
            out.loss_sum.backward()
            assert_close(out.rewards_A, torch.cat(rewards), BOUND[dtype], "rewards")
            for name, parameter in model.named_parameters():
                if expected[name] is not None:
                    assert_close(parameter.grad, expected[name], BOUND[dtype], name)
