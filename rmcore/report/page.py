"""The page: a `Report` and its pictures as one HTML file that loads nothing, runs nothing and prints well.

In: a `Report`, pictures as SVG text by name. Out: HTML text.
Example: an answer "<script>alert(1)</script>" stands on the page as it reads; the page's own policy forbids scripts and
every address besides.

Whatever comes from data, config or command passes through `text`; only numbers, the names in this file and matplotlib's
SVG do not.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rmcore import __version__
from rmcore.evaluation.samples import SampleRow
from rmcore.host.terminal import visible
from rmcore.report.content import Report

CSS = Path(__file__).with_name("report.css")
MOST_CHARACTERS = 3000  # of each text of a sample; samples.jsonl of a run holds them whole
SOURCE_COLUMNS = (
    ("count", "pairs", ",d"), ("accuracy", "accuracy", ".4f"), ("interval", "95 % interval", ""),
    ("length_accuracy", "longer answer", ".4f"), ("length_matched_accuracy", "like lengths", ".4f"),
    ("loss", "loss", ".4f"), ("reward_margin", "margin", ".3f"), ("ece", "ECE", ".3f"), ("brier", "Brier", ".3f"),
    ("best_of_k_accuracy", "best of k", ".4f"),
)  # fmt: skip


def page(report: Report, pictures: Mapping[str, tuple[str, str]]) -> str:
    """The whole file. `pictures`: name -> (SVG, what to look for in it)."""
    sections = [
        ("Figures", tiles(report) + source_table(report) + rewardbench_table(report) + best_of_table(report)),
        ("Training", shown(pictures, ("loss", "accuracy", "drift", "rate"))),
        ("Rewards", shown(pictures, ("rewards", "margins", "accuracy_by_source", "margin_by_source"))),
        ("Calibration and length", shown(pictures, ("reliability", "accuracy_by_length", "reward_by_length"))),
        ("Samples", samples(report.samples)),
        ("Data", drop_table(report.drops) + preformatted("\n".join(report.notes))),
        ("Configuration", preformatted(report.config_yaml)),
        ("Environment", pairs_table(report.environment)),
    ]
    sections = [(name, body) for name, body in sections if body]
    links = " ".join(f'<a href="#{anchor(name)}">{name}</a>' for name, _ in sections)
    facts = " · ".join(f"{text(name)} <b>{text(value)}</b>" for name, value in report.facts.items() if value)
    parts = "\n".join(f'<section id="{anchor(name)}"><h2>{name}</h2>\n{body}\n</section>' for name, body in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(report.title)}</title>
<style>
{CSS.read_text(encoding="utf-8")}</style>
</head>
<body>
<header><h1>{text(report.title)}</h1><p class="facts">{facts}</p><nav>{links}</nav></header>
<main>
{parts}
</main>
<footer>rmcore {__version__}. Means are weighted by the pairs' weights; intervals are Wilson's, 95 %.</footer>
</body>
</html>
"""


def text(found: object) -> str:
    """Anything as text of the page: escaped, control characters and lone surrogates visible."""
    shown = visible(str(found)).encode("utf-8", "backslashreplace").decode("utf-8")
    return html.escape(shown, quote=True)


def anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def number(value: Any, how: str) -> str:
    return format(value, how) if isinstance(value, int | float) and value == value else "-"


def tiles(report: Report) -> str:
    """The figures that count, large."""
    figures = report.figures
    if not report.evaluated:
        return "<p>Nothing was evaluated: no held-out pairs.</p>"
    interval = f"{number(figures['accuracy_low'], '.3f')} to {number(figures['accuracy_high'], '.3f')}"
    shown = [
        ("accuracy", number(figures["accuracy"], ".3f"), interval),
        ("longer answer", number(figures["length_accuracy"], ".3f"), "accuracy of always preferring it"),
        ("loss", number(figures["loss"], ".3f"), "chance 0.693"),
        ("margin", number(figures["reward_margin"], ".3f"), "mean reward difference"),
        ("ECE", number(figures["ece"], ".3f"), "0: confidence is accuracy"),
        ("Brier", number(figures["brier"], ".3f"), "chance 0.250"),
        (
            "pairs",
            number(figures["count"], ",d"),
            f"{len(figures['sources']):,} source{'s' * (len(figures['sources']) != 1)}",
        ),
    ]
    if "best_of_k_accuracy" in figures:
        chance = number(figures["best_of_k_chance"], ".3f")
        shown.insert(1, ("best of k", number(figures["best_of_k_accuracy"], ".3f"), f"chance {chance}"))
    cells = (
        f"<div><span>{name}</span><strong>{value}</strong><small>{note}</small></div>" for name, value, note in shown
    )
    warning = "" if report.finite else "<p>Some rewards are not numbers: there are no pictures of the pairs.</p>"
    return f'<div class="tiles">{"".join(cells)}</div>{warning}'


