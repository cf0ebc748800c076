"""Prints the results files as Markdown tables.

Input: rmcore/bench/results/{train,score,scaling,profile,data,curves}*.json, those that exist.
Output: tables on standard output: medians with the least and the greatest value of the undisturbed runs.
Example: `| pythia-14m | fp32 | 51.20 (50.10-52.00) | ...`.
"""

import json
from pathlib import Path
from typing import Any

from rmcore.bench import curves, profile, scaling, score, train
from rmcore.bench.measure import RESULTS, parser, spread, undisturbed

TRAIN_COLUMNS = ("pairs_per_s", "epoch_pairs_per_s", "computed_tokens_per_s", "share_of_matrix_rate", "peak_rss_mb")


def main(arguments: list[str]) -> int:
    p = parser("tables", __doc__)
    p.add_argument("--results", default=str(RESULTS), help="directory of the results files")
    folder = Path(p.parse_args(arguments).results)
    makers = {
        "train": train_table,
        "score": score_table,
        "scaling": scaling_table,
        "profile": profile_table,
        "data": data_table,
        "curves": curves.table,
    }
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("what") in makers:
            print(f"### {path.stem}\n\n{setting_line(record)}\n\n{makers[record['what']](record)}\n")
    return 0


def setting_line(record: dict[str, Any]) -> str:
    """The machine and the settings, in one line."""
    machine = record["machine"]
    kept = {key: value for key, value in record["settings"].items() if value is not None}
    return (
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores ({machine['instructions']}), "
        f"torch {machine['torch']}, "
        f"transformers {machine['transformers']}, {machine['time']}; "
        + ", ".join(
            f"{key} {' '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in kept.items()
        )
    )


def median_and_spread(values: list[float]) -> str:
    """Median (least-most)."""
    found = spread(values)
    return f"{found['median']:.2f} ({found['least']:.2f}-{found['most']:.2f})"


def train_table(record: dict[str, Any]) -> str:
    """pairs/s by model, arm and precision, with tokens, the share of the matrix rate, and memory."""
    lines = [
        "| model | rows | arm | precision | pairs/s | over the epoch | computed tokens/s | of matrix rate | peak MB |",
        "|---|---|---|---|--:|--:|--:|--:|--:|",
    ]
    runs = record["runs"]
    for key in dict.fromkeys((run["model"], run["data"], run["arm"], run["precision"]) for run in runs):
        chosen = undisturbed([run for run in runs if (run["model"], run["data"], run["arm"], run["precision"]) == key])
        column = {name: [run[name] for run in chosen if name in run] for name in TRAIN_COLUMNS}
        cells = [*key, *(median_and_spread(column[name]) for name in ("pairs_per_s", "epoch_pairs_per_s"))]
        tokens, share = column["computed_tokens_per_s"], column["share_of_matrix_rate"]
        cells.append(f"{spread(tokens)['median']:,.0f}" if tokens else "")
        cells.append(f"{spread(share)['median']:.0%}" if share else "")
        cells.append(f"{max(column['peak_rss_mb']):,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {line}" for line in train.summary(runs).splitlines())


def score_table(record: dict[str, Any]) -> str:
    runs = record["runs"]
    lines = ["| model | work | precision | arm | texts/s |", "|---|---|---|---|--:|"]
    for key in dict.fromkeys((run["model"], run["kind"], run["precision"], run["arm"]) for run in runs):
        chosen = [run for run in runs if (run["model"], run["kind"], run["precision"], run["arm"]) == key]
        lines.append(
            f"| {' | '.join(key)} | {median_and_spread([run['texts_per_s'] for run in undisturbed(chosen)])} |"
        )
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {line}" for line in score.ratios(runs))


def scaling_table(record: dict[str, Any]) -> str:
    names = {"one": "one rank", "ranks": "{} ranks", "apart": "{} runs of one rank at once"}
    lines = ["| one thread a rank | pairs/s |", "|---|--:|"]
    for arm, rate in record["pairs_per_s"].items():
        name = names[arm].format(record["settings"]["ranks"])
        lines.append(f"| {name} | {rate['median']:.2f} ({rate['least']:.2f}-{rate['most']:.2f}) |")
    shares = [scaling.percent(record[name]) for name in ("efficiency", "ceiling", "of_ceiling")]
    return "\n".join([*lines, "", "Efficiency {}; the machine allows {}; the ranks reach {} of that".format(*shares)])


def profile_table(record: dict[str, Any]) -> str:
    return profile.table(record, rows=12)


def data_table(record: dict[str, Any]) -> str:
    """Pairs per CPU second of each way to prepare the same rows; then the second start, memory and planning."""
    found, size = record["figures"], record["settings"]
    lines = ["| preparing | pairs/CPU s | rmcore's rate over its |", "|---|--:|--:|"]
    for arm, name in (("rmcore", "rmcore"), ("map", "datasets.map"), ("trl", "TRL")):
        if rate := found.get(f"{arm}_pairs_per_cpu_s"):
            over = f"{found[f'times_{arm}']:.2f}" if f"times_{arm}" in found else ""
            lines.append(f"| {name} | {rate['median']:,.0f} ({rate['least']:,.0f}-{rate['most']:,.0f}) | {over} |")
    lines.append("")
    if "second_start_s" in found:
        start, cpu = found["second_start_s"]["median"], found["second_start_cpu_s"]["median"]
        lines.append(f"- second start, {size['pairs']:,} pairs: {start:.2f} s ({cpu:.2f} CPU s)")
    for kind, name in (("peak_anonymous_mb", "anonymous memory"), ("peak_rss_mb", "resident, with mapped files")):
        peaks = ", ".join(f"{int(pairs):,} pairs {peak:,.0f} MB" for pairs, peak in found[kind].items())
        lines += [f"- peak while preparing, {name}: {peaks}"] if peaks else []
    for name, what in (("plan", "100 steps cut"), ("plan_every_step_cut", "every step cut")):
        if plan := found.get(name):
            lines.append(
                f"- planning {size['plan_pairs']:,} pairs, {plan['steps']:,} steps, {what}: {plan['wall_s']:.1f} s "
                f"({plan['cpu_s']:.1f} CPU s), {plan['peak_anonymous_mb']:,.0f} MB"
            )
    return "\n".join(lines)
