"""What objectives read besides pairs: every kind of tie, scores up to the batch, and which rows raise an error."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rmcore.config import Config, UserError, load_config
from rmcore.config.loss import TRAITS, LossConfig
from rmcore.data.batches.batch import build_batch
from rmcore.data.batches.counting import size_N
from rmcore.data.formats.comparison import Comparison, comparison_from_row, detect_format
from rmcore.data.formats.requirements import fitted
from rmcore.data.inspection.first_example import show_first_example
from rmcore.data.inspection.statistics import statistics
from rmcore.data.prepare import PreparedData, prepare_data
from rmcore.data.tokens.tokenizer import load_tokenizer
from rmcore.evaluation.arrays import answer_arrays, pair_arrays
from rmcore.evaluation.pair_metrics import pair_metrics
from rmcore.evaluation.samples import sample_rows
from tests.harness.configs import NEEDED, mistakes

TWO = {"prompt": "q", "answer_a": "x", "answer_b": "y"}


def read(row: dict[str, Any], name: str = "davidson") -> Comparison:
    format = detect_format([row], {}, origin="f.jsonl")
    fits = fitted(format, LossConfig(name=name), origin="f.jsonl", key="data.train")  # type: ignore[arg-type]
    return comparison_from_row(row, fits, wants_text=True, source="s", where="f.jsonl:1")


def both(comparison: Comparison) -> tuple[dict, dict]:
    return (
        dict(zip(comparison.pairs, comparison.weight, strict=True)),
        dict(zip(comparison.ties, comparison.tie_weight, strict=True)),
    )


# each row, and its (pairs, ties) with weights: read with ties, and without
TIES: dict[str, tuple[dict[str, Any], tuple[dict, dict], dict]] = {
    "verdict": (TWO | {"winner": "tie"}, ({}, {(0, 1): 1.0}), {}),
    "no tie": (TWO | {"winner": "b"}, ({(1, 0): 1.0}, {}), {(1, 0): 1.0}),
    "equal scores": (TWO | {"score_a": 3, "score_b": 3}, ({}, {(0, 1): 1.0}), {}),
    "probability of a half": (
        TWO | {"probability": 0.5}, ({}, {(0, 1): 1.0}), {(0, 1): 0.5, (1, 0): 0.5},
    ),
    "soft label": (
        TWO | {"probability": 0.75}, ({(0, 1): 0.75, (1, 0): 0.25}, {}), {(0, 1): 0.75, (1, 0): 0.25},
    ),
    "votes": (
        TWO | {"votes": ["a", "a", "tie", "b"]}, ({(0, 1): 0.5, (1, 0): 0.25}, {(0, 1): 0.25}),
        {(0, 1): 0.625, (1, 0): 0.375},
    ),
    "votes for neither alone": (TWO | {"votes": ["tie"]}, ({}, {(0, 1): 1.0}), {(0, 1): 0.5, (1, 0): 0.5}),
    "equal ranks": (
        {"prompt": "q", "answers": ["x", "y", "z"], "ranks": [1, 2, 2]},
        ({(0, 1): 1 / 3, (0, 2): 1 / 3}, {(1, 2): 1 / 3}), {(0, 1): 1 / 3, (0, 2): 1 / 3},
    ),
    "chosen and rejected of one score": (
        {"prompt": "q", "chosen": "x", "rejected": "y", "score_chosen": 7.5, "score_rejected": 7.5},
        ({}, {(0, 1): 1.0}), {(0, 1): 1.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TIES)
def test_ties_are_read_by_the_objectives_that_know_them(case: str) -> None:
    row, with_ties, without = TIES[case]
    for name, traits in TRAITS.items():
        if traits.scores or not traits.soft:
            continue
        assert both(read(row, name)) == (with_ties if traits.ties else (without, {})), name


def test_scores_are_kept_for_the_objective_that_reads_them() -> None:
    rows = {
        "scores": {"prompt": "q", "answers": ["x", "y", "z"], "scores": [1, 2.5, 2.5]},
        "a, b": TWO | {"score_a": 3, "score_b": 3},
        "pair": {"prompt": "q", "chosen": "x", "rejected": "y", "score_chosen": 4, "score_rejected": 2},
        "one": {"prompt": "q", "response": "x", "helpfulness": 3},
    }
    found = {kind: read(row, "regression").scores for kind, row in rows.items()}
    assert found == {"scores": (1, 2.5, 2.5), "a, b": (3, 3), "pair": (4, 2), "one": (3,)}
    assert all(read(row).scores == () for kind, row in rows.items() if kind != "one")


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("regression", {"prompt": "q", "chosen": "x", "rejected": "y"}, ["needs a score of each answer", "explicit"]),
        ("regression", TWO | {"winner": "a"}, ["needs a score of each answer"]),
        ("regression", {"prompt": "q", "answers": ["x", "y"], "ranks": [1, 2]}, ["ranks, which say only the order"]),
        ("plackett_luce", TWO | {"probability": 0.7}, ["needs rankings", "bradley_terry"]),
        ("plackett_luce", TWO | {"votes": ["a"]}, ["needs rankings", "votes"]),
    ],
)
def test_rows_that_an_objective_cannot_be_trained_on(name: str, row: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        read(row, name)
    assert all(part in str(refused.value) for part in [*says, "f.jsonl", f"loss.name={name}"])


# ---- through the cache to the batch


def prepared(tmp_path: Path, rows: list[dict[str, Any]], *overrides: str) -> PreparedData:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(tmp_path, f"data.train.path={path}", *overrides)
    return prepare_data(config, load_tokenizer(config), None)


def config_of(tmp_path: Path, *overrides: str) -> Config:
    return load_config(None, ["model.name=synthetic", "data.template=none", "data.max_tokens=64",
                              f"data.cache={tmp_path / 'cache'}", *overrides])  # fmt: skip


HELPFUL = [
    {"prompt": "one ", "response": "good", "helpfulness": 4},
    {"prompt": "two ", "response": "same", "helpfulness": 2},
    {"prompt": "one ", "response": "bad", "helpfulness": 1},
    {"prompt": "two ", "response": "equal", "helpfulness": 2},
    {"prompt": "three ", "response": "alone", "helpfulness": 0},
    {"prompt": "four ", "response": "twice", "helpfulness": 3},
    {"prompt": "four ", "response": "twice", "helpfulness": 4},
]


def test_regression_keeps_every_scored_answer_and_pairs_only_those_that_differ(tmp_path: Path) -> None:
    data = prepared(tmp_path, HELPFUL, "loss.name=regression").train
    assert data.report["rows"] == data.report["kept"] == data.report["scored_answers"] == 7
    assert data.score.tolist() == [4, 1, 2, 2, 0, 3, 4] and data.pairs_N.tolist() == [1, 0, 0, 0]
    assert size_N(data, "answers").tolist() == [2, 2, 1, 2]
    batch = build_batch(data, [3, 0])
    assert batch.score_A.tolist() == [3, 4, 4, 1] and batch.winner_P.tolist() == [2]


def test_the_same_rows_for_other_objectives(tmp_path: Path) -> None:
    pairs = prepared(tmp_path, HELPFUL).train
    assert (pairs.report["pairs"], pairs.report["ties"], pairs.report["kept"]) == (1, 0, 2)
    assert pairs.report["dropped"] == {"nothing preferred": 3, "identical answers": 2} and np.isnan(pairs.score).all()
    ties = prepared(tmp_path, HELPFUL, "loss.name=rao_kupper").train
    assert (ties.report["pairs"], ties.report["ties"], ties.report["kept"]) == (1, 1, 4)
    batch = build_batch(ties, [1, 0])
    assert (batch.tie_a_Q.tolist(), batch.tie_b_Q.tolist(), batch.tie_weight_Q.tolist()) == ([0], [1], [1.0])
    assert (batch.winner_P.tolist(), batch.loser_P.tolist()) == ([2], [3])
    assert size_N(ties, "pairs").tolist() == [1, 1]
    assert len(list((tmp_path / "cache" / "tokens").glob("*/meta.json"))) == 2  # each objective has its own entry


def test_ties_survive_gathering_by_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": "p ", "answer_a": a, "answer_b": b, "winner": w} for a, b, w in
            (("x", "y", "a"), ("y", "z", "tie"), ("z", "x", "b"))]  # fmt: skip
    data = prepared(tmp_path, rows, "loss.name=davidson", "data.group_by_prompt=true").train
    one = data.comparison(0)
    assert len(data) == 1 and one.pairs.tolist() == [[0, 1], [0, 2]] and one.ties.tolist() == [[1, 2]]


def test_evaluation_data_need_no_scores(tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"prompt": "p ", "chosen": "x", "rejected": "y"}) + "\n")
    data = prepared(tmp_path, HELPFUL, "loss.name=regression", f"data.eval.path={held}")
    assert data.eval is not None and math.isnan(data.eval.score[0]) and data.eval.report["pairs"] == 1


# ---- the section loss


def test_keys_that_an_objective_does_not_use_are_refused(tmp_path: Path) -> None:
    assert mistakes(tmp_path, None, [*NEEDED, "loss.name=hinge", "loss.tie_rate=0.3"]) == [
        "override `loss.tie_rate=0.3`: loss.tie_rate has no effect on loss.name=hinge, which uses loss.centering, "
        "loss.label_smoothing, loss.log_barrier, loss.margin"
    ]
    assert mistakes(tmp_path, None, [*NEEDED, "loss.name=regression", "loss.margin=data"]) == [
        "override `loss.margin=data`: loss.margin has no effect on loss.name=regression, which uses no other key of "
        "loss"
    ]
    [line] = mistakes(tmp_path, None, [*NEEDED, "loss.name=plackett_luce", "data.group_by_prompt=true"])
    assert line.startswith("override `data.group_by_prompt=true`: data.group_by_prompt merges rows of pairs")
    for name in TRAITS:
        output = ["model.outputs=[a, b]", "loss.output=[a, b]"] if TRAITS[name].outputs == "several" else []
        config = load_config(None, [*NEEDED, f"loss.name={name}", "loss.tie_rate=0.25", *output])  # defaults are fine
        path = tmp_path / "dump.yaml"
        path.write_text(config.dump_yaml())
        assert load_config(str(path), []) == config


def test_data_without_any_pair_can_be_shown_and_evaluated(tmp_path: Path) -> None:
    data = prepared(tmp_path, HELPFUL[4:5] + HELPFUL[1:2] + HELPFUL[3:4], "loss.name=regression").train
    assert data.report["pairs"] == 0 and len(data) == 2
    tokenizer, console = (
        load_tokenizer(config_of(tmp_path, "data.train.path=x")),
        Console(file=io.StringIO(), width=200),
    )
    for number in range(2):
        show_first_example(data.comparison(number), tokenizer, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "answer 1, " in shown and "scored tokens: answer 1 '<eos>' (id 1), answer 2 '<eos>'" in shown
    rewards = np.zeros(int(data.answer_offset[-1]))
    arrays = (pair_arrays(data, rewards), answer_arrays(data, rewards))
    assert sample_rows(data, rewards, tokenizer, 10) == [] and pair_metrics(*arrays)["count"] == 0
    with pytest.raises(UserError, match="no row prefers one answer"):
        statistics(data)
