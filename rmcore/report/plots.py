"""Draws an evaluation: rewards, margins, accuracy by source, calibration, and the influence of length.

Input: a `Report` with pairs and answers. Output: matplotlib figures, None if there is nothing to draw.
Example: 40 sources -> the 24 with the most pairs as rows of a picture; the table of the page contains all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rmcore.data.formats.fields import printable
from rmcore.evaluation.intervals import accuracy_interval, wilson_interval
from rmcore.report.content import Report
from rmcore.report.draw import CHOSEN, GREY, INK, PLAIN, REJECTED, new_figure

MOST_SOURCES = 24  # rows of a picture by source
MOST_POINTS = 4000  # points in the scatter plot of reward against length
LENGTH_BINS = 9  # bins of length differences


def rewards(report: Report) -> Any:
    """Histograms of the rewards of preferred and other answers."""
    pairs = report.pairs
    assert pairs is not None
    figure = new_figure()
    axes = figure.add_subplot()
    bins = _bins(np.concatenate([pairs.chosen_P, pairs.rejected_P]))
    for values, colour, label in ((pairs.chosen_P, CHOSEN, "chosen"), (pairs.rejected_P, REJECTED, "rejected")):
        axes.hist(values, bins, weights=pairs.weight_P, color=colour, alpha=0.25)
        axes.hist(values, bins, weights=pairs.weight_P, color=colour, histtype="step", linewidth=1.4, label=label)
        axes.axvline(np.average(values, weights=pairs.weight_P), color=colour, linestyle="--", linewidth=1)
    axes.set(xlabel="reward", ylabel="pairs", title="Rewards")
    axes.legend()
    return figure


def margins(report: Report) -> Any:
    """Histogram of the reward margins, the wrong side in another colour."""
    pairs = report.pairs
    assert pairs is not None
    margin = pairs.chosen_P - pairs.rejected_P
    figure = new_figure()
    axes = figure.add_subplot()
    bins = _bins(margin, through=0.0)
    for which, colour in ((margin > 0, CHOSEN), (margin <= 0, REJECTED)):
        right = float(pairs.weight_P[which].sum() / pairs.weight_P.sum())
        label = f"{'right' if colour == CHOSEN else 'wrong'}, {right:.1%}"
        axes.hist(margin[which], bins, weights=pairs.weight_P[which], color=colour, alpha=0.7, label=label)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set(xlabel="reward of chosen - reward of rejected", ylabel="pairs", title="Reward margins")
    axes.legend()
    return figure


def _bins(values: np.ndarray, through: float | None = None) -> np.ndarray:
    """Edges of 12 to 50 bins over all but the outermost thousandths; `through` is one of the edges."""
    low, high = (float(v) for v in np.percentile(values, [0.1, 99.9]))
    if not high > low:
        low, high = low - 0.5, high + 0.5
    bins = int(np.clip(2.5 * np.cbrt(len(values)), 12, 50))
    width = (high - low) / bins
    if through is None:
        return np.linspace(low, high, bins + 1)
    return through + width * np.arange(np.floor((low - through) / width), np.ceil((high - through) / width) + 1)


def _largest_sources(report: Report) -> list[tuple[str, dict[str, Any]]]:
    rows = [(name, row) for name, row in report.metrics["sources"].items() if "accuracy" in row]
    return sorted(rows, key=lambda row: -row[1]["count"])[:MOST_SOURCES]


def _source_axes(rows: list[tuple[str, Any]], title: str, label: str) -> tuple[Any, Any]:
    figure = new_figure(5.4, max(2.0, 0.9 + 0.24 * len(rows)))
    axes = figure.add_subplot()
    names = [f"{printable(name, 30)} ({row['count']:,})" for name, row in rows]
    axes.set_yticks(np.arange(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set(title=title, xlabel=label)
    return figure, axes


def accuracy_by_source(report: Report) -> Any:
    """Accuracy with its interval overall and by source, next to always preferring the longer answer."""
    rows = [("all", dict(report.metrics)), *_largest_sources(report)]
    rows = rows[:1] if len(rows) == 2 else rows
    figure, axes = _source_axes(rows, "Accuracy, 95 % interval", "accuracy")
    place = np.arange(len(rows))
    accuracy, low, high, baseline = (
        np.array([row[name] for _, row in rows])
        for name in ("accuracy", "accuracy_low", "accuracy_high", "length_accuracy")
    )
    axes.axvline(0.5, color=GREY, linestyle=":", linewidth=1)
    points = {"markersize": 4.5, "linestyle": "", "capsize": 2.5}
    spread = np.abs(np.stack([accuracy - low, high - accuracy]))
    axes.errorbar(accuracy, place, xerr=spread, color=CHOSEN, marker="o", label="model", **points)
    diamonds = {"marker": "D", "markersize": 4, "linestyle": "", "fillstyle": "none"}
    axes.plot(baseline, place, color=REJECTED, label="longer answer", **diamonds)
    axes.set_xlim(min(0.4, low.min(), baseline.min()) - 0.03, max(0.9, high.max(), baseline.max()) + 0.03)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def margin_by_source(report: Report) -> Any:
    """Median, middle half and 5 to 95 % of the margins, by source."""
    pairs, rows = report.pairs, _largest_sources(report)
    assert pairs is not None
    if len(rows) < 2:
        return None
    margin = pairs.chosen_P - pairs.rejected_P
    figure, axes = _source_axes(rows, "Reward margin by source", "margin: 5, 25, 50, 75, 95 %")
    for place, (name, _) in enumerate(rows):
        members = pairs.source_P == pairs.sources.index(name)
        low, quarter, middle, third, high = np.percentile(margin[members], [5, 25, 50, 75, 95])
        axes.plot([low, high], [place, place], color=PLAIN, linewidth=1)
        axes.plot([quarter, third], [place, place], color=PLAIN, linewidth=6, alpha=0.45, solid_capstyle="butt")
        axes.plot([middle], [place], color=INK, marker="|", markersize=9)
    axes.axvline(0, color=INK, linewidth=0.8)
    return figure


def reliability(report: Report) -> Any:
    """Accuracy against confidence by bin (upper part), and the share of the pairs in each bin (lower part)."""
    rows = report.metrics["reliability"]
    figure = new_figure(5.4, 3.9)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    middle = [(row["low"] + row["high"]) / 2 for row in rows]
    upper.plot([0.5, 1], [0.5, 1], color=GREY, linestyle=":", label="calibrated")
    confidence, accuracy = ([row[name] for row in rows] for name in ("confidence", "accuracy"))
    intervals = np.array([wilson_interval(row["accuracy"], row["count"]) for row in rows]).T
    points = {"marker": "o", "markersize": 4.5, "linestyle": "", "capsize": 2.5}
    spread = np.abs(intervals - accuracy)
    upper.errorbar(confidence, accuracy, yerr=spread, color=CHOSEN, label="pairs of a bin, 95 %", **points)
    ece, brier = report.metrics["ece"], report.metrics["brier"]
    upper.set(ylabel="accuracy", title=f"Reliability: ECE {ece:.3f}, Brier {brier:.3f}", xlim=(0.49, 1.01))
    upper.legend()
    lower.bar(middle, [row["share"] for row in rows], width=0.045, color=CHOSEN, alpha=0.6)
    lower.set(xlabel="confidence: sigmoid of the margin's size", ylabel="share")
    return figure


def accuracy_by_length(report: Report) -> Any:
    """Accuracy by the difference of the lengths, in bins of about the same number of pairs."""
    pairs = report.pairs
    assert pairs is not None
    difference = pairs.chosen_length_P.astype(np.int64) - pairs.rejected_length_P
    edges = np.unique(np.quantile(difference, np.linspace(0, 1, LENGTH_BINS + 1)).round().astype(np.int64))
    if len(edges) < 3:
        return None
    right = pairs.chosen_P > pairs.rejected_P
    bin_P = np.clip(np.searchsorted(edges, difference, side="right") - 1, 0, len(edges) - 2)
    figure = new_figure()
    axes = figure.add_subplot()
    for number in range(len(edges) - 1):
        members = bin_P == number
        weight = pairs.weight_P[members]
        if not weight.sum() > 0:
            continue
        accuracy = float(np.average(right[members], weights=weight))
        low, high = accuracy_interval(right[members], weight, pairs.comparison_P[members], int(members.sum()))
        spread = np.abs([[accuracy - low], [high - accuracy]])
        axes.errorbar([number + 0.5], [accuracy], yerr=spread, color=CHOSEN, marker="o", markersize=4.5, capsize=2.5)
    axes.axhline(report.metrics["accuracy"], color=GREY, linewidth=1, linestyle="--", label="overall")
    axes.axhline(0.5, color=GREY, linewidth=1, linestyle=":")
    if edges[0] < 0 < edges[-1]:
        axes.axvline(np.interp(0, edges, np.arange(len(edges))), color=INK, linewidth=0.8, label="equal lengths")
    axes.set_xticks(np.arange(len(edges)), [f"{edge:,}" for edge in edges])
    axes.set(xlabel="tokens of chosen - tokens of rejected", ylabel="accuracy", title="Accuracy and length difference")
    axes.legend()
    return figure


def reward_by_length(report: Report) -> Any:
    """Rewards against answer lengths: some of the points, and the median along the lengths."""
    answers = report.answers
    if answers is None or len(answers.reward_A) < 2:
        return None
    keep = np.unique(np.linspace(0, len(answers.reward_A) - 1, MOST_POINTS).round().astype(int))
    figure = new_figure()
    axes = figure.add_subplot()
    axes.scatter(
        answers.length_A[keep], answers.reward_A[keep], s=4, color=CHOSEN, alpha=0.3, linewidths=0, rasterized=True
    )
    order = np.argsort(answers.length_A, kind="stable")
    parts = [part for part in np.array_split(order, 12) if len(part) > 4]
    median = [[np.median(values[part]) for part in parts] for values in (answers.length_A, answers.reward_A)]
    axes.plot(*median, color=REJECTED, marker="o", markersize=3, label="median")
    overall, within = report.metrics["length_spearman"], report.metrics["length_spearman_within"]
    title = f"Reward and length: Spearman {overall:+.2f}, within a prompt {within:+.2f}"
    axes.set(xlabel="tokens of the answer", ylabel="reward", title=title)
    axes.set_xlim(right=float(np.percentile(answers.length_A, 99.5)) * 1.05 + 1)
    axes.legend()
    return figure
