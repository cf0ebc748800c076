"""What a run looks at before it reads a model."""

import pytest
import torch
from torch import nn

from rmcore.config import UserError, load_config
from rmcore.parallel.world import World
from rmcore.training import loading
from tests.harness.walks import STEPS_OF_SEVEN


@pytest.mark.parametrize(
    ("strategy", "device", "keys", "size", "need"),
    [
        ("zero3", "cpu", "", 1, 16 * 48_000),
        ("zero3", "cuda", "", 1, (8 + 4 + 4) * 48_000 + 2 * (2**18 - 4 * 48_000)),  # pinned: 192,000 -> 262,144
        ("zero2", "cpu", "optim.states=bf16", 4, 2 * 12 * 12_000),  # two of the four ranks are on this host
        ("hsdp", "cpu", "", 4, 2 * 16 * 24_000),
        ("zero2", "cpu", "optim.ema=0.9", 1, (16 + 4) * 48_000),
        ("zero2", "cpu", "optim.states=int8", 1, 10 * 48_000 + 2 * 4 * 48_000 // 256),  # a scale for 256 elements
        ("zero2", "cpu", "model.weights=bf16 parallel.precision=bf16", 1, 14 * 48_000),
    ],
)
def test_offload_needs_the_memory_of_the_host(
    monkeypatch: pytest.MonkeyPatch, strategy: str, device: str, keys: str, size: int, need: int
) -> None:
    overrides = [f"parallel.strategy={strategy}", "parallel.offload=true", *keys.split()]
    config = load_config(None, [*STEPS_OF_SEVEN, "model.name=synthetic", *overrides])
    world = World(0, size, 0, min(size, 2), torch.device(device))
    model = nn.Linear(480, 100, bias=False)
    monkeypatch.setattr(loading, "available_memory", lambda: float(need))
    loading.check_host_memory(config, model, world)
    monkeypatch.setattr(loading, "available_memory", lambda: need - 1.0)
    with pytest.raises(UserError, match="offload=true keeps 0 GB of weights"):
        loading.check_host_memory(config, model, world)
