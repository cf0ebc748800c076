"""Checks the exact evaluation: every comparison once, the same rewards and metrics at any world size."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmcore.data.tokens.comparisons import EncodedRow, TokenizedComparisons, computed_tokens
from rmcore.data.tokens.limits import LengthLimits, in_memory
from rmcore.evaluation.arrays import answer_arrays, pair_arrays
from rmcore.evaluation.evaluate import Evaluations, deal, evaluate, micro_batches
from rmcore.evaluation.samples import sample_rows
from rmcore.model.reward_model import PACKED, PADDED, SHARED
from rmcore.parallel.world import World, running_world
from tests.harness.oracle import odd_items, padded, reward_model, tiny_model
from tests.harness.ranks import run_ranks

ONE = World(0, 1, 0, 1, torch.device("cpu"))
LENGTHS = [(12, 5, 9), (0, 4, 7), (8, 6, 0), (20, 1, 1), (3, 30, 2), (10, 10, 11), (7, 7, 7)]


def comparisons(lengths: list[tuple[int, int, int]] = LENGTHS) -> TokenizedComparisons:
    """Random pairs of the given (prefix, chosen tail, rejected tail), from two sources in turn."""
    generator = np.random.Generator(np.random.PCG64(5))
    rows = []
    for place, (prefix, chosen, rejected) in enumerate(lengths):
        head = generator.integers(20, 61, size=prefix, dtype=np.int32)
        tails = [generator.integers(20, 61, size=length, dtype=np.int32) for length in (chosen, rejected)]
        for first, tail in enumerate(tails):
            tail[:1] = 2 + first
        answers = [np.concatenate([head, tail]) for tail in tails]
        rows.append(EncodedRow(head, answers, [(0, 1)], [0.0], [1.0 + place], source_index=place % 2))
    return in_memory(rows, LengthLimits(96), sources=["even", "odd"])


def mixed_comparisons() -> TokenizedComparisons:
    """Four ranked answers, a soft label in both directions, a plain pair, five answers of which two tie as best."""
    generator = np.random.Generator(np.random.PCG64(6))
    four = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    tied = [(i, j) for i in (0, 1) for j in (2, 3, 4)]
    rows = []
    for place, (answers, pairs, weight) in enumerate(
        [(4, four, [1 / 6] * 6), (2, [(0, 1), (1, 0)], [0.7, 0.3]), (2, [(1, 0)], [1.0]), (5, tied, [0.1] * 6)] * 3
    ):
        texts = [generator.integers(20, 61, size=4 + (3 * place + 5 * i) % 11, dtype=np.int32) for i in range(answers)]
        rows.append(EncodedRow(texts[0][:0], texts, pairs, [0.0] * len(pairs), weight, source_index=place % 2))
    return in_memory(rows, LengthLimits(96), sources=["even", "odd"])


def evaluate_on(world: World, token_budget: int = 40) -> list[dict[str, Any]]:
    """Seven comparisons; then one, so that two of three ranks have nothing to do; then many answers and soft labels."""
    model = reward_model(tiny_model("llama"), SHARED)
    sets = [comparisons(LENGTHS), comparisons(LENGTHS[:1]), mixed_comparisons()]
    results = [evaluate(model.train(), data, world, token_budget=token_budget) for data in sets]
    assert model.training, "the model's mode is left as it was"
    return [{"rewards": [float(r).hex() for r in one.rewards_A], "metrics": one.metrics} for one in results]


def evaluate_on_ranks(rendezvous: str) -> list[dict[str, Any]]:
    with running_world(60, init_method=rendezvous) as world:
        return evaluate_on(world)


@pytest.mark.distributed
def test_the_same_to_the_last_bit_at_any_world_size(tmp_path: Path) -> None:
    """Every reward and every metric, as JSON."""
    alone = evaluate_on(ONE)
    assert [one["metrics"]["count"] for one in alone] == [7, 1, 45]
    assert alone[2]["metrics"]["best_of"].keys() == {"4", "5"}
    for size in (2, 3):
        for result in run_ranks(evaluate_on_ranks, size, tmp_path / str(size)):
            assert result.value == alone


def test_the_batch_changes_no_more_than_rounding() -> None:
    """One comparison at a time, and all in one micro batch."""
    for small, large in zip(evaluate_on(ONE, 1), evaluate_on(ONE, 10_000), strict=True):
        assert flat(small["metrics"]).keys() == flat(large["metrics"]).keys()
        # Rewards of size 1 in fp32 through three layers; no figure divides by a small number here.
        assert flat(small["metrics"]) == pytest.approx(flat(large["metrics"]), abs=1e-5, nan_ok=True)


def flat(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """{"a": {"b": 1}, "c": [2]} -> {"a/b": 1, "c/0": 2}."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, list):
            value = {str(i): item for i, item in enumerate(value)}
        found |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


