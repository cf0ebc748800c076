"""`data.train.keep`: which rows an expression keeps, how the others are counted, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rmcore.config import UserError, load_config
from rmcore.data.prepare import PreparedData, describe, prepare_data
from rmcore.data.synthetic import byte_tokenizer

NUMBERS = [1.5, -0.2, None, 0.0, 3.0, 2.0, None, -1.0, 0.5, 9.0]


def rows() -> list[dict[str, Any]]:
    return [
        {"prompt": f"p{n} ", "chosen": f"c{n}", "rejected": f"r{n}", "source": "ab"[n % 2], "reward_margin": number}
        for n, number in enumerate(NUMBERS)
    ]


@pytest.fixture(params=["jsonl", "parquet"])
def pool(request: Any, tmp_path: Path) -> Path:
    path = tmp_path / f"pool.{request.param}"
    if request.param == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows()), path)
    return path


def prepared(pool: Path, *more: str) -> PreparedData:
    fixed = ["model.name=synthetic", f"data.train.path={pool}", "data.template=none", f"data.cache={pool.parent}/cache"]
    config = load_config(None, [*fixed, *more])
    data = prepare_data(config, byte_tokenizer(), None)
    describe(data, config)
    return data


def kept(data: PreparedData) -> list[str]:
    tokenizer = byte_tokenizer()
    return [tokenizer.decode(data.train.comparison(n).prefix).split()[0] for n in range(len(data.train))]


CASES = [
    ("reward_margin > 0", [0, 4, 5, 8, 9], {"not wanted by keep": 3, "no value for keep": 2}),
    ("reward_margin is none or reward_margin < 0", [1, 2, 6, 7], {"not wanted by keep": 6}),
    ('reward_margin is not none and 0 < reward_margin < 5 and source == "a"', [0, 4, 8], {"not wanted by keep": 7}),
    ('source in ["b"] and prompt | length == 3', [1, 3, 5, 7, 9], {"not wanted by keep": 5}),
]


@pytest.mark.parametrize(("expression", "expected", "dropped"), CASES, ids=[case[0] for case in CASES])
def test_rows_are_kept_and_the_others_are_counted(pool: Path, expression: str, expected: list[int], dropped) -> None:
    data = prepared(pool, f"data.train.keep='{expression}'")
    assert kept(data) == [f"p{n}" for n in expected]
    report = data.train.report
    assert report["dropped"] == dropped and report["rows"] == 10 == report["kept"] + sum(dropped.values())


def test_amount_and_held_out_rows_are_of_those_kept(pool: Path) -> None:
    data = prepared(pool, "data.train.keep='reward_margin > 0'", "data.train.amount=2.0", "data.eval_fraction=0.4")
    assert data.eval is not None
    assert len(data.train) + len(data.eval) == 10, "five rows, each twice"
    assert data.train.report["dropped"] == {"not wanted by keep": 3, "no value for keep": 2}
    assert data.eval.report["dropped"] == {}


def test_the_cache_knows_the_expression(pool: Path) -> None:
    first = prepared(pool, "data.train.keep='reward_margin > 0'").train.report
    again = prepared(pool, "data.train.keep='reward_margin is not none and reward_margin > 0'").train.report
    assert first["dropped"] != again["dropped"], "the same rows, but counted in another way"
    assert len(list((pool.parent / "cache" / "tokens").glob("*/meta.json"))) == 2
    prepared(pool, "data.train.keep='reward_margin > 0'")
    assert len(list((pool.parent / "cache" / "tokens").glob("*/meta.json"))) == 2


REFUSED = [
    ("reward_margin >", r"data.train.keep: 'reward_margin >' is not an expression"),
    (
        "margin > 0",
        r"data.train.keep: 'margin > 0' reads margin, which no row has; found prompt, chosen, rejected, sou",
    ),
    ("reward_margin > 99", r"data.train.keep: 'reward_margin > 99' is true for no row of .*pool"),
    ("prompt", r"data.train.keep: 'prompt' must be true or false, not 'p0 ' \(.*pool.*1\)"),
    ("prompt > 3", r"data.train.keep: 'prompt > 3' cannot be computed for .*pool.*1 \(prompt is 'p0 '\): '>' not sup"),
    ("prompt.__class__.__mro__ == 3", r"cannot be computed for .*unsafe"),
    ("range(3) == 3", r"reads range, which no row has"),
    ("1 }}{% for x in y %}", r"is not an expression"),
    ("9 ** (10 ** 9) > reward_margin", r"cannot be computed for .*pool.*1 .*more than 4096 bits"),
    ("prompt * 10**12 == source", r"cannot be computed for .*pool.*1 .*writes or computes more than"),
    ('("x" * 10**12) | length > 3', r"cannot be computed for .*pool.*1 .*writes or computes more than"),
    ("(" * 4000 + "1" + ")" * 4000 + " > 0", r"is not an expression: .*recursion"),
    ("1" * 9000 + " > 0", r"is not an expression: "),
    ("1 == 1 or " * 1100, r"has 11,000 characters; at most 10,000 are read"),
]


@pytest.mark.parametrize(("expression", "message"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_is_refused(pool: Path, expression: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepared(pool, f"data.train.keep='{expression}'")


def test_a_config_without_the_key_is_dumped_without_it() -> None:
    """Checkpoints of versions without the key fit: the train data decide the identity of a run."""
    config = load_config(None, ["model.name=m", "data.train.path=p"])
    assert "keep" not in config.model_dump(mode="json")["data"]["train"][0]
