"""Ranks that compute a packed row together: rewards, gradients and steps are those of one rank."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from rmcore.config import UserError, load_config
from rmcore.cost.dry_run import FP32, DryRun, LiveBytes
from rmcore.data.batches.batch import build_batch
from rmcore.model.classifier import new_classifier
from rmcore.model.long_rope import check_split
from rmcore.model.reward_model import PACKED, SHARED, RewardModel
from rmcore.model.row_split import ContextGroup, RowPart
from rmcore.model.selftest import Shortened, choose_path
from rmcore.parallel.context import context_group, with_context
from rmcore.parallel.world import World
from tests.harness.configs import NEEDED
from tests.harness.oracle import (
    BOUND,
    EXACT_SHARED,
    GROUPED,
    MASKED,
    SMALL,
    Items,
    item,
    odd_items,
    padded,
    reward_model,
    tiny_model,
)
from tests.harness.paths import needs_shared
from tests.harness.ranks import run_ranks, train_rank
from tests.harness.recurrent_models import RECURRENT
from tests.model.test_attention_kinds import KINDS, UNPRUNED, tiny
from tests.training.test_world_sizes import RUN

CPU = torch.device("cpu")
WIDE: dict[str, Any] = {**SMALL, "hidden_size": 192, "num_hidden_layers": 5, "intermediate_size": 768}
KINDS_SPLIT = [kind for kind, (_, _, by_masks) in KINDS.items() if not by_masks]


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
                out = model(build_batch(items, range(len(items)), path == SHARED, multiple=ranks))
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


def errors_of_kinds(rendezvous: str) -> dict[str, float]:
    """For each kind of attention, the largest error of a reward or a summed gradient against whole rows."""
    from rmcore.parallel.world import all_reduce_sum, running_world

    torch.set_num_threads(1)
    found = {}
    items = odd_items()
    with running_world(60.0, init_method=rendezvous) as world:
        group = context_group(with_context(world, world.size))
        for kind in KINDS_SPLIT:
            hf_model = tiny(kind)
            model = reward_model(hf_model, SHARED)
            model.use(SHARED, pruned=kind not in UNPRUNED)
            pairs = []
            for context in (None, group):
                model.context = context
                hf_model.zero_grad(set_to_none=True)
                out = model(build_batch(items, range(len(items)), multiple=model.multiple))
                out.loss_sum.backward()
                gradients = [p.grad for p in hf_model.parameters() if p.grad is not None]
                pairs.append([out.rewards_A, *(all_reduce_sum(world, g) if context else g for g in gradients)])
            found[kind] = max(
                float((a - b).abs().max() / max(1.0, float(a.abs().max()))) for a, b in zip(*pairs, strict=True)
            )
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_every_kind_of_attention_is_split(tmp_path: Path) -> None:
    for result in run_ranks(errors_of_kinds, 2, tmp_path):
        assert result.value.keys() == set(KINDS_SPLIT)
        assert max(result.value.values()) < BOUND[torch.float32], result.value


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [3, 4, 6])
def test_any_number_of_ranks(tmp_path: Path, ranks: int) -> None:
    """4 query heads and 2 key heads: keys are repeated on 4 ranks; on 3 and 6, heads of zeros fill up."""
    for result in run_ranks(errors, ranks, tmp_path, ["gpt_neox", "llama", "mistral_window"], ranks):
        assert max(result.value.values()) < BOUND[torch.float64], result.value


def activations(rendezvous: str) -> list[list[int]]:
    """(kept after the forward, peak) in bytes: of the whole row on this rank, and of its part."""
    from rmcore.parallel.world import running_world

    torch.set_num_threads(1)
    found = []
    items = Items([item(1500, 300, 248, seed=1)])
    with running_world(60.0, init_method=rendezvous) as world:
        hf_model = new_classifier(transformers.GPTNeoXConfig(**WIDE))
        model = RewardModel(hf_model.base_model, hf_model.score, pad_token_id=1)
        model.use(SHARED, pruned=True)
        for context in (None, context_group(with_context(world, world.size))):
            model.context = context
            hf_model.zero_grad(set_to_none=True)
            batch = build_batch(items, [0], multiple=model.multiple)
            with LiveBytes(model) as live:
                loss = model(batch).loss_sum
                kept = live.now
                loss.backward()
            found.append([kept, live.peak])
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_each_rank_holds_its_part_of_the_activations(tmp_path: Path) -> None:
    """A quarter on 4 ranks; 5 % (kept) and 10 % (peak) for what does not shrink: ids, and the keys of scored rows.

    It may be less: a slice of the projection that makes queries, keys and values at once keeps all of it, an exchanged
    copy does not. The plan's dry run of one rank counts the same bytes.
    """
    counted = DryRun(transformers.GPTNeoXConfig(**WIDE)).token_bytes(FP32, "none", cuda=False, context=4)
    for result in run_ranks(activations, 4, tmp_path):
        (kept, peak), (own_kept, own_peak) = result.value
        assert 0 < own_kept < 1.05 * kept / 4
        assert own_kept < own_peak < 1.1 * peak / 4
        assert counted.kept * 2048 / 4 == pytest.approx(own_kept, rel=0.06)
        assert counted.total * 2048 / 4 == pytest.approx(own_peak, rel=0.1)


# --- whole runs -------------------------------------------------------------------------------------------------------


def walk(folder: Path, size: int, *more: str, steps: int = 10, hosts: int = 1) -> list[dict[str, Any]]:
    """The logged steps of a run on real rows, the evaluation included, without the figures of clocks."""
    overrides = [*RUN, f"run.dir={folder / 'run'}", f"run.max_steps={steps}", *more]
    run_ranks(train_rank, size, folder / "ranks", overrides, hosts=hosts, timeout=400)
    log = folder / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def assert_same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Ranks add fp32 numbers in another order: 1e-5, as derived in test_world_sizes.py. Filling adds a few tokens."""
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for key, value in b.items():
            bound = 2e-2 if key == "sharing_ratio" else 1e-5
            np.testing.assert_allclose(a[key], value, rtol=bound, atol=bound, err_msg=key)


