"""Shows a comparison of several models: as lines of text, and as a page with pictures.

Input: the result of rmcore.evaluation.comparison.compare. Output: text; HTML and PNG files.
Example: the line "A is better than B: accuracy +0.0700 (95 % interval +0.0290 to +0.1120), p = 0.0012".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rmcore.config import UserError
from rmcore.data.formats.fields import printable
from rmcore.evaluation.comparison import Judgements, compare
from rmcore.evaluation.metrics import aligned, shown, table
from rmcore.host.files import write_text_atomically
from rmcore.report.content import Report
from rmcore.report.draw import CHOSEN, GREY, INK, PLAIN, REJECTED, draw_all, new_figure
from rmcore.report.page import Table, rendered

LEVEL = 0.05  # a difference with a smaller p-value is called one
MOST_ROWS = 24  # of the picture of differences
METHOD = (
    "Difference: accuracy of the model minus that of the other, on the same pairs. Interval: 95 %, by a paired "
    "bootstrap over the comparisons. p: two-sided paired randomisation test (McNemar's exact test where each "
    "comparison is one pair). Agreement: share of the pairs in which both prefer the same answer."
)
HOLM = "p (Holm) is adjusted for the number of pairs of models, not for the number of sources."


@dataclass(frozen=True)
class ComparisonReport:
    """What is shown of a comparison.

    Args:
        facts: short lines about the data, by name.
        models: the metrics of each model, by name.
        comparison: see rmcore.evaluation.comparison.compare.
        notes: lines about the data and the rewards of each model.
        config_yaml: the configuration of each model's evaluation.
        environment: versions, machine and command.
    """

    title: str
    facts: Mapping[str, str]
    models: Mapping[str, Mapping[str, Any]]
    comparison: Mapping[str, Any]
    notes: Mapping[str, str] = field(default_factory=dict)
    config_yaml: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def comparison_report(reports: Mapping[str, Report], seed: int) -> ComparisonReport:
    """The comparison of several models from the reports of their evaluations, by name. Raises UserError.

    A model without pairs (data of scores alone) cannot be compared.
    """
    judged = {}
    for name, report in reports.items():
        if not report.evaluated:
            raise UserError(f"{name}: the data have no pairs on which models can be compared")
        assert report.pairs is not None and report.answers is not None and report.prompt_N is not None
        judged[name] = Judgements(report.pairs, report.answers, report.prompt_N)
    first = next(iter(reports.values()))
    return ComparisonReport(
        title=f"{', '.join(reports)} on {first.facts['data']}",
        facts={"data": first.facts["data"]},
        notes={name: "\n".join(report.notes) for name, report in reports.items()},
        config_yaml={name: report.config_yaml for name, report in reports.items()},
        environment=first.environment,
        **compare(judged, {name: report.metrics for name, report in reports.items()}, seed),
    )


def verdicts(report: ComparisonReport) -> list[str]:
    """A sentence for every two models, and one if comparisons were left out."""
    lines = []
    for row in report.comparison["differences"]:
        model, baseline, gain = row["model"], row["baseline"], row["difference"]
        if row["p_holm"] >= LEVEL:
            line = f"No difference in accuracy is shown between {model} and {baseline}"
        elif gain > 0:
            line = f"{model} is better than {baseline}"
        else:
            line = f"{model} is worse than {baseline}"
        interval = f"{row['low']:+.4f} to {row['high']:+.4f}"
        lines.append(f"{line}: accuracy {gain:+.4f} (95 % interval {interval}), p = {row['p_holm']:.2g}.")
    if left_out := {name: count for name, count in report.comparison["left_out"].items() if count}:
        counts = ", ".join(f"{count:,} of {name}" for name, count in left_out.items())
        kept = report.comparison["comparisons"]
        lines.append(f"Only the {kept:,} comparisons that all models have scored count; left out: {counts}.")
    return lines


def model_table(report: ComparisonReport) -> Table:
    """The metrics of each model."""
    heads, rows = table({"sources": report.models}, "models")
    return ["model", *heads[1:]], rows[1:]


def source_table(report: ComparisonReport) -> Table:
    """The accuracy of each model by source, with its interval; no rows unless there are several sources."""
    metrics = list(report.models.values())
    sources = list(dict.fromkeys(source for row in metrics for source in row.get("sources", {})))
    rows = []
    for source in sources if len(sources) > 1 else []:
        found = [row.get("sources", {}).get(source, {}) for row in metrics]
        cells = [
            f"{row['accuracy']:.4f} ({row['accuracy_low']:.3f} to {row['accuracy_high']:.3f})"
            if "accuracy" in row
            else "-"
            for row in found
        ]
        rows.append([source, shown(found[0].get("count"), ",d"), *cells])
    return ["source", "pairs", *report.models], rows


def difference_table(report: ComparisonReport) -> Table:
    """Every two models, overall and by source."""
    several = len(report.models) > 2
    heads = ["source", "pairs", "model", "against", "difference", "95 % interval", "p", *["p (Holm)"] * several]
    heads += ["only model right", "only other right", "agreement", "margins (rank corr.)"]
    rows = []
    for source, differences in {"all": report.comparison["differences"], **report.comparison["sources"]}.items():
        for row in differences:
            interval = f"{row['low']:+.4f} to {row['high']:+.4f}"
            tests = [f"{row[name]:.2g}" for name in ("p", *["p_holm"] * several)]
            one_sided = [f"{row[name]:,}" for name in ("only_model", "only_baseline")]
            shared = [f"{row['agreement']:.4f}", shown(row["margin_spearman"], "+.3f")]
            names = [row["model"], row["baseline"]]
            cells = [f"{row['count']:,}", *names, f"{row['difference']:+.4f}", interval, *tests, *one_sided, *shared]
            rows.append([source, *cells])
    return heads, rows


def methods(report: ComparisonReport) -> str:
    """How differences, intervals and p-values are computed."""
    seed = f"Random draws by the seed {report.comparison['seed']}."
    return " ".join([METHOD, *[HOLM] * (len(report.models) > 2), seed])


def comparison_text(report: ComparisonReport) -> str:
    """Notes of each model, the tables, and a sentence for every two models."""
    lines = [f"{name}: {line}" for name, notes in report.notes.items() for line in notes.splitlines()]
    for heads, rows in (model_table(report), source_table(report), difference_table(report)):
        if rows:
            lines += ["", *aligned(heads, rows)]
    return "\n".join([*lines, "", methods(report), *verdicts(report)])


def difference_picture(report: ComparisonReport) -> Any:
    """The differences with their intervals: every two models, overall and by source."""
    parts = {"all": report.comparison["differences"], **report.comparison["sources"]}
    several = len(report.models) > 2
    rows = []
    for source, differences in parts.items():
        for row in differences:
            rows.append((f"{source}: {row['model']} - {row['baseline']}" if several else source, row))
    rows = rows[:MOST_ROWS]
    if not rows:
        return None
    figure = new_figure(5.4, max(2.0, 0.9 + 0.24 * len(rows)))
    axes = figure.add_subplot()
    place = np.arange(len(rows))
    middle, low, high = (np.array([row[name] for _, row in rows]) for name in ("difference", "low", "high"))
    spread = np.abs(np.stack([middle - low, high - middle]))
    axes.errorbar(middle, place, xerr=spread, color=CHOSEN, marker="o", markersize=4.5, linestyle="", capsize=2.5)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(place, [printable(name)[-60:] for name, _ in rows])
    axes.invert_yaxis()
    axes.set(xlabel="difference of accuracy", title="Differences, 95 % interval")
    return figure


def reliability_picture(report: ComparisonReport) -> Any:
    """Accuracy against confidence by bin, a line for each model."""
    figure = new_figure()
    axes = figure.add_subplot()
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=1, linestyle=":")
    colours = (CHOSEN, REJECTED, PLAIN, INK, GREY)
    for number, (name, metrics) in enumerate(report.models.items()):
        rows = metrics.get("reliability", [])
        points = [[row[key] for row in rows] for key in ("confidence", "accuracy")]
        dash = ("-", "--", ":")[number // len(colours) % 3]
        colour = colours[number % len(colours)]
        axes.plot(*points, color=colour, linestyle=dash, marker="o", markersize=3.5, label=printable(name)[-60:])
    axes.set(xlabel="confidence: sigmoid of the margin's size", ylabel="accuracy", title="Reliability")
    axes.legend()
    return figure


PICTURES = {
    "differences": (difference_picture, "An interval that contains 0 shows no difference."),
    "reliability": (
        reliability_picture,
        "On the diagonal, pairs preferred with 80 % confidence are right in 80 %. Below it the margins are too large, "
        "above it too small.",
    ),
}


def write_comparison(report: ComparisonReport, path: Path | None, pictures: Path | None = None) -> None:
    """Write the page to `path`, and each picture as a PNG into the directory `pictures`. Raises OSError."""
    drawn = draw_all(PICTURES, report, pictures)
    if path is not None:
        tables = {"by_model": model_table(report), "by_source": source_table(report)}
        tables["by_pair"] = difference_table(report)
        more = {"verdicts": verdicts(report), "methods": methods(report)}
        write_text_atomically(path, rendered("comparison.html.jinja", drawn, report=report, **tables, **more))
