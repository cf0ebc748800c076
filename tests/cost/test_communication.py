"""Bytes that each strategy sends, compared with the formulas of ring collectives."""

import pytest
from transformers import GPTNeoXConfig

from rmcore.config import Config
from rmcore.cost.communication import collectives, exchange
from rmcore.cost.dry_run import DryRun
from rmcore.cost.machines import gpu


def test_a_ring_sends_what_rings_send() -> None:
    sizes = DryRun(
        GPTNeoXConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=2, vocab_size=128)
    ).sizes
    n = sizes.total

    def of(strategy: str) -> Config:
        parallel = {"strategy": strategy, "precision": "bf16"}
        return Config.model_validate({"model": {"name": "m"}, "data": {"train": {"path": "p"}}, "parallel": parallel})

    def sent(strategy: str, ranks: int, hosts: int, micro_batches: int = 1) -> tuple[float, float]:
        """Bytes per parameter: (within a host, between hosts)."""
        every = collectives(of(strategy), sizes, ranks, hosts, micro_batches)
        return sum(t.within * t.times for t in every) / n, sum(t.between * t.times for t in every) / n

    assert sent("ddp", 1, 1) == (0, 0)
    assert sent("ddp", 4, 1) == (pytest.approx(2 * 4 * 3 / 4), 0)
    assert sent("zero2", 4, 1, 5) == (pytest.approx((2 + 4) * 3 / 4), 0)
    assert sent("zero3", 4, 1, 5) == (pytest.approx(5 * (2 + 2 + 4) * 3 / 4), 0)
    within, between = sent("ddp", 16, 2)
    assert (within + between, between) == (pytest.approx(8 * 15 / 16), pytest.approx(8 * 15 / 16 / 8))
    # hsdp: rings within a host of 8, and an eighth of the gradients all-reduced between 2 hosts
    assert sent("hsdp", 16, 2) == (pytest.approx((2 + 2 + 4) * 7 / 8), pytest.approx(2 * 4 / 8 / 2))
    slow = collectives(of("ddp"), sizes, 16, 2, 1)[0]
    assert slow.seconds(gpu("h100")) == pytest.approx(8 * n * 15 / 16 / 8 / 50e9 / 0.8)


def test_context_groups_exchange_heads() -> None:
    """Queries, keys, values and output of each layer, in both passes: each rank sends all but its own part."""
    sizes = DryRun(
        GPTNeoXConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=2, vocab_size=128)
    ).sizes
    layer = 4 * 1000 * 64 * 2
    assert exchange(sizes, "bf16", 1000, 1, 8, 2) == []
    (within,) = exchange(sizes, "bf16", 1000, 4, 8, 2)
    assert (within.within, within.between) == (2 * 2 * layer * 3 / 4, 0)
    (across,) = exchange(sizes, "bf16", 1000, 16, 8, 3)
    assert (across.within, across.between) == (2 * 3 * layer * 7 / 16, 2 * 3 * layer * 8 / 16)