@needs_shared
@pytest.mark.distributed
def test_two_ranks_take_the_steps_of_one(tmp_path: Path) -> None:
    alone = walk(tmp_path / "one", 1, steps=3)
    assert_same(walk(tmp_path / "two", 2, "parallel.context=2", "parallel.strategy=zero3", steps=3), alone)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return walk(tmp_path_factory.mktemp("one-rank"), 1)


CASES = [
    (2, 2, ["ddp"]),
    (2, 2, ["zero2", "parallel.recompute=selective"]),
    (4, 4, ["zero1", "parallel.recompute=full"]),
    (4, 4, ["zero3", "parallel.recompute=full"]),
    (4, 2, ["zero2"]),
    (4, 2, ["hsdp"]),
    (4, 2, ["ddp", "model.attention=packed"]),
]


@needs_shared
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("size, context, how", CASES, ids=lambda value: str(value))
def test_every_strategy_takes_the_steps_of_one_rank(
    tmp_path: Path, one_rank: list[dict[str, Any]], size: int, context: int, how: list[str]
) -> None:
    strategy, *more = how
    ours = walk(
        tmp_path,
        size,
        f"parallel.context={context}",
        f"parallel.strategy={strategy}",
        *more,
        hosts=2 if strategy == "hsdp" else 1,
    )
    if "model.attention=packed" in more:  # computes the prompts again
        for line in (*ours, *one_rank):
            line.pop("sharing_ratio", None)
    assert_same(ours, one_rank)


@needs_shared
@pytest.mark.slow
@pytest.mark.distributed
def test_decorrelation_takes_the_steps_of_one_rank(tmp_path: Path) -> None:
    key = "loss.length_decorrelation=0.5"
    alone = walk(tmp_path / "alone", 1, key, steps=5)
    assert_same(walk(tmp_path / "groups", 4, key, "parallel.context=2", "parallel.strategy=zero2", steps=5), alone)


@needs_shared
@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_resumes_on_other_groups(tmp_path: Path) -> None:
    """Four steps on one rank, three on two ranks that share each row, three on four ranks in two groups."""
    constant = ["optim.schedule=constant", "run.save_every=1", "run.evals=0"]
    alone = walk(tmp_path / "alone", 1, *constant)
    directory = f"run.dir={tmp_path / 'c' / 'run'}"
    walk(tmp_path / "a", 1, *constant, directory, steps=4)
    walk(tmp_path / "b", 2, *constant, directory, "parallel.context=2", steps=7)
    ours = walk(tmp_path / "c", 4, *constant, "parallel.context=2", "parallel.strategy=zero2")
    assert_same(ours, alone)


