"""The temperature: least log loss on held-out data, found by a grid in another way; what a model without one gives."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from rmcore.config import UserError
from rmcore.data.tokens.comparisons import EncodedRow, TokenizedComparisons
from rmcore.scoring.calibration import calibrate, probabilities, read_temperature
from rmcore.scoring.files import with_rewards

GENERATOR = np.random.Generator(np.random.PCG64(5))


def rows(count: int, options: int, *, targets: bool) -> tuple[TokenizedComparisons, np.ndarray]:
    """Comparisons whose winners were drawn with the softmax of the rewards at temperature 2.5, or its probabilities."""
    made, rewards = [], []
    for _ in range(count):
        reward = GENERATOR.normal(size=options) * 3.0
        chances = np.exp(reward / 2.5) / np.exp(reward / 2.5).sum()
        best = int(GENERATOR.choice(options, p=chances))
        texts = [np.array([5, 6 + k], dtype=np.int32) for k in range(options)]
        if targets:
            made.append(EncodedRow(texts[0][:1], texts, (), (), (), scores=chances.tolist()))
        else:
            pairs = [(best, k) for k in range(options) if k != best]
            made.append(EncodedRow(texts[0][:1], texts, pairs, [0.0] * len(pairs), [1.0] * len(pairs)))
        rewards.append(reward)
    return TokenizedComparisons.of(made), np.concatenate(rewards)


def test_the_temperature_has_the_least_log_loss() -> None:
    for targets, options in ((False, 2), (True, 20)):  # of options there may be more than 16
        data, rewards_A = rows(1500 if not targets else 40, options, targets=targets)
        found = calibrate(data, rewards_A, targets=targets)
        reward = torch.from_numpy(rewards_A).reshape(-1, options)
        grid = torch.logspace(-1, 1.2, 400, dtype=torch.float64)
        if targets:
            target = torch.from_numpy(data.score).double().reshape(-1, options)
            losses = [F.cross_entropy(reward / t, target).item() for t in grid]
        else:
            labels = torch.from_numpy(data.winner.astype(np.int64))
            losses = [F.cross_entropy(reward / t, labels).item() for t in grid]
        best = int(np.argmin(losses))
        assert found.after == pytest.approx(losses[best], abs=1e-4) and found.after < found.before
        assert found.temperature == pytest.approx(grid[best].item(), rel=0.02)
        assert found.temperature == pytest.approx(2.5, rel=1e-5 if targets else 0.25)  # 1500 draws


def test_rewards_without_a_best_temperature_are_refused() -> None:
    data, _ = rows(50, 2, targets=False)
    right = np.where(np.isin(np.arange(100), data.winner + 2 * np.arange(50)), 1.0, 0.0)
    with pytest.raises(UserError, match="make no held-out mistake"):
        calibrate(data, right, targets=False)
    with pytest.raises(UserError, match="no better than at random"):
        calibrate(data, -right, targets=False)


def test_probabilities_add_up_and_leave_out_what_has_no_reward() -> None:
    assert probabilities([2.0, None, 0.0], 2.0) == [pytest.approx(0.7310586), None, pytest.approx(0.2689414)]
    assert sum(probabilities([900.0, -900.0, 899.0], 1.0)) == pytest.approx(1.0)
    assert with_rewards({"a": 1}, [2.0, 0.0], False, probabilities=[0.7, 0.3])["calibrated"] == [0.7, 0.3]
    assert "calibrated" not in with_rewards({"a": 1}, [2.0, 0.0], False)


def test_the_temperature_of_a_config_is_read_and_checked() -> None:
    assert read_temperature(LlamaConfig(), "m") is None
    assert read_temperature(LlamaConfig(rmcore={"temperature": 1.5}), "m") == 1.5
    with pytest.raises(UserError, match=r"m: rmcore\.temperature in its config\.json is not a positive number: -1"):
        read_temperature(LlamaConfig(rmcore={"temperature": -1}), "m")
