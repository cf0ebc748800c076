"""All ranks train by one plan, although each rank has its own memory and its own command line."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rmcore.config import UserError, load_config
from rmcore.cost.memory import Fit
from rmcore.parallel.world import running_world
from rmcore.tracking.tracker import Tracker
from rmcore.train import train
from rmcore.training import assembly
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.distributed

COMPARISONS = 48
RUN = [
    "model.name=synthetic",
    "model.init=random",
    "data.train.path=synthetic",
    "data.template=none",
    "data.max_tokens=512",
    f"data.limit={COMPARISONS}",
    "batch.pairs=16",
    "parallel.precision=fp32",
    "run.evals=0",
    "run.save_minutes=null",
]


def train_with_own_memory(rendezvous: str, fits: list[tuple[int, str]]) -> dict[str, Any]:
    """A run on this rank, whose memory allows `fits[rank]`; returns the comparisons that it trained, by micro batch."""
    torch.set_num_threads(1)
    trained: list[list[int]] = []
    with running_world(60, 1, init_method=rendezvous) as world:
        assembly.fit = lambda *_: Fit(*fits[world.rank])  # type: ignore[assignment]
        run = assembly.assemble(load_config(None, RUN), world)
        run.strategy.model.register_forward_pre_hook(lambda _, given: trained.append(given[0].comparisons_C.tolist()))
        train(run, Tracker())
    return {"trained": trained, "budget": run.token_budget, "lines": run.lines}


def test_ranks_with_other_budgets_train_every_pair_exactly_once(tmp_path: Path) -> None:
    results = [result.value for result in run_ranks(train_with_own_memory, 2, tmp_path, [(300, "none"), (437, "full")])]
    assert [result["budget"] for result in results] == [300, 300], "the least budget"
    assert all("recompute full" in result["lines"][-1] for result in results), "the most frugal recompute"
    assert len(results[0]["trained"]) == len(results[1]["trained"]) > 3, "several micro batches per step, as many each"
    together = [number for result in results for batch in result["trained"] for number in batch]
    assert sorted(together) == list(range(COMPARISONS))


def assemble_with_own_command(rendezvous: str, overrides: list[list[str]]) -> str:
    torch.set_num_threads(1)
    with running_world(60, 1, init_method=rendezvous) as world:
        try:
            assembly.assemble(load_config(None, [*RUN, *overrides[world.rank]]), world)
        except UserError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ("batch.pairs=8", "  batch.pairs: 16 on rank 0, 8 on rank 1"),
        ("run.seed=2", "  run.seed: 1 on rank 0, 2 on rank 1"),
        ("data.limit=47", "  the fingerprint of data.train: "),
        (
            "model.attention=padded",
            '  the attention that the self-test chose (set model.attention): "shared" on rank 0',
        ),
    ],
)
def test_another_plan_on_one_rank_is_refused_on_all(tmp_path: Path, own: str, line: str) -> None:
    first, second = (result.value for result in run_ranks(assemble_with_own_command, 2, tmp_path, [[], [own]]))
    assert first == second and first.startswith("the ranks do not have the same plan") and line in first


def test_settings_of_a_host_may_differ(tmp_path: Path) -> None:
    own = [f"data.cache={tmp_path / 'cache'}", "log.tensorboard=false", "run.dir=elsewhere"]
    assert [result.value for result in run_ranks(assemble_with_own_command, 2, tmp_path / "ranks", [[], own])] == [
        "",
        "",
    ]