# --- the rows and the comparisons that ranks share --------------------------------------------------------------------


def test_a_row_is_filled_with_tokens_that_nothing_reads() -> None:
    plain, filled = (build_batch(odd_items(), [0, 5], multiple=multiple) for multiple in (1, 8))
    tokens = plain.computed_tokens
    assert tokens % 8 and filled.computed_tokens == tokens + 8 - tokens % 8
    assert torch.equal(filled.input_ids_T[:tokens], plain.input_ids_T)
    *segments, last = filled.layout.segments_S4.tolist()
    assert segments == plain.layout.segments_S4.tolist() and last == [tokens, filled.computed_tokens, tokens, tokens]
    assert all(row < tokens for rows in filled.answer_rows() for row in rows)
    assert build_batch(odd_items(), [], multiple=4).computed_tokens == 4


def test_every_rank_finds_its_scored_rows() -> None:
    """Rows 3, 17, 4 and 17 of 20 on 5 ranks: the answers at row 17 share it, and ranks without answers take a row 0."""
    batch = build_batch(odd_items(), [0, 1])
    batch = replace(batch, input_ids_T=torch.zeros(20), last_rows_A=np.array([3, 17, 4, 17]))
    parts = [RowPart.of(batch, ContextGroup(None, rank, 5)) for rank in range(5)]  # type: ignore[arg-type]
    assert [part.scored_a.tolist() for part in parts] == [[3, 0], [0, 0], [0, 0], [0, 0], [1, 1]]
    assert [part.rows for part in parts] == [slice(4 * rank, 4 * rank + 4) for rank in range(5)]
    for part in parts:
        assert part.scored_Na[part.place_A].tolist() == batch.last_rows_A.tolist()


def test_the_self_test_cuts_long_comparisons() -> None:
    long, short = Items([item(600, 300, 100, seed=1), item(5, 0, 3, seed=2)]), 50
    cut = Shortened(long, short).comparison(0)
    assert (len(cut.prefix), *map(len, cut.tails)) == (30, 15, 5)
    assert (cut.prefix == long[0].prefix[:30]).all() and (cut.tails[1] == long[0].tails[1][:5]).all()
    assert Shortened(long, short).comparison(1) is long[1]


# --- what is refused --------------------------------------------------------------------------------------------------


# A group that refuses before it communicates.
ALONE = ContextGroup(None, 0, 2)  # type: ignore[arg-type]


def random_model(name: str, arguments: dict[str, Any]) -> RewardModel:
    hf_model = new_classifier(getattr(transformers, name)(**arguments))
    model = RewardModel(hf_model.base_model, hf_model.score, pad_token_id=1)
    model.context = ALONE
    return model


def test_recurrent_layers_are_refused() -> None:
    model = random_model(*RECURRENT["qwen3_5"])
    with pytest.raises(UserError, match=r"^parallel.context: this model has recurrent layers, whose state"):
        choose_path(model, odd_items(), [0, 1], CPU)


def test_rotations_that_depend_on_the_length_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    backbone = random_model("LlamaConfig", {**GROUPED, "rope_parameters": rope}).backbone
    check_split(backbone, 96)
    with pytest.raises(UserError, match=r"\(dynamic\) depends on the length of texts of more than 96 tokens"):
        check_split(backbone, 97)


def test_the_padded_path_is_refused() -> None:
    with pytest.raises(UserError, match=r"parallel.context needs a packed row: model.attention cannot be padded"):
        load_config(None, [*NEEDED, "parallel.context=2", "model.attention=padded"])


def test_attention_that_cannot_be_replaced_is_refused() -> None:
    model = random_model(*MASKED)
    with pytest.raises(UserError, match=r"no path is exact with model.attention=auto and parallel.context=2: shared"):
        choose_path(model, odd_items(), [0, 1], CPU)


def test_ranks_that_form_no_groups_are_refused() -> None:
    with pytest.raises(UserError, match=r"parallel.context=4: 6 processes cannot form groups of 4"):
        with_context(World(0, 6, 0, 6, CPU), 4)
