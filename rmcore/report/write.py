"""Writes a `Report` as report.html, and its pictures as PNG files.

Input: a `Report` and a path. Output: the file, replaced as a whole. This takes two or three seconds, most of them in
matplotlib.
Example: write_report(report, Path("runs/hh/report.html"), Path("runs/hh/plots")) writes an HTML file of some hundred
kB and plots/loss.png, plots/accuracy.png, ...
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rmcore.host.files import write_text_atomically
from rmcore.report import curves, plots
from rmcore.report.content import Report
from rmcore.report.draw import draw_all
from rmcore.report.page import page

Draw = Callable[[Report], Any]
# Name, function and caption of each picture: of a run, and of pairs whose rewards are finite.
OF_A_RUN: dict[str, tuple[Draw, str]] = {
    "loss": (curves.loss, "Evaluation loss that rises while training loss falls is overfitting."),
    "accuracy": (curves.accuracy, "Below the dashed line, always preferring the longer answer does better."),
    "drift": (
        curves.drift,
        "Only differences between answers to one prompt mean something: the level may drift. A deviation that keeps "
        "growing means that the margins grow too.",
    ),
    "rate": (curves.rate, "The norm is that before clipping."),
}
OF_PAIRS: dict[str, tuple[Draw, str]] = {
    "rewards": (plots.rewards, "Dashed: means. These are rewards of many prompts, so some overlap is natural."),
    "margins": (plots.margins, "Left of zero the model is wrong; a long tail there is wrong with confidence."),
    "accuracy_by_source": (
        plots.accuracy_by_source,
        "If the diamond lies inside the interval, the model is not shown to know more than which answer is longer.",
    ),
    "margin_by_source": (plots.margin_by_source, "Bar: the middle half. Line: 5 to 95 %. Tick: the median."),
    "reliability": (
        plots.reliability,
        "On the diagonal, pairs preferred with 80 % confidence are right in 80 %. Below it the margins are too large, "
        "above it too small.",
    ),
    "accuracy_by_length": (
        plots.accuracy_by_length,
        "A rise from left to right means that the model prefers long answers: its accuracy is low where the better "
        "answer is the shorter one.",
    ),
    "reward_by_length": (plots.reward_by_length, "If the median rises with length, RL will learn to write long."),
}


def write_report(report: Report, path: Path | None, pictures: Path | None = None) -> None:
    """Write the page to `path`, and each picture as a PNG into the directory `pictures`. Raises OSError."""
    drawn = draw_all({**OF_A_RUN, **(OF_PAIRS if report.finite else {})}, report, pictures)
    if path is not None:
        write_text_atomically(path, page(report, drawn))
