"""Bytes that each strategy sends, compared with the formulas of ring collectives."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, GPTNeoXConfig

from rmcore.config import Config
from rmcore.cost.communication import NOTHING, collectives, exchange
from rmcore.cost.dry_run import DryRun
from rmcore.cost.machines import gpu
from rmcore.model.lora import add_lora, store_base


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


@pytest.mark.parametrize("base", ["bf16", "nf4"])
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_stored_base_is_gathered_in_its_own_format(strategy: str, base: str) -> None:
    """In each pass of each micro batch the codes and scales of a real model; by FSDP2 everything else, as ever."""
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    shape = GPTNeoXConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=2, vocab_size=128, num_labels=1
    )
    model = {"name": "m", "lora": {"rank": 4, "base": base}}
    parallel = {"strategy": strategy, "precision": "bf16"}
    config = Config.model_validate({"model": model, "data": {"train": {"path": "p"}}, "parallel": parallel})
    hf_model = AutoModelForSequenceClassification.from_config(shape, dtype=torch.float32)
    add_lora(hf_model.base_model, config.model.lora, 0)
    store_base(hf_model.base_model, config.model.lora)
    codes = sum(b.nbytes for name, b in hf_model.named_buffers() if name.endswith((".codes", ".scale")))
    rest = 2 * sum(parameter.numel() for parameter in hf_model.parameters())  # in bf16
    sent = {
        one.what: one
        for one in collectives(config, DryRun(shape, lora=config.model.lora).sizes, 4, 1, micro_batches=5, passes=3)
    }
    stored = sent["gather the stored base"]
    assert (stored.within, stored.times, stored.behind) == (pytest.approx(codes * 3 / 4, rel=0.001), 15, NOTHING)
    assert sent["gather weights"].within == pytest.approx(rest * 3 / 4)
