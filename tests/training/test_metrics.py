"""Training metrics: sums over all ranks divided by counts over all ranks, without waiting for the device."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, LlamaConfig

from rmcore.cost.flops import model_flops_per_token
from rmcore.cost.machines import device_peak_flops
from rmcore.evaluation.metrics import TRAINING
from rmcore.parallel.world import World, running_world
from rmcore.training.metrics import Metrics
from tests.harness.device_reads import DeviceReads
from tests.harness.ranks import run_ranks

ONE = World(0, 1, 0, 1, torch.device("cpu"))


def micro_batch(rank: int, index: int, pairs: int) -> tuple[SimpleNamespace, SimpleNamespace]:
    """The output of a forward and its batch, random, decided by the two numbers."""
    generator = np.random.Generator(np.random.PCG64([rank, index]))
    rewards = torch.from_numpy(generator.normal(size=2 * pairs).astype(np.float32))
    winner = torch.arange(pairs) * 2
    output = SimpleNamespace(
        rewards_A=rewards,
        loss_sum=torch.tensor(float(generator.random()) * pairs, requires_grad=True),
        counted=torch.from_numpy(generator.random(pairs)).sum(),
    )
    batch = SimpleNamespace(
        winner_P=winner,
        loser_P=winner + 1,
        weight_P=torch.from_numpy(generator.random(pairs).astype(np.float32)),
        computed_tokens=10 * pairs + 1,
        logical_tokens=16 * pairs,
    )
    return output, batch


def expected(batches: list[tuple[SimpleNamespace, SimpleNamespace]]) -> dict[str, float]:
    """The same metrics in numpy, from all pairs at once."""
    chosen = np.concatenate([o.rewards_A[b.winner_P].double().numpy() for o, b in batches])
    rejected = np.concatenate([o.rewards_A[b.loser_P].double().numpy() for o, b in batches])
    weight = np.concatenate([b.weight_P.double().numpy() for _, b in batches])
    return {
        "train/rm/accuracy": float(np.average(chosen > rejected, weights=weight)),
        "train/rm/loss": sum(float(o.loss_sum.detach()) for o, _ in batches)
        / sum(float(o.counted) for o, _ in batches),
        "train/rm/chosen_rewards": float(np.average(chosen, weights=weight)),
        "train/rm/rejected_rewards": float(np.average(rejected, weights=weight)),
        "train/rm/reward_margin": float(np.average(chosen - rejected, weights=weight)),
        "sharing_ratio": sum(b.logical_tokens for _, b in batches) / sum(b.computed_tokens for _, b in batches),
    }


def log_two_intervals(rendezvous: str) -> list[dict[str, float]]:
    """Rank 0 has 3 pairs, rank 1 has 7 and an empty micro batch; then one pair on rank 0 only."""
    with running_world(30, init_method=rendezvous) as world:
        metrics = Metrics(world)
        for index, pairs in enumerate([[1, 2], [7, 0]][world.rank]):
            metrics.add(*micro_batch(world.rank, index, pairs))
        metrics.add_step(torch.tensor(2.0))
        metrics.add_step(torch.tensor(torch.inf))  # skipped
        metrics.add_step(torch.tensor(4.0))
        first = metrics.reduce()
        metrics.add(*micro_batch(world.rank, 9, 1 - world.rank))
        metrics.add_step()
        return [first, metrics.reduce()]


@pytest.mark.distributed
def test_unequal_ranks_give_the_metrics_of_all_pairs(tmp_path: Path) -> None:
    results = [result.value for result in run_ranks(log_two_intervals, 2, tmp_path)]
    assert results[0] == results[1]
    first, second = results[0]
    # fp64 sums of 10 numbers of size 1 in two orders: 10 * 2^-53, rounded up.
    close = {"abs": 1e-14}
    batches = [micro_batch(0, 0, 1), micro_batch(0, 1, 2), micro_batch(1, 0, 7), micro_batch(1, 1, 0)]
    for name, value in expected(batches).items():
        assert first[name] == pytest.approx(value, **close), name
    assert first["grad_norm"] == 3.0 and first["train/skipped_steps"] == 1.0
    assert first["pairs_per_second"] > 0 and first["step_seconds"] > 0
    assert first["tokens_per_second"] * first["sharing_ratio"] == pytest.approx(first["logical_tokens_per_second"])
    # The second interval knows nothing of the first.
    for name, value in expected([micro_batch(0, 9, 1), micro_batch(1, 9, 0)]).items():
        assert second[name] == pytest.approx(value, **close), name
    assert second["grad_norm"] == 0.0


def test_a_soft_label_counts_once_and_plain_pairs_as_they_are() -> None:
    """Label 0.75 for the first answer of the first pair of answers, with the first ahead; then two plain pairs."""
    soft, plain = Metrics(ONE), Metrics(ONE)
    rewards = torch.tensor([3.0, 1.0])
    both = SimpleNamespace(
        winner_P=torch.tensor([0, 1]),
        loser_P=torch.tensor([1, 0]),
        weight_P=torch.tensor([0.75, 0.25]),
        computed_tokens=1,
        logical_tokens=1,
    )
    soft.add(SimpleNamespace(rewards_A=rewards, loss_sum=torch.tensor(1.0), counted=torch.tensor(1.0)), both)
    reduced = soft.reduce()
    assert reduced["train/rm/accuracy"] == 0.75
    assert (reduced["train/rm/chosen_rewards"], reduced["train/rm/rejected_rewards"]) == (2.5, 1.5)
    assert reduced["train/rm/reward_margin"] == 1.0
    output, batch = micro_batch(0, 0, 7)
    batch.weight_P = torch.ones(7)
    plain.add(output, batch)
    chosen, rejected = (output.rewards_A[index].double() for index in (batch.winner_P, batch.loser_P))
    reduced = plain.reduce()
    assert reduced["train/rm/accuracy"] == float((chosen > rejected).double().mean())
    assert reduced["train/rm/chosen_rewards"] == float(chosen.mean())


def test_an_interval_without_pairs_has_no_means() -> None:
    reduced = Metrics(ONE).reduce()
    assert not [name for name in reduced if name.startswith("train/")]
    assert all(np.isfinite(value) for value in reduced.values())


def test_adding_never_waits_for_the_device() -> None:
    metrics, (output, batch) = Metrics(ONE), micro_batch(0, 0, 5)
    with DeviceReads() as reads:
        metrics.add(output, batch)
        metrics.add_step(torch.tensor(1.0))
    assert reads.seen == []
    with DeviceReads() as reads:  # the probe sees what it looks for
        output.loss_sum.detach().item()
    assert reads.seen != []


def test_many_small_losses_do_not_get_lost_in_a_large_sum() -> None:
    """fp32 would stop at 2^24: 2^24 + 1 == 2^24."""
    metrics = Metrics(ONE)
    _, batch = micro_batch(0, 0, 1)
    for loss in (2.0**24, 1.0, 1.0):
        output = SimpleNamespace(rewards_A=torch.zeros(2), loss_sum=torch.tensor(loss), counted=torch.ones(()))
        metrics.add(output, batch)
    assert metrics.reduce()["train/rm/loss"] * 3 == 2.0**24 + 2


def test_time_in_a_pause_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("rmcore.training.metrics.time", SimpleNamespace(perf_counter=lambda: now))
    metrics = Metrics(ONE)
    now += 2
    with metrics.clock_paused():
        now += 50
    now += 3
    metrics.add(*micro_batch(0, 0, 10))
    metrics.add_step()
    reduced = metrics.reduce()
    assert reduced["step_seconds"] == 5.0 and reduced["pairs_per_second"] == 2.0


def test_flops_are_those_that_pytorch_counts() -> None:
    """PyTorch's counter takes attention's full square; ours the causal half, so its attention counts twice."""
    length = 24
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=1,
        attn_implementation="eager",
    )
    model = AutoModelForSequenceClassification.from_config(config)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(2, 2 + length)[None]).logits.sum().backward()
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    without_attention = model_flops_per_token(config, matrices, 0.0)
    attention = model_flops_per_token(config, matrices, float(length)) - without_attention
    assert counter.get_total_flops() == length * (without_attention + 2 * attention)


def test_mfu_only_where_the_peak_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_peak_flops(torch.device("cpu")) is None
    metrics = Metrics(ONE, flops_per_token=1e6)
    metrics.add(*micro_batch(0, 0, 3))
    assert "mfu" not in metrics.reduce()
    names = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA H200 NVL": 835e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA GeForce RTX 4090": 165e12,
        "NVIDIA GeForce RTX 3060": None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert device_peak_flops(torch.device("cuda", 0)) == peak, name
    monkeypatch.setattr("rmcore.training.metrics.device_peak_flops", lambda device: 1e9)
    metrics = Metrics(ONE, flops_per_token=1e6)
    metrics.add(*micro_batch(0, 0, 3))
    reduced = metrics.reduce()
    assert reduced["mfu"] == pytest.approx(reduced["tokens_per_second"] / 1e3)
    assert reduced.keys() <= {metric.log_name for metric in TRAINING}, "each metric is in the table"


def test_the_balance_of_the_experts_is_a_mean_over_what_the_loss_counts() -> None:
    """Micro batches that count 3 and 1, and sum 3.6 and 1.4: 5 / 4, not the mean of 1.2 and 1.4."""
    metrics = Metrics(ONE, balance=True)
    for total, count in ((3.6, 3.0), (1.4, 1.0)):
        output, batch = micro_batch(0, 0, 2)
        output.balance_sum, output.balance_counted = torch.tensor(total), torch.tensor(count)
        metrics.add(output, batch)
    metrics.add_step(torch.tensor(1.0))
    kept = metrics.interval()
    assert metrics.reduce()["train/rm/router_balance"] == pytest.approx(1.25)
    assert Metrics(ONE, earlier=kept, balance=True).reduce()["train/rm/router_balance"] == pytest.approx(1.25)
