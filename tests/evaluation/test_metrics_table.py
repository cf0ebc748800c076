"""Compares the table of metrics with README.md of its folder and the log of a run, and checks how it prints metrics."""

import json
import re

import numpy as np
import pytest

from rmcore.evaluation.metrics import EVALUATION, TRAINING, Metric, console_line, sentences, table, tiles
from rmcore.evaluation.pair_metrics import PairArrays, pair_metrics
from tests.harness.paths import ROOT
from tests.harness.ranks import run_ranks, train_rank

POSITION = {"step", "episode", "epoch"}


def documented() -> dict[str, list[tuple[str, str]]]:
    """Name and meaning in each table of README.md, by the heading or the line above the table."""
    text = (ROOT / "rmcore" / "evaluation" / "README.md").read_text(encoding="utf-8")
    tables: dict[str, list[tuple[str, str]]] = {}
    title = ""
    for line in text.splitlines():
        if line.startswith("## ") or line == "These are not logged:":
            title = line.removeprefix("## ")
        elif match := re.fullmatch(r"\| `([\w/]+)` \| (.+) \|", line):
            tables.setdefault(title, []).append((match[1], match[2]))
    return tables


def test_the_readme_is_the_table() -> None:
    def entries(metrics: list[Metric]) -> list[tuple[str, str]]:
        return [(metric.name, metric.meaning) for metric in metrics]

    assert documented() == {
        "Metrics of the training": [(metric.log_name, metric.meaning) for metric in TRAINING],
        "Metrics of an evaluation": entries([metric for metric in EVALUATION if metric.logged]),
        "These are not logged:": entries([metric for metric in EVALUATION if not metric.logged]),
    }


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """metrics.jsonl of the embedded task: two steps and an evaluation, with an objective other than the plain loss."""
    directory = tmp_path_factory.mktemp("run")
    arguments = [str(ROOT / "configs" / "quickstart.yaml"), f"run.dir={directory}", "data.limit=64", "run.max_steps=2"]
    arguments += ["run.evals=1", "log.every=1", "log.tensorboard=false", "log.report=none", "loss.centering=0.01"]
    run_ranks(train_rank, 1, directory / "ranks", arguments)
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_logs_what_the_table_says(log: list[dict[str, float]]) -> None:
    """Every key of the log is in the table. Of the table, only what a CPU and pairs cannot have is not in the log."""
    steps, evaluations = (
        [line for line in log if "grad_norm" in line],
        [line for line in log if "grad_norm" not in line],
    )
    assert len(steps) == 2 and len(evaluations) == 1
    for line in steps:
        missing = {metric.log_name for metric in TRAINING} - line.keys()
        assert line.keys() - POSITION <= {metric.log_name for metric in TRAINING}
        keys = {f"train/rm/{name}" for name in ("head_lr", "sft_loss", "router_balance", "length_correlation")}
        assert missing == {*keys, "mfu"}, "without their keys; only on a GPU whose peak is known"
    logged = {metric.log_name for metric in EVALUATION if metric.logged}
    assert evaluations[0].keys() - POSITION <= logged
    missing = logged - evaluations[0].keys()
    assert {name for name in missing if "rewardbench" not in name} == {"eval/rm/best_of_k_accuracy"}, "two answers"


def test_the_table_says_which_metrics_may_be_missing(log: list[dict[str, float]]) -> None:
    often = {metric.log_name for metric in (*TRAINING, *EVALUATION) if metric.logged and not metric.sometimes}
    assert often <= set().union(*log)
    assert {metric.name for metric in TRAINING if metric.sometimes} == {
        "head_lr",
        "sft_loss",
        "router_balance",
        "length_correlation",
        "mfu",
    }


def evaluation(best_of_k: bool = False) -> dict:
    """Metrics of 2,000 pairs from two sources, the second of which has only pairs of weight 0."""
    generator = np.random.Generator(np.random.PCG64(1))
    number, source = np.arange(2000), (np.arange(2000) >= 1990).astype(int)
    chosen, rejected = generator.normal(0.5, 1, 2000), generator.normal(0, 1, 2000)
    lengths = generator.integers(1, 90, (2, 2000))
    pairs = PairArrays(
        chosen, rejected, 1.0 - source, *lengths, number, 2 * number, 2 * number + 1, source, ("a", "none")
    )
    found = pair_metrics(pairs)
    more = {"best_of_k_accuracy": 0.5, "best_of_k_chance": 0.25, "best_of_k_count": 1200}
    return {**found, **more} if best_of_k else found


def test_the_console_line() -> None:
    line = console_line({"train/rm/loss": 0.5, "grad_norm": 1.25, "train/rm/lr": 2e-6, "step_seconds": 1.0})
    assert line == "loss 0.5000 lr 2.00e-06 grad_norm 1.25"
    logged = {"eval/rm/accuracy": 0.75, "eval/rm/accuracy_low": 0.7, "eval/rm/accuracy_high": 0.8, "eval/rm/count": 8}
    assert console_line(logged) == "accuracy 0.7500 from 0.7000 to 0.8000 pairs 8"


def test_tables_have_the_rows_and_columns_that_hold_something() -> None:
    metrics = evaluation()
    heads, rows = table(metrics, "card")
    assert heads == ["", "pairs", "accuracy", "95 % interval", "longer answer", "loss"]
    assert [row[0] for row in rows] == ["all", "a", "none"]
    assert rows[0][1:3] == ["2,000", f"{metrics['accuracy']:.4f}"]
    assert rows[0][3] == f"{metrics['accuracy_low']:.4f} to {metrics['accuracy_high']:.4f}"
    assert rows[2][1:] == ["10", "-", "-", "-", "-"], "a source whose pairs have no weight"
    assert "best of k" not in table(metrics, "page")[0]
    assert table(evaluation(best_of_k=True), "page")[0][-1] == "best of k"
    one_source = {**metrics, "sources": {"a": metrics["sources"]["a"]}}
    assert len(table(one_source, "card")[1]) == 1, "its row would repeat the first"


def test_tiles_and_sentences() -> None:
    metrics = evaluation(best_of_k=True)
    shown = {label: (value, note) for label, value, note in tiles(metrics)}
    interval = f"{metrics['accuracy_low']:.3f} to {metrics['accuracy_high']:.3f}"
    assert shown["accuracy"] == (f"{metrics['accuracy']:.3f}", interval)
    assert shown["pairs"] == ("2,000", "2 sources") and shown["best of k"] == ("0.500", "chance 0.250")
    assert sentences(metrics, card=True)[-1] == (
        "Best of 3 answers or more: 0.5000 of 1,200 comparisons (chance 0.2500)."
    )
    assert len(sentences(metrics)) > len(sentences(metrics, card=True))
    # The log, and so the card of `rmcore export`, has best_of_k_accuracy without the number of comparisons.
    del metrics["best_of_k_count"]
    assert not [sentence for sentence in sentences(metrics, card=True) if "Best of" in sentence]