def source_table(report: Report) -> str:
    """Overall and by source, in columns that hold something."""
    if not report.evaluated:
        return ""
    sources = {name: row for name, row in report.figures["sources"].items() if "accuracy" in row}
    by_count = sorted(sources.items(), key=lambda item: -item[1]["count"])
    rows = [("all", report.figures), *(by_count if len(by_count) > 1 else [])]
    columns = [
        column for column in SOURCE_COLUMNS if column[0] == "interval" or any(column[0] in row for _, row in rows)
    ]
    body = []
    for name, row in rows:
        cells = []
        for key, _, how in columns:
            low_high = f"{number(row['accuracy_low'], '.3f')} to {number(row['accuracy_high'], '.3f')}"
            cells.append(low_high if key == "interval" else number(row.get(key), how))
        body.append([text(name), *cells])
    return table(["source", *(label for _, label, _ in columns)], body)


def rewardbench_table(report: Report) -> str:
    scores = report.figures.get("rewardbench")
    if not scores:
        return ""
    rows = [[text(name), number(value, ".4f")] for name, value in scores["sections"].items()]
    rows.append(["<b>score</b>", f"<b>{number(scores['score'], '.4f')}</b>"])
    note = "" if scores["complete"] else "<p>Not comparable with published scores: other rows were scored.</p>"
    return table([f"RewardBench {scores['version']}", "score"], rows) + note


def best_of_table(report: Report) -> str:
    rows = [
        [text(k), number(row["count"], ",d"), number(row["accuracy"], ".4f"), number(row["chance"], ".4f")]
        for k, row in report.figures.get("best_of", {}).items()
    ]
    return table(["best of", "comparisons", "share right", "chance"], rows) if rows else ""


def shown(pictures: Mapping[str, tuple[str, str]], names: Iterable[str]) -> str:
    """The pictures that there are, as a grid."""
    figures = (
        f'<figure id="picture-{name}">{pictures[name][0]}<figcaption>{text(pictures[name][1])}</figcaption></figure>'
        for name in names
        if name in pictures
    )
    inside = "\n".join(figures)
    return f'<div class="grid">{inside}</div>' if inside else ""


def samples(rows: Sequence[SampleRow]) -> str:
    """Prompt above, the two answers side by side with their rewards."""
    cards = []
    for row in rows:
        verdict = '<em class="right">right</em>' if row.correct else '<em class="wrong">wrong</em>'
        answers = "".join(
            f"<div><h4>{name} <b>{number(reward, '+.4f')}</b></h4><pre>{text(shortened(answer))}</pre></div>"
            for name, answer, reward in (
                ("chosen", row.chosen, row.chosen_reward), ("rejected", row.rejected, row.rejected_reward)
            )
        )  # fmt: skip
        prompt = f"<div><h4>prompt {verdict}</h4><pre>{text(shortened(row.prompt))}</pre></div>"
        cards.append(f'<article class="sample">{prompt}<div class="answers">{answers}</div></article>')
    return "\n".join(cards)


def shortened(found: str) -> str:
    """A long text without its middle."""
    if len(found) <= MOST_CHARACTERS:
        return found
    half = MOST_CHARACTERS // 2
    return f"{found[:half]}\n[... {len(found) - 2 * half:,} characters ...]\n{found[-half:]}"


def drop_table(drops: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows read, kept, and dropped by reason, for each part of the data."""
    reasons = list(dict.fromkeys(reason for part in drops.values() for reason in part.get("dropped", {})))
    rows = []
    for name, part in drops.items():
        dropped = [number(part.get("dropped", {}).get(reason, 0), ",d") for reason in reasons]
        rows.append([text(name), *(number(part.get(key), ",d") for key in ("rows", "kept")), *dropped,
                     number(part.get("pairs"), ",d")])  # fmt: skip
    return table(["data", "rows", "kept", *map(text, reasons), "pairs"], rows) if rows else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already; the first column is text, the others numbers."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>'


def pairs_table(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>\n" for name, value in facts.items())
    return f'<div class="wide"><table class="facts">{rows}</table></div>' if rows else ""


def preformatted(found: str) -> str:
    return f"<pre>{text(found)}</pre>" if found.strip() else ""
