"""Texts on both sides of longrope's threshold: each has the reward that it has by itself, on every path."""

import pytest
import torch
import transformers

from rmcore.data.batches.batch import build_batch
from rmcore.model.classifier import new_classifier
from rmcore.model.reward_model import PATHS, SHARED, RewardModel
from rmcore.model.selftest import choose_path
from tests.harness.oracle import GROUPED, PAD, Items, assert_close, item

THRESHOLD = 16
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.5, 3.0, 6.0, 12.0]}


def longrope_model() -> RewardModel:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": THRESHOLD, **FACTORS}
    config = transformers.Phi3Config(
        **GROUPED, original_max_position_embeddings=THRESHOLD, rope_parameters=rope, sliding_window=None
    )
    torch.manual_seed(0)
    model = new_classifier(config)
    for parameter in model.parameters():
        parameter.data.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return RewardModel(model.base_model, model.score, pad_token_id=PAD)


def mixed_items() -> Items:
    """Comparisons up to the threshold, above it, on both sides, and with an answer that begins another one."""
    return Items([item(4, 12, 3, seed=1), item(20, 6, 9, seed=2), item(12, 2, 9, seed=3), item(12, 0, 11, seed=4)])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pruned", [False, True])
def test_a_reward_does_not_depend_on_the_lengths_of_its_neighbours(path, pruned):
    model, items = longrope_model(), mixed_items()
    texts = [torch.from_numpy(one.text(k)).long() for one in items for k in range(len(one.tails))]
    alone = torch.stack([model.reward_alone(text) for text in texts])
    model.use(path, pruned=pruned)
    for numbers in ([0, 1, 2, 3], [3], [2, 0]):
        rewards = model(build_batch(items, numbers, share=path == SHARED)).rewards_A
        assert_close(rewards, alone.view(-1, 2)[numbers].flatten().float(), 5e-5, (path, numbers))
    lengths = [len(text) for text in texts]
    assert THRESHOLD in lengths and max(lengths) > THRESHOLD, "a text of exactly so many tokens is a short one"


def test_without_the_separation_rewards_move():
    """The test above can fail: with one set of frequencies for all, they differ by far more than rounding."""
    model, items = longrope_model(), mixed_items()
    model.use(SHARED)
    right = model(build_batch(items, [0, 1])).rewards_A
    model.long_rope.threshold = None
    assert (model(build_batch(items, [0, 1])).rewards_A - right).abs().max() > 1e-3


def test_the_self_test_accepts_sharing_with_gradients():
    model, items = longrope_model(), mixed_items()
    path, line = choose_path(model, items, [0, 1, 2, 3], torch.device("cpu"), gradients=True)
    assert path == SHARED and model.pruned, line
    for numbers in ([2], [3], [0, 1]):
        assert choose_path(model, items, numbers, torch.device("cpu"), gradients=True)[0] == SHARED
