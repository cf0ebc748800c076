"""The record of each strategy: complete, true of its implementation, and the only thing that code asks about it."""

import ast
import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from rmcore.config import load_config
from rmcore.config.parallel import TRAITS, Name
from rmcore.parallel.world import running_world
from rmcore.training.assembly import assemble
from tests.harness.paths import ROOT
from tests.harness.ranks import run_ranks

RUN = [
    "model.name=synthetic",
    "model.init=random",
    "data.train.path=synthetic",
    "data.template=none",
    "data.max_tokens=512",
    "data.limit=8",
    "run.evals=0",
]


def test_every_strategy_has_a_record() -> None:
    assert sorted(TRAITS) == sorted(get_args(Name))


def parts_of_a_strategy(rendezvous: str, names: list[str]) -> dict[str, list[float]]:
    """Of each strategy: this rank's share of the weights, of the gradients and of AdamW's averages, after a step."""
    torch.set_num_threads(1)
    shares = {}
    with running_world(60, 1, init_method=rendezvous) as world:
        for name in names:
            run = assemble(load_config(None, [*RUN, f"parallel.strategy={name}"]), world)
            strategy = run.strategy
            total = sum(torch.Size(shape).numel() for shape in strategy.shapes().values())
            parameters = list(strategy.named_parameters().values())
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            strategy.optimizer.step()
            averages = [state["exp_avg"] for state in strategy.adamw.state.values()]
            gradients = [parameter.grad for parameter in parameters]
            shares[name] = [sum(map(local_size, part)) / total for part in (parameters, gradients, averages)]
    return shares


def local_size(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).numel()


@pytest.mark.distributed
def test_the_records_are_true_of_two_ranks(tmp_path: Path) -> None:
    results = [result.value for result in run_ranks(parts_of_a_strategy, 2, tmp_path, list(TRAITS))]
    for name, traits in TRAITS.items():
        expected = [traits.shards_weights, traits.shards_weights, traits.shards_optimizer]
        for weights, gradients, averages in (result[name] for result in results):
            assert [weights < 0.9, gradients < 0.9, averages < 0.9] == expected, name


def compared_names(source: str) -> list[str]:
    """Lines in which a strategy is recognised by its name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            texts = [constant.value for constant in ast.walk(node) if isinstance(constant, ast.Constant)]
            if any(text in TRAITS for text in texts if isinstance(text, str)):
                found.append(ast.unparse(node))
    return found


def test_no_code_compares_names_of_strategies() -> None:
    for path in (ROOT / "rmcore").rglob("*.py"):
        if not re.search(r"rmcore/bench/", path.as_posix()):
            assert compared_names(path.read_text(encoding="utf-8")) == [], path
    assert compared_names("if config.parallel.strategy in ('ddp', 'zero1'): pass")