@pytest.mark.parametrize("path", [SHARED, PACKED, PADDED])
def test_rewards_are_those_of_the_padded_oracle(path: str) -> None:
    items = odd_items()
    rows = [
        EncodedRow(
            item.prefix.astype(np.int32),
            [np.concatenate([item.prefix, tail]).astype(np.int32) for tail in item.tails],
            [(int(winner), int(loser)) for winner, loser in item.pairs],
            item.margin.tolist(),
            item.weight.tolist(),
        )
        for item in items
    ]
    data = in_memory(rows, LengthLimits(96))
    assert len(data) == len(items), "the odd cases are all there"
    model = reward_model(tiny_model("gpt_neox"), path)
    model.use(path)
    result = evaluate(model, data, ONE, token_budget=50, share=path == SHARED)
    with torch.no_grad():
        loss, rewards = padded(tiny_model("gpt_neox"), items)
    # fp32, three layers: rounding of some 1e-6 where a wrong token would move a reward by 1e-1.
    np.testing.assert_allclose(result.rewards_A, torch.cat(rewards).double().numpy(), atol=1e-5)
    pairs = sum(len(item.pairs) for item in items)
    assert result.metrics["count"] == pairs
    assert result.metrics["loss"] == pytest.approx(float(loss) / pairs, abs=1e-5)
    names = {"accuracy", "loss", "chosen_rewards", "rejected_rewards", "reward_margin"}
    assert {f"eval/rm/{name}" for name in names} <= Evaluations({"rm": result}).logged().keys()


@given(
    tokens=st.lists(st.integers(1, 100), max_size=60),
    budget=st.integers(1, 120),
    world_size=st.integers(1, 5),
)
@settings(max_examples=100, deadline=None)
def test_each_comparison_is_dealt_once(tokens: list[int], budget: int, world_size: int) -> None:
    batches = micro_batches(np.array(tokens, dtype=np.int64), budget)
    steps = list(deal(batches, world_size))
    dealt = [int(number) for step in steps for hands in step.ranks for hand in hands for number in hand]
    assert sorted(dealt) == list(range(len(tokens)))
    assert all(sum(tokens[n] for n in batch) <= budget or len(batch) == 1 for batch in batches)
    assert all(len(step.ranks) == world_size and {len(hands) for hands in step.ranks} == {1} for step in steps)


def test_the_docstring_example() -> None:
    assert [batch.tolist() for batch in micro_batches(np.array([10, 40, 20, 35]), 60)] == [[1], [3, 2], [0]]
    data = comparisons([(3, 2, 1)])
    assert computed_tokens(data, share=True).tolist() == [6] and computed_tokens(data, share=False).tolist() == [9]


def test_weights_lengths_and_sources_follow_the_rows() -> None:
    data = comparisons()
    pairs = pair_arrays(data, np.arange(14.0))
    assert pairs.chosen_P.tolist() == [0, 2, 4, 6, 8, 10, 12] and pairs.rejected_P.tolist() == [1, 3, 5, 7, 9, 11, 13]
    assert pairs.chosen_length_P.tolist() == [chosen for _, chosen, _ in LENGTHS]
    assert pairs.rejected_length_P.tolist() == [rejected for _, _, rejected in LENGTHS]
    answers = answer_arrays(data, np.arange(14.0))
    assert answers.length_A.tolist() == [length for _, *both in LENGTHS for length in both]
    assert answers.comparison_A.tolist() == np.repeat(np.arange(7), 2).tolist()
    assert answers.source_A.tolist() == np.repeat([0, 1, 0, 1, 0, 1, 0], 2).tolist()
    assert pairs.weight_P.tolist() == [1, 2, 3, 4, 5, 6, 7] and pairs.source_P.tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_samples_show_prompt_and_answers_apart() -> None:
    from rmcore.data.synthetic import byte_tokenizer

    tokenizer = byte_tokenizer()
    prompt = "Say it. "
    texts = [prompt + answer for answer in ("It is good.", "It is bad.")]  # the answers open alike: "It is "
    encoded = [np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32) for text in texts]
    head = np.array(tokenizer.encode(prompt, add_special_tokens=False), dtype=np.int32)
    rows = [EncodedRow(head, list(encoded), [(1, 0)], [0.0], [1.0]) for _ in range(25)]
    data = in_memory(rows, LengthLimits(96))
    samples = sample_rows(data, np.tile([0.5, -0.25], 25), tokenizer, 10)
    assert len(samples) == 10 and len(sample_rows(data, np.zeros(50), tokenizer, 40)) == 25
    first = samples[0]
    assert (first.prompt, first.chosen, first.rejected) == (prompt, "It is bad.", "It is good.")
    assert (first.chosen_reward, first.rejected_reward, first.correct) == (-0.25, 0.5, False)
    assert json.dumps(first.prompt)
