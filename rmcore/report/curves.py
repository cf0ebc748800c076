"""Draws a run over time: loss, accuracy, learning rate and gradient norm, drift of the rewards.

Input: a `Report` with a history. Output: matplotlib figures, None if the history contains nothing to draw.
Example: 28 log lines and 4 evaluations give a thin line of 28 points and 4 marks with intervals, over pairs seen.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rmcore.config.schema import UNNAMED
from rmcore.evaluation.metrics import prefix
from rmcore.report.content import Report
from rmcore.report.draw import CHOSEN, GREY, INK, PLAIN, REJECTED, new_figure

SEEN = "pairs seen"


def _of_main(report: Report, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """A metric of the main evaluation set."""
    return report.series(prefix(report.sets[0] if report.sets else UNNAMED) + metric)


def _other_sets(axes: Any, report: Report, metric: str) -> None:
    """The metric of each further evaluation set, as a thin line with the name of the set."""
    for number, name in enumerate(report.sets[1:], start=4):  # matplotlib's colours 0 to 3 resemble those in use
        values = report.series(prefix(name) + metric)
        axes.plot(*values, color=f"C{number % 10}", marker="s", markersize=3, linewidth=0.9, label=name)


def loss(report: Report) -> Any:
    """Training loss as a line, evaluation loss as marks, the loss of chance; the loss of another objective, if any."""
    train, held_out = report.series("train/rm/loss"), _of_main(report, "loss")
    if not len(train[0]) and not len(held_out[0]):
        return None
    figure = new_figure()
    axes = figure.add_subplot()
    axes.axhline(math.log(2), color=GREY, linestyle=":", label="chance, ln 2")
    axes.plot(*train, color=GREY, marker="." if len(train[0]) < 3 else "", label="training")
    axes.plot(*held_out, color=CHOSEN, marker="o", markersize=4, label="evaluation")
    own = _of_main(report, "objective_loss")
    if len(own[0]):
        axes.plot(*own, color=PLAIN, marker="o", markersize=4, label="evaluation, by the objective trained")
    _other_sets(axes, report, "loss")
    axes.set(xlabel=SEEN, ylabel="loss", title="Loss")
    axes.legend()
    return figure


def accuracy(report: Report) -> Any:
    """Training accuracy as a line, evaluation with its intervals, and preferring the longer answer as a baseline."""
    train, held_out = report.series("train/rm/accuracy"), _of_main(report, "accuracy")
    if not len(train[0]) and not len(held_out[0]):
        return None
    figure = new_figure()
    axes = figure.add_subplot()
    axes.plot(*train, color=GREY, marker="." if len(train[0]) < 3 else "", label="training")
    low, high = _of_main(report, "accuracy_low")[1], _of_main(report, "accuracy_high")[1]
    if len(low) == len(high) == len(held_out[1]) > 0:
        spread = np.abs(np.stack([held_out[1] - low, high - held_out[1]]))
        axes.errorbar(
            *held_out, yerr=spread, color=CHOSEN, marker="o", markersize=4, capsize=2, label="evaluation, 95 %"
        )
    baseline = _of_main(report, "length_accuracy")[1]
    if len(baseline):
        axes.axhline(baseline[-1], color=REJECTED, linestyle="--", linewidth=1, label="longer answer")
    axes.axhline(0.5, color=GREY, linestyle=":", linewidth=1)
    _other_sets(axes, report, "accuracy")
    axes.set(xlabel=SEEN, ylabel="accuracy", title="Accuracy")
    axes.legend()
    return figure


def rate(report: Report) -> Any:
    """Learning rate (upper part) and gradient norm before clipping (lower part)."""
    parts = [("train/rm/lr", "learning rate", CHOSEN), ("grad_norm", "gradient norm", PLAIN)]
    parts = [part for part in parts if len(report.series(part[0])[0])]
    if not parts:
        return None
    figure = new_figure()
    for place, (axes, (name, label, colour)) in enumerate(
        zip(np.atleast_1d(figure.subplots(len(parts), 1, sharex=True)), parts, strict=True)
    ):
        x, y = report.series(name)
        axes.plot(x, y, color=colour, marker="." if len(x) < 3 else "")
        axes.set_ylabel(label)
        if place == 0:
            axes.set_title("Learning rate and gradient norm")
        if place == len(parts) - 1:
            axes.set_xlabel(SEEN)
    return figure


def drift(report: Report) -> Any:
    """Mean and standard deviation of all rewards at each evaluation, and the means of chosen and rejected answers."""
    mean, deviation = _of_main(report, "reward_mean"), _of_main(report, "reward_std")[1]
    if not len(mean[0]) or len(mean[0]) != len(deviation):
        return None
    figure = new_figure()
    axes = figure.add_subplot()
    axes.errorbar(*mean, yerr=deviation, color=INK, marker="s", markersize=4, capsize=3, label="all, ± one deviation")
    for name, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
        axes.plot(*report.series(f"train/rm/{name}_rewards"), color=colour, linewidth=0.8, alpha=0.5)
        axes.plot(*_of_main(report, f"{name}_rewards"), color=colour, marker="o", markersize=4, label=name)
    axes.set(xlabel=SEEN, ylabel="reward", title="Drift of the rewards")
    axes.legend()
    return figure
