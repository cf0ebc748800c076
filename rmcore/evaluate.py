"""`rmcore evaluate MODEL DATA [--against MODEL] [--json] [key=value ...]`: metrics of reward models on a data set.

Input: a directory made by rmcore (or any *ForSequenceClassification directory or hub id with one output), and any data
source. Output: a table, or with --json one JSON object: the metrics of rmcore/evaluation/metrics.py, and the same by
source under `sources`.
Example: `rmcore evaluate runs/hh/model pairs.jsonl data.max_tokens=512 --json` prints
{"accuracy": 0.684, "count": 190, ...}. With `--against runs/old/model` it prints {"models": {MODEL: {...}, ...},
"comparison": {"differences": [{"difference": 0.021, "low": ..., "high": ..., "p": 0.03, ...}], ...}}.

The template, lengths and precision are those of the training (rmcore_config.yaml in MODEL) unless overridden. Runs in
one process or under torchrun.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rmcore.config import UserError
from rmcore.config.schema import Config
from rmcore.evaluation.metrics import aligned, sentences, table
from rmcore.evaluation.rewardbench import rewardbench_lines
from rmcore.host.command import run_command
from rmcore.host.files import finite
from rmcore.host.terminal import print_text

if TYPE_CHECKING:
    from rmcore.parallel.world import World
    from rmcore.report.content import Report

ABOUT = "Accuracy, loss, rewards and margin of a trained reward model on preference data, overall and by source."


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 1 failed while running, 2 refused (config, data, files)."""
    parser = argparse.ArgumentParser(prog="rmcore evaluate", description=ABOUT)
    parser.add_argument("model", metavar="MODEL", help="directory or hub id of a reward model")
    parser.add_argument("data", metavar="DATA", help="preference data: file, directory, glob, hub id or `synthetic`")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="data.split=test, batch.tokens=8192, ...")
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="MODEL",
        help="another model to compare with on the same pairs (may be repeated): is MODEL better, and by how much?",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--rewardbench",
        choices=("auto", "1", "2", "off"),
        default="auto",
        help="score by RewardBench's rules; auto (default): if the columns are those of its data",
    )
    parser.add_argument(
        "--report", metavar="FILE", help="write a page of metrics and pictures (HTML), which needs no network"
    )
    parser.add_argument("--png", metavar="DIRECTORY", help="also write the pictures of the report as PNG files")
    parser.add_argument("--prior-sets", metavar="DATA", help="the prior sets of RewardBench 1: hub id, directory, file")
    arguments = parser.parse_intermixed_args(argv)

    from rmcore.evaluation.trained import evaluation_config
    from rmcore.parallel.world import running_world

    def work() -> None:
        names = [arguments.model, *arguments.against]
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"--against: {repeated[0]} is given twice")
        configs = {name: evaluation_config(name, arguments.data, arguments.overrides) for name in names}
        first = configs[arguments.model]
        with running_world(first.parallel.timeout_seconds, first.run.seed) as world:
            reports = {
                name: evaluate_files(config, world, arguments.rewardbench, arguments.prior_sets)
                for name, config in configs.items()
            }
            if not world.is_main:
                return
            output = output_of(reports, first.run.seed)
            print_text(json.dumps(finite(output.values)) if arguments.json else output.text)
            if arguments.report or arguments.png:
                write(output, arguments.report, arguments.png)

    return run_command("rmcore evaluate", work)


def evaluate_files(config: Config, world: World, rewardbench: str = "off", prior_sets: str | None = None) -> Report:
    """Evaluate `config.model` on `config.data.train`; the report is the same on every rank. A collective.

    rewardbench, prior_sets: see rmcore.evaluation.rewardbench_data.with_rewardbench; the scores are the metric
    `rewardbench`.
    """
    import numpy as np

    from rmcore.data.prepare import describe, prepare_data
    from rmcore.data.tokens.tokenizer import load_tokenizer
    from rmcore.evaluation.arrays import answer_arrays, pair_arrays
    from rmcore.evaluation.own_metrics import add_own_metrics
    from rmcore.evaluation.rewardbench_data import fold_ties, with_rewardbench
    from rmcore.evaluation.samples import sample_rows
    from rmcore.evaluation.trained import TrainedModel, on_one_day
    from rmcore.model.backbone import load_model_config, position_limit
    from rmcore.parallel.precision import bf16_of_all, with_precision
    from rmcore.parallel.world import first_error
    from rmcore.report.content import Report, environment

    source = config.data.train[0].path
    config, precision_lines = with_precision(config, bf16_of_all(world))
    config, version = first_error(
        world, "looking at the data", lambda: with_rewardbench(config, rewardbench, prior_sets)
    )
    config = on_one_day(config, world)
    tokenizer = first_error(world, "loading the tokenizer", lambda: load_tokenizer(config))
    hf_config = first_error(world, "loading the model's config", lambda: load_model_config(config.model))
    positions = position_limit(hf_config)
    prepared = first_error(world, "preparing the data", lambda: prepare_data(config, tokenizer, positions))
    data = prepared.train
    trained = first_error(world, "loading the model", lambda: TrainedModel.load(config, tokenizer, world.device))
    line = first_error(world, "the self-test", lambda: trained.choose_path(data))
    evaluation = trained.evaluate(data, world, version)
    add_own_metrics(evaluation, data, config.run.metrics)
    rewards_A = evaluation.rewards_A
    by_section = data if version is None else fold_ties(data)
    return Report(
        title=f"{config.model.name} on {source}",
        facts={"model": config.model.name, "data": source, "template": config.data.template},
        metrics=evaluation.metrics,
        pairs=pair_arrays(by_section, rewards_A),
        answers=answer_arrays(by_section, rewards_A),
        samples=sample_rows(data, rewards_A, tokenizer, config.log.samples),
        drops={source: data.report},
        notes=[describe(prepared, config), line, *precision_lines],
        config_yaml=config.dump_yaml(),
        environment=environment(world.device.type, world.size),
        prompt_N=np.array(data.prompt_hash),
    )


class Output(NamedTuple):
    """What the command prints, with --json (`values`) or without it (`text`), and the function that writes its page."""

    values: dict[str, Any]
    text: str
    write: Callable[[Path | None, Path | None], None]


def output_of(reports: Mapping[str, Report], seed: int) -> Output:
    """The evaluation of one model, or the comparison of several, by their names."""
    from rmcore.report.comparison import comparison_report, comparison_text, write_comparison
    from rmcore.report.write import write_report

    [first, *others] = reports.values()
    if not others:
        return Output(dict(first.metrics), as_text(first), partial(write_report, first))
    compared = comparison_report(reports, seed)
    values = {"models": dict(compared.models), "comparison": dict(compared.comparison)}
    return Output(values, comparison_text(compared), partial(write_comparison, compared))


def write(output: Output, page: str | None, pictures: str | None) -> None:
    """Write the page and the pictures, if they are wanted. Raises UserError if they cannot be written."""
    try:
        output.write(Path(page) if page else None, Path(pictures) if pictures else None)
    except OSError as error:
        raise UserError(f"cannot write the report to {page or pictures}: {error.strerror or error}") from None


def as_text(report: Report) -> str:
    """Notes, a table of the metrics overall and by source, RewardBench's scores, and a line each on further metrics."""
    lines = [*report.notes, *aligned(*table(report.metrics, "evaluate"))]
    if "rewardbench" in report.metrics:
        lines += rewardbench_lines(report.metrics["rewardbench"])
    return "\n".join([*lines, *sentences(report.metrics)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
