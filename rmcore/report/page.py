"""Renders a `Report` and its pictures as one HTML file that loads nothing, runs nothing and prints well.

Input: a `Report`, pictures as SVG text by name. Output: HTML text (page.html.jinja, with report.css inside).
Example: an answer "<script>alert(1)</script>" is shown as these characters; the page's own policy forbids scripts and
all addresses.

Jinja escapes every value. Only the style sheet and matplotlib's SVG are `Markup`, which it inserts unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from rmcore import __version__
from rmcore.evaluation.metrics import prefix, shown, table, tiles
from rmcore.host.terminal import visible
from rmcore.report.content import Report

FOLDER = Path(__file__).parent
MOST_CHARACTERS = 3000  # of each text of a sample; samples.jsonl of a run contains the whole texts

Table = tuple[list[str], list[list[str]]]  # headings and cells


def page(report: Report, pictures: Mapping[str, tuple[str, str]]) -> str:
    """The whole file. `pictures`: name -> (SVG, caption)."""
    return rendered(
        "page.html.jinja",
        pictures,
        report=report,
        tiles=list(tiles(report.metrics)),
        by_source=source_table(report),
        best_of=best_of_table(report),
        by_set=set_table(report),
        rewardbench=rewardbench_tables(report),
        drops=drop_table(report.drops),
    )


def rendered(template: str, pictures: Mapping[str, tuple[str, str]], **values: Any) -> str:
    """A template of this folder as a whole file; `values` are the variables that it uses, `report` among them."""
    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, finalize=printable)
    environment.filters |= {"number": shown, "shortened": shortened, "anchor": anchor}
    text = environment.get_template(template).render(
        pictures={name: {"svg": Markup(svg), "caption": caption} for name, (svg, caption) in pictures.items()},
        css=Markup((FOLDER / "report.css").read_text(encoding="utf-8")),
        version=__version__,
        **values,
    )
    return text + "\n"


def printable(value: Any) -> Any:
    """Called by Jinja for every value before it is escaped: control characters and lone surrogates become visible."""
    if isinstance(value, Markup):
        return value
    return visible(str(value)).encode("utf-8", "backslashreplace").decode("utf-8")


def anchor(name: str) -> str:
    """The id of a section: "Calibration and length" -> "calibration-and-length"."""
    return name.lower().replace(" ", "-")


def shortened(text: str) -> str:
    """A long text without its middle."""
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"


def source_table(report: Report) -> Table:
    """Metrics of all pairs and by source, the source with the most pairs first."""
    by_count = sorted(report.metrics.get("sources", {}).items(), key=lambda source: -source[1]["count"])
    heads, rows = table({**report.metrics, "sources": dict(by_count)}, "page")
    return ["source", *heads[1:]], rows


def set_table(report: Report) -> Table:
    """Metrics of each evaluation set; no rows if there is only one."""
    sets = report.metrics.get("sets", {})
    heads, rows = table({"sources": {prefix(name).rstrip("/"): metrics for name, metrics in sets.items()}}, "page")
    return ["set", *heads[1:]], rows[1:]


def rewardbench_tables(report: Report) -> dict[str, Mapping[str, Any]]:
    """The scores of each evaluation set that is RewardBench, by the heading of its table."""
    tables = {}
    for name, metrics in report.metrics.get("sets", {"": report.metrics}).items():
        if scores := metrics.get("rewardbench"):
            tables[f"RewardBench {scores['version']}" + (f" of {prefix(name).rstrip('/')}" if name else "")] = scores
    return tables


def best_of_table(report: Report) -> Table:
    """Best of k by the number of answers."""
    rows = [
        [k, shown(row["count"], ",d"), shown(row["accuracy"], ".4f"), shown(row["chance"], ".4f")]
        for k, row in report.metrics.get("best_of", {}).items()
    ]
    return ["best of", "comparisons", "share right", "chance"], rows


def drop_table(drops: Mapping[str, Mapping[str, Any]]) -> Table:
    """Rows read, kept, and dropped by reason, for each part of the data."""
    reasons = list(dict.fromkeys(reason for part in drops.values() for reason in part.get("dropped", {})))
    rows = []
    for name, part in drops.items():
        dropped = part.get("dropped", {})
        counts = [part.get("rows"), part.get("kept"), *(dropped.get(reason, 0) for reason in reasons)]
        rows.append([name, *(shown(count, ",d") for count in [*counts, part.get("pairs")])])
    return ["data", "rows", "kept", *reasons, "pairs"], rows
