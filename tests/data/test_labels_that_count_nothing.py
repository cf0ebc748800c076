"""An objective that no row counts for is refused, and numbers that fp32 cannot hold are."""

import json
from pathlib import Path
from typing import Any

import pytest

from rmcore.config import UserError, load_config
from rmcore.data.batches.step_plan import Plan
from rmcore.data.prepare import prepare_data
from rmcore.data.synthetic import byte_tokenizer
from rmcore.data.tokens.comparisons import computed_tokens

PAIRS = [{"prompt": f"p{n} ", "chosen": f"c{n}", "rejected": f"r{n}x", "w": 1.0} for n in range(3)]
JOINT = ["model.outputs=[reward, kind]", "data.train.1.loss={name: regression, output: [kind]}"]


def plan(folder: Path, keys: list[str], *sources: list[dict[str, Any]]) -> Plan:
    given = ["model.name=synthetic", "data.template=none", f"data.cache={folder / 'cache'}"]
    for number, rows in enumerate(sources):
        path = folder / f"{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given.append(f"data.train.{number}.path={path}")
    config = load_config(None, [*given, *keys])
    data = prepare_data(config, byte_tokenizer(), None).train
    return Plan.of(config, data, computed_tokens(data, True), token_budget=1000, world_size=1)


def answers(*kinds: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"q{n} ", "answer": f"a{n}", "score": 1.0, "kind": kind} for n, kind in enumerate(kinds)]


@pytest.mark.parametrize(
    ("keys", "second", "name"),
    [
        (["data.train.1.loss={name: hinge}"], [{**PAIRS[0], "rejected": "c0"}], "hinge"),
        (["data.train.1.loss={name: hinge}", "data.train.1.columns={weight: w}"], [{**PAIRS[0], "w": 0}], "hinge"),
    ],
    ids=["identical answers", "weight 0"],
)
def test_an_objective_without_rows_is_refused(tmp_path: Path, keys: list[str], second: Any, name: str) -> None:
    with pytest.raises(UserError, match=rf"loss.name={name} counts nothing in data.train: no .* is left"):
        plan(tmp_path, keys, PAIRS, second)


def test_rows_without_a_known_cell_are_kept_next_to_others(tmp_path: Path) -> None:
    assert plan(tmp_path, JOINT, PAIRS, answers(None, 2.0, None)).step(0).counts == (3.0, 1.0)


@pytest.mark.parametrize("value", [1e39, -1e300, "4e38"])
def test_numbers_beyond_fp32_are_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(UserError, match=r"0.jsonl:1: w is too large for fp32"):
        plan(tmp_path, ["data.train.0.columns={weight: w}"], [{**PAIRS[0], "w": value}])
