"""Ranks that compute a packed row together: rewards, gradients and steps are those of one rank."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rmcore.config import UserError
from rmcore.data.batches.batch import build_batch
from rmcore.model.reward_model import PACKED, SHARED
from rmcore.parallel.context import context_group, with_context
from rmcore.parallel.world import World
from tests.harness.oracle import BOUND, EXACT_SHARED, odd_items, padded, reward_model, tiny_model
from tests.harness.paths import needs_shared
from tests.harness.ranks import run_ranks, train_rank
from tests.training.test_world_sizes import RUN

CPU = torch.device("cpu")


def errors(rendezvous: str, families: list[str], ranks: int) -> dict[str, float]:
    """For each family and way, the largest error of a reward or a summed gradient against the padded oracle."""
    from rmcore.parallel.world import all_reduce_sum, running_world

    torch.set_num_threads(1)
    found = {}
    items = odd_items()
    with running_world(60.0, init_method=rendezvous) as world:
        group = context_group(with_context(world, ranks))
        for family in families:
            oracle = tiny_model(family, torch.float64)
            loss, rewards = padded(oracle, items)
            loss.backward()
            expected = {name: p.grad for name, p in oracle.named_parameters() if p.grad is not None}
            for path, pruned in ((SHARED, True), (SHARED, False), (PACKED, True)):
                hf_model = tiny_model(family, torch.float64)
                model = reward_model(hf_model, path)
                model.context = group
                model.use(path, pruned=pruned)
                out = model(build_batch(items, range(len(items)), path == SHARED, ranks))
                out.loss_sum.backward()
                pairs = [(out.rewards_A, torch.cat(rewards)), (out.loss_sum, loss)]
                for name, parameter in hf_model.named_parameters():
                    if name in expected:
                        pairs.append((all_reduce_sum(world, parameter.grad), expected[name]))
                found[f"{family} {path} {pruned}"] = max(
                    float((a - b).abs().max() / max(1.0, float(b.abs().max()))) for a, b in pairs
                )
    return found


@pytest.mark.distributed
def test_rewards_and_gradients_equal_the_padded_oracle(tmp_path: Path) -> None:
    """The parts of two ranks sum to the gradient. odd_items() has scored rows inside a prefix, and equal ones."""
    for result in run_ranks(errors, 2, tmp_path, EXACT_SHARED, 2):
        assert len(result.value) == 3 * len(EXACT_SHARED)
        assert max(result.value.values()) < BOUND[torch.float64], result.value


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [3, 4, 6])
def test_any_number_of_ranks(tmp_path: Path, ranks: int) -> None:
    """4 query heads and 2 key heads: keys are repeated on 4 ranks; on 3 and 6, heads of zeros fill up."""
    for result in run_ranks(errors, ranks, tmp_path, ["gpt_neox", "llama", "mistral_window"], ranks):
        assert max(result.value.values()) < BOUND[torch.float64], result.value
