"""`rmcore evaluate MODEL DATA [--json] [key=value ...]`: figures of a trained reward model on a data set.

In: a directory made by rmcore (or any *ForSequenceClassification directory or hub id with one output), and any data
source. Out: a table, or with --json one JSON object: accuracy, loss, chosen_rewards, rejected_rewards, reward_margin,
count, calibration, correlation with length, best of k (rmcore/evaluation/pair_metrics.py), and the same under
`sources` by source.
Runs on one process or under torchrun.

Example: `rmcore evaluate runs/hh/model pairs.jsonl data.max_tokens=512 --json` prints
{"accuracy": 0.684, "count": 190, ...}.

The template, lengths and precision are those of the training (rmcore_config.yaml in MODEL) unless overridden.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmcore.config import UserError
from rmcore.config.schema import Config
from rmcore.evaluation.rewardbench import rewardbench_lines
from rmcore.evaluation.trained import evaluated, evaluation_config
from rmcore.host.command import run_command
from rmcore.host.files import finite

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
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--rewardbench",
        choices=("auto", "1", "2", "off"),
        default="auto",
        help="score by RewardBench's rules; auto (default): where the columns are those of its data",
    )
    parser.add_argument("--report", metavar="FILE", help="write a page of figures and pictures (HTML), without network")
    parser.add_argument("--png", metavar="DIRECTORY", help="write the pictures of the report as PNG files, too")
    parser.add_argument("--prior-sets", metavar="DATA", help="the prior sets of RewardBench 1: hub id, directory, file")
    arguments = parser.parse_intermixed_args(argv)

    def work() -> None:
        config = evaluation_config(arguments.model, arguments.data, arguments.overrides)
        from rmcore.parallel.world import running_world

        with running_world(config.parallel.timeout_seconds, config.run.seed) as world:
            report = evaluate_files(config, world, arguments.rewardbench, arguments.prior_sets)
            if world.is_main:
                told = "\n".join([*report.notes, table(dict(report.figures))])
                print(json.dumps(finite(report.figures)) if arguments.json else told)
                if arguments.report or arguments.png:
                    write(report, arguments.report, arguments.png)

    return run_command("rmcore evaluate", work)


def evaluate_files(config: Config, world: World, rewardbench: str = "off", prior_sets: str | None = None) -> Report:
    """Figures of `config.model` on `config.data.train`, the same on every rank, and notes on how they were made.

    rewardbench, prior_sets: see rmcore.evaluation.rewardbench_data.with_rewardbench; its scores stand under
    `rewardbench`.
    """
    from rmcore.data.prepare import describe, prepare_data
    from rmcore.data.tokens.tokenizer import load_tokenizer
    from rmcore.evaluation.arrays import answer_arrays, pair_arrays
    from rmcore.evaluation.pair_metrics import pair_figures
    from rmcore.evaluation.rewardbench_data import fold_ties, rewardbench_figures, with_rewardbench
    from rmcore.evaluation.samples import sample_rows
    from rmcore.model.backbone import load_model_config
    from rmcore.parallel.world import first_error
    from rmcore.report.content import Report, environment

    source = config.data.train[0].path
    config, version = first_error(
        world, "looking at the data", lambda: with_rewardbench(config, rewardbench, prior_sets)
    )
    tokenizer = first_error(world, "loading the tokenizer", lambda: load_tokenizer(config))
    positions = first_error(world, "loading the model's config", lambda: load_model_config(config.model))
    longest = getattr(positions, "max_position_embeddings", None)
    prepared = first_error(world, "preparing the data", lambda: prepare_data(config, tokenizer, longest))
    data = prepared.train
    evaluation, line = evaluated(config, world, tokenizer, data)
    rewards_A, told = evaluation.rewards_A, data if version is None else fold_ties(data)
    pairs, answers = pair_arrays(told, rewards_A), answer_arrays(told, rewards_A)
    figures = evaluation.figures
    if version is not None:
        figures = pair_figures(pairs, answers)
        figures["rewardbench"] = rewardbench_figures(version, data, rewards_A, figures)
    return Report(
        title=f"{config.model.name} on {source}",
        facts={"model": config.model.name, "data": source, "template": config.data.template},
        figures=figures,
        pairs=pairs,
        answers=answers,
        samples=sample_rows(data, rewards_A, tokenizer, config.log.samples),
        drops={source: data.report},
        notes=[describe(prepared, config), line],
        config_yaml=config.dump_yaml(),
        environment=environment(world.device.type, world.size),
    )


def write(report: Report, page: str | None, pictures: str | None) -> None:
    """The page and the pictures where they were asked for. Raises UserError where they cannot be written."""
    from rmcore.report.write import write_report

    try:
        write_report(report, Path(page) if page else None, Path(pictures) if pictures else None)
    except OSError as error:
        raise UserError(f"cannot write the report to {page or pictures}: {error.strerror or error}") from None


def table(figures: dict[str, Any]) -> str:
    """The figures as lines of text, overall first, then by source when there are several."""
    rows = {"all": figures, **(figures["sources"] if len(figures["sources"]) > 1 else {})}
    width = max(map(len, rows))
    lines = [f"{'':{width}}  {'pairs':>8} accuracy  95 % interval  longer     loss   chosen rejected   margin"]
    for name, row in rows.items():
        if "accuracy" not in row:
            lines.append(f"{name:{width}}  {row['count']:>8,}   no pairs of any weight")
            continue
        interval = f"{row['accuracy_low']:.4f}-{row['accuracy_high']:.4f}"
        means = " ".join(f"{row[key]:>8.4f}" for key in ("loss", "chosen_rewards", "rejected_rewards", "reward_margin"))
        shares = f"{row['accuracy']:.4f} {interval}  {row['length_accuracy']:.4f}"
        lines.append(f"{name:{width}}  {row['count']:>8,}   {shares} {means}")
    return "\n".join([*lines, "longer: the accuracy of always preferring the longer answer", *_notes(figures)])


def _notes(figures: dict[str, Any]) -> list[str]:
    """Calibration, length and best of k, a line each."""
    if "ece" not in figures:
        return []
    told = rewardbench_lines(figures["rewardbench"]) if "rewardbench" in figures else []
    told += [
        f"calibration: ECE {figures['ece']:.4f}, Brier {figures['brier']:.4f} (0.25 is what knowing nothing gives)"
    ]
    matched = figures["length_matched_count"]
    if matched:
        told.append(f"lengths within 10 %: accuracy {figures['length_matched_accuracy']:.4f} ({matched:,} pairs)")
    told.append(
        f"reward and length within a prompt: Spearman {figures['length_spearman_within']:+.4f}, "
        f"Pearson {figures['length_pearson_within']:+.4f}"
    )
    if "best_of_k_accuracy" in figures:
        told.append(
            f"best of 3 answers or more: {figures['best_of_k_accuracy']:.4f} of {figures['best_of_k_count']:,} "
            f"comparisons (blindly {figures['best_of_k_chance']:.4f})"
        )
    return told


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
