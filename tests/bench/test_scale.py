"""A billion pairs: the order that is computed and not held in memory; the results of `rmcore.bench scale`."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmcore.bench.scale import balance, extrapolated
from rmcore.data.batches import step_plan as planning
from rmcore.data.batches.step_plan import KeyedOrder


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 5000), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 20))
def test_the_keyed_order_visits_everything_once(count: int, seed: int, epoch: int) -> None:
    assert sorted(KeyedOrder(count, seed, epoch)[:].tolist()) == list(range(count))


def test_each_key_has_its_own_order_and_a_part_needs_no_whole() -> None:
    whole = KeyedOrder(100_000, 5, 0)[:]
    assert (KeyedOrder(100_000, 5, 0)[700:800] == whole[700:800]).all()
    # Two random orders agree in 1 place on average, and so do a random and the natural one (Poisson: 10 or more once in
    # 10^7).
    for other in (KeyedOrder(100_000, 6, 0)[:], KeyedOrder(100_000, 5, 1)[:], np.arange(100_000)):
        assert (whole == other).sum() < 10
    # The correlation of a random order with its places has a standard deviation of 1 / sqrt(N) = 0.0032: 5 of them.
    assert abs(np.corrcoef(whole, np.arange(100_000))[0, 1]) < 0.016
    far = KeyedOrder(10**9, 5, 0)[10**9 - 1000 :]
    assert len(set(far.tolist())) == 1000 and far.min() >= 0 and far.max() < 10**9


def test_a_plan_of_very_many_pairs_holds_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every comparison once per epoch, another order in each epoch, steps in any order, the same at any world size."""
    monkeypatch.setattr(planning, "HELD_AT_MOST", 100)
    one = np.ones(1003, dtype=np.int64)

    def plan(ranks: int) -> planning.Plan:
        return planning.Plan(
            10 * one, 1.0 * one, one, 1.0 * one, pairs_per_step=64, token_budget=100, world_size=ranks, seed=3, epochs=2
        )

    def chosen(step: planning.Step) -> list[int]:
        return sorted(int(number) for rank in step.ranks for numbers in rank for number in numbers)

    two, four = plan(2), plan(4)
    assert two.steps == 32 and two.first() == two.order(0)[0]
    steps = [two.step(index) for index in reversed(range(32))][::-1]
    for epoch in (0, 1):
        parts = steps[16 * epoch : 16 * epoch + 16]
        assert [len(chosen(step)) for step in parts] == [64] * 15 + [43]
        assert sorted(number for step in parts for number in chosen(step)) == list(range(1003))
    assert [chosen(step) for step in steps] == [chosen(four.step(index)) for index in range(32)]
    assert chosen(steps[0]) == sorted(two.order(0)[:64].tolist()) != chosen(steps[16])
    assert (steps[16].episode, steps[-1].episode, steps[-1].epoch) == (1003 + 64, 2006, 2.0)


def test_the_idle_share_is_that_of_the_lengths() -> None:
    alike = balance(np.full(10, 100), 8, 4)
    assert (alike["idle"], alike["micro_batches"]) == (pytest.approx(0.0), 1)
    # one pair per rank, lengths of 100 and 300 in equal parts: all ranks wait for one with 300
    two = balance(np.array([100, 300]), 64, 1)
    assert two["idle"] == pytest.approx(1 / 3, abs=0.06)  # mean 200 of 300; 12 steps of 64: sd 0.5 / sqrt(768) = 0.02


def test_a_start_is_extrapolated_by_its_slope() -> None:
    starts = [
        {"pairs": pairs, "seconds": 1 + pairs / 1e6, "bytes_a_pair": 60.0, "peak_bytes_a_pair": 90.0}
        for pairs in (1e6, 4e6, 16e6)
    ]
    assert extrapolated(starts, 10**9) == {
        "pairs": 10**9,
        "seconds": pytest.approx(1001.0),
        "bytes_a_rank": pytest.approx(60e9),
        "peak_bytes_a_rank": pytest.approx(90e9),
    }
