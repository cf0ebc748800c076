"""The plan: a step depends only on (seed, step); every comparison comes once; ranks have equally many micro batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmcore.config import UserError, load_config
from rmcore.data.batches.step_plan import Plan, cut
from rmcore.data.tokens.comparisons import EncodedRow, TokenizedComparisons, computed_tokens


def make(tokens, pairs=None, **settings):
    tokens = np.array(tokens, dtype=np.int64)
    pairs = np.ones(len(tokens), dtype=np.int64) if pairs is None else np.array(pairs, dtype=np.int64)
    arguments = {"pairs_per_step": 4, "token_budget": 300, "world_size": 1, "seed": 3, **settings}
    return Plan(tokens, tokens.astype(float), pairs, pairs.astype(float), **arguments)


def pairs_of(steps):
    """The number of pairs of each step, for consecutive steps from the first one."""
    return np.diff([0, *(step.episode for step in steps)]).tolist()


lengths = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(lengths, st.integers(1, 9), st.integers(1, 5), st.integers(300, 900), st.integers(1, 3), st.booleans())
def test_every_comparison_once_an_epoch_within_the_budget_on_aligned_ranks(
    tokens, pairs_per_step, world_size, budget, epochs, shuffle
):
    plan = make(
        tokens,
        pairs_per_step=pairs_per_step,
        world_size=world_size,
        token_budget=budget,
        epochs=epochs,
        shuffle=shuffle,
    )
    steps = list(plan.steps_from(0))
    assert len(steps) == plan.steps == epochs * -(-len(tokens) // pairs_per_step)
    seen = []
    for step in steps:
        assert len(step.ranks) == world_size
        assert len({len(rank) for rank in step.ranks}) == 1
        for micro_batch in (m for rank in step.ranks for m in rank):
            assert sum(tokens[i] for i in micro_batch) <= budget
        seen += sorted(int(i) for rank in step.ranks for m in rank for i in m)
    assert sorted(seen) == sorted(list(range(len(tokens))) * epochs)
    assert steps[-1].episode == len(tokens) * epochs and steps[-1].epoch == epochs


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(1, 9), st.integers(0, 5))
def test_a_step_trains_on_the_same_comparisons_at_any_world_size_and_budget(tokens, pairs_per_step, seed):
    def content(world_size, budget):
        cut = {"world_size": world_size, "token_budget": budget}
        plan = make(tokens, pairs_per_step=pairs_per_step, seed=seed, epochs=2, **cut)
        return [(sorted(int(i) for r in s.ranks for m in r for i in m), s.global_weight) for s in plan.steps_from(0)]

    assert content(1, 300) == content(2, 300) == content(4, 5000)


def plain_steps(plan):
    """The oracle: (pairs, episode, weight, [rank][micro batch]) of every step, by plain loops over lists."""
    episode = 0
    for epoch in range(plan.epochs):
        by_step: dict[int, list[int]] = {}
        before = 0
        for i in plan.order(epoch).tolist():
            by_step.setdefault(before // plan.pairs_per_step, []).append(i)
            before += int(plan.pairs_N[i])
        for chosen in by_step.values():
            pairs = sum(int(plan.pairs_N[i]) for i in chosen)
            episode += pairs
            yield pairs, episode, sum(float(plan.weight_N[i]) for i in chosen), plain_cut(plan, chosen)


def plain_cut(plan, chosen):
    budget, world = plan.token_budget, plan.world_size
    places = sorted(range(len(chosen)), key=lambda place: -float(plan.cost_N[chosen[place]]))
    for micro_batches in range(1, len(chosen) + 1):
        bins: list[list[int]] = [[] for _ in range(world * micro_batches)]
        for place in places:
            tokens = [sum(int(plan.tokens_N[chosen[p]]) for p in inside) for inside in bins]
            cost = [sum(float(plan.cost_N[chosen[p]]) for p in inside) for inside in bins]
            fits = [b for b in range(len(bins)) if tokens[b] + plan.tokens_N[chosen[place]] <= budget]
            if not fits:
                break
            bins[min(fits, key=lambda b: (cost[b], b))].append(place)
        else:
            break
    dealt = sorted(bins, key=lambda inside: -sum(float(plan.cost_N[chosen[p]]) for p in inside))
    ranks: list[list[list[int]]] = [[] for _ in range(world)]
    for number, inside in enumerate(dealt):
        back = number // world % 2
        ranks[world - 1 - number % world if back else number % world].append([chosen[p] for p in sorted(inside)])
    return ranks


comparisons = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 28)), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(comparisons, st.integers(1, 23), st.integers(1, 4), st.integers(300, 1500), st.booleans(), st.booleans())
def test_the_plan_equals_plain_loops(rows, pairs_per_step, world_size, budget, one_pair_each, shuffle):
    """Costs and weights that no float holds exactly, ties, K-wise comparisons, steps of odd sizes, two epochs."""
    tokens = np.array([tokens for tokens, _ in rows], dtype=np.int64)
    pairs = np.array([1 if one_pair_each else pairs for _, pairs in rows], dtype=np.int64)
    plan = Plan(
        tokens, tokens // 30 * 0.1, pairs, 0.3 * pairs, pairs_per_step=pairs_per_step, token_budget=budget,
        world_size=world_size, seed=5, epochs=2, shuffle=shuffle,
    )  # fmt: skip
    expected = list(plain_steps(plan))
    assert plan.steps == len(expected)
    assert pairs_of(plan.steps_from(0)) == [step_pairs for step_pairs, *_ in expected]
    for step, (_, episode, weight, ranks) in zip(plan.steps_from(0), expected, strict=True):
        assert (step.episode, step.epoch) == (episode, episode / pairs.sum())
        # At most 40 weights: 40 roundings of 2**-53 each, whatever the order of summing.
        assert step.global_weight == pytest.approx(weight, rel=40 * 2**-53)
        assert [[m.tolist() for m in rank] for rank in step.ranks] == ranks
        assert all(m.dtype == np.int64 for rank in step.ranks for m in rank)


def test_the_last_partial_batch_is_kept():
    assert pairs_of(make([10] * 10).steps_from(0)) == [4, 4, 2]


def test_steps_can_be_asked_for_in_any_order_and_from_any_position():
    plan = make(range(1, 31), epochs=3)
    whole = [s.ranks for s in plan.steps_from(0)]
    again = make(range(1, 31), epochs=3)
    for index in (17, 3, 8, 0):
        assert all((a == b).all() for a, b in zip(again.step(index).ranks[0], whole[index][0], strict=True))
    assert [s.index for s in again.steps_from(20)] == list(range(20, 24))
    with pytest.raises(IndexError):
        plan.step(24)


def test_epochs_differ_and_seeds_differ_and_unshuffled_keeps_the_files_order():
    plan = make([5] * 50, epochs=2)
    assert (plan.order(0) != plan.order(1)).any()
    assert (plan.order(0) != make([5] * 50, seed=4).order(0)).any()
    assert (make([5] * 50, shuffle=False).order(1) == np.arange(50)).all()


def test_max_steps_ends_in_the_middle_of_an_epoch():
    plan = make([5] * 50, epochs=3, max_steps=15)
    assert plan.steps == 15 and [s.index for s in plan.steps_from(13)] == [13, 14]
    assert plan.step(14).episode == 50 + 2 * 4


def test_a_comparison_with_many_pairs_is_never_cut():
    plan = make([10] * 6, pairs=[1, 21, 3, 1, 1, 1], pairs_per_step=4, shuffle=False)
    contents = [sorted(int(i) for m in s.ranks[0] for i in m) for s in plan.steps_from(0)]
    assert contents == [[0, 1], [2], [3, 4, 5]]  # starting after 0 and 1; 22; 25, 26 and 27 pairs
    assert pairs_of(plan.steps_from(0)) == [sum([1, 21, 3, 1, 1, 1][i] for i in c) for c in contents]


def test_fewer_comparisons_than_ranks_leaves_empty_micro_batches():
    ranks = make([10, 20, 30], world_size=4).step(0).ranks
    assert sorted(len(rank[0]) for rank in ranks) == [0, 1, 1, 1]


def test_a_comparison_longer_than_the_budget_is_refused():
    with pytest.raises(ValueError, match="301 tokens"):
        make([5, 301])


def test_the_plan_of_a_config_counts_what_its_objective_counts():
    """A pair of weight 1/2 and a tie of weight 1/4 add 2 to the size of a global batch and 0.75 to its weight."""
    texts = [np.array([7, tail], dtype=np.int32) for tail in (1, 2, 3)]
    row = EncodedRow(texts[0][:1], texts, [(0, 1)], [0.0], [0.5], ties=[(1, 2)], tie_weight=[0.25])
    data = TokenizedComparisons.of([row] * 6)
    config = load_config(None, ["model.name=x", "data.train.path=y", "batch.pairs=4", "run.epochs=2", "run.seed=3"])
    plan = Plan.of(config, data, computed_tokens(data, share=True), token_budget=8, world_size=2)
    assert plan.steps == 6 and pairs_of(plan.steps_from(0)) == [4] * 6
    step = plan.step(0)
    assert step.global_weight == 2 * 0.75 and len(step.ranks) == 2
    with pytest.raises(UserError, match=r"batch\.tokens=3 is less than the longest comparison \(4 tokens\)"):
        Plan.of(config, data, computed_tokens(data, share=True), token_budget=3, world_size=2)


def test_ranks_are_balanced_on_cost():
    """Largest first is within 4/3 of the best; on real-like lengths it is far closer than dealing in order."""
    generator = np.random.Generator(np.random.PCG64(0))
    tokens = np.minimum(generator.lognormal(5.3, 0.7, size=64), 2000).astype(np.int64)
    ranks = cut(np.arange(64), tokens, tokens.astype(float), 10**9, 8)
    loads = [sum(tokens[i] for m in rank for i in m) for rank in ranks]
    dealt = [tokens[r::8].sum() for r in range(8)]
    assert max(loads) / np.mean(loads) < 1.05 < max(dealt) / np.mean(dealt)
