"""Writes the report of a training run, after everything else is done.

Input: a `Run`, its end, its metrics.jsonl.
Output: <run.dir>/report.html; with log.report=png also <run.dir>/plots/*.png.
Example: 4 evaluations of 1,000 held-out pairs -> a page of about 500 kB after about two seconds, on rank 0.

A failure here must not spoil a finished training, so it is only a warning.
"""

from pathlib import Path
from typing import Any

from rmcore.data.prepare import describe
from rmcore.evaluation.arrays import answer_arrays, pair_arrays
from rmcore.evaluation.rewardbench_data import fold_ties
from rmcore.evaluation.samples import sample_rows
from rmcore.report.content import Report, environment, read_history
from rmcore.report.write import write_report
from rmcore.tracking.tracker import Tracker
from rmcore.training.best import Trained
from rmcore.training.run import Run


def report_run(run: Run, end: Trained, tracker: Tracker) -> None:
    """Write the report on rank 0; other ranks return at once. Any Exception becomes a warning."""
    if not run.world.is_main or run.config.log.report == "none":
        return
    directory = Path(run.config.run.dir)
    pictures = directory / "plots" if run.config.log.report == "png" else None
    try:
        write_report(report_of(run, end), directory / "report.html", pictures)
    except Exception as error:  # the model is trained and exported already
        tracker.say(f"warning: no report: {type(error).__name__}: {error}")
        return
    tracker.say(f"report in {directory / 'report.html'}")


def report_of(run: Run, end: Trained) -> Report:
    """The content of the report: pictures and samples of the main evaluation set, the metrics of every set."""
    config, held_out = run.config, run.data.eval
    quality: dict[str, Any] = {"metrics": {}, "pairs": None, "answers": None, "samples": ()}
    if end.evaluations is not None and held_out is not None:
        rewards_A = end.evaluations.main.rewards_A
        name = next(iter(end.evaluations.by_set))
        by_section = fold_ties(held_out) if run.data.rewardbench.get(name) == 2 else held_out
        quality = {
            "metrics": end.evaluations.metrics,
            "pairs": pair_arrays(by_section, rewards_A),
            "answers": answer_arrays(by_section, rewards_A),
            "samples": sample_rows(held_out, rewards_A, run.tokenizer, config.log.samples),
        }
    exported = f"step {end.best.step:,}, {end.best.metric} {end.best.value:.4f}" if end.best else ""
    return Report(
        title=Path(config.run.dir).resolve().name,
        facts={
            "model": config.model.name,
            "data": ", ".join(source.path for source in config.data.train),
            "training": f"{end.step.index + 1:,} steps of {config.batch.pairs:,} pairs",
            "ended": end.reason,
            "exported": exported,
        },
        drops={name: part.report for name, part in run.data.parts.items()},
        notes=[describe(run.data, config), *run.lines[1:]],
        config_yaml=config.dump_yaml(),
        history=read_history(Path(config.run.dir) / "metrics.jsonl"),
        environment=environment(run.world.device.type, run.world.size),
        **quality,
    )
