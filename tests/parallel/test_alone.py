"""Each text by itself, under every strategy: ranks whose batches have different numbers of texts run equally often."""

from pathlib import Path

import pytest

from tests.harness.ranks import run_ranks
from tests.harness.walks import STEPS_OF_SEVEN, assert_close, walk

BASE = [*STEPS_OF_SEVEN, "model.name=synthetic", "data.limit=18"]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_take_the_steps_of_one_that_shares_prompts(tmp_path: Path) -> None:
    """They differ from one rank only by the order of fp32 sums (1e-5, see tests/training/test_world_sizes.py).

    Of the seven pairs of a step one rank gets four, so that each forward has another number of texts.
    """
    strategies = [["ddp"], ["zero2", "parallel.recompute=full"], ["zero3"], ["zero3", "parallel.recompute=selective"]]
    strategies.append(["hsdp"])
    variants = [[*BASE, "model.attention=alone", f"parallel.strategy={name}", *more] for name, *more in strategies]
    (one,) = run_ranks(walk, 1, tmp_path / "one", [BASE])
    [(path, expected)] = one.value
    assert path == "attention shared"
    for path, ours in run_ranks(walk, 2, tmp_path / "two", variants)[0].value:
        assert path == "attention alone"
        assert_close(ours, expected, 1e-5)
