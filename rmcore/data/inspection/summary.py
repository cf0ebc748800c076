"""Summarises the prepared data in a few lines: rows kept and dropped by reason, tokens, sharing ratio, lengths.

Input: the report and the arrays of `TokenizedComparisons`.
Output: lines to print. Example:
    data.train: 1,701 pairs
         1,710 rows read
         1,701 kept
             9 dropped: text too long (more than data.max_tokens=512 tokens)
"""

from typing import Any

import numpy as np

from rmcore.config import Config
from rmcore.data.drop_reasons import (
    ANSWER_TOO_LONG,
    CONTRADICTED,
    EMPTY,
    IDENTICAL,
    NO_VALUE,
    NOT_KEPT,
    PROMPT_TOO_LONG,
    REFUSED,
    REPEATED,
    TEXT_TOO_LONG,
    UNDECIDED,
)
from rmcore.data.tokens.comparisons import TokenizedComparisons


def drop_table(report: dict[str, Any], config: Config) -> str:
    """Rows read, kept and dropped: one line per reason, with the config key that decides it."""
    data = config.data
    why = {
        PROMPT_TOO_LONG: f"more than data.max_prompt_tokens={data.max_prompt_tokens} tokens",
        TEXT_TOO_LONG: f"more than data.max_tokens={data.max_tokens} tokens",
        ANSWER_TOO_LONG: "the prompt has too few tokens to cut",
        NOT_KEPT: "its expression is false",
        NO_VALUE: "a column that its expression reads is null",
        IDENTICAL: "chosen and rejected are the same tokens",
        EMPTY: "prompt and answer are both empty",
        UNDECIDED: "all answers tie, there is only one, or the weight of the row is 0",
        REPEATED: "prompt, answers and judgement of an earlier row",
        CONTRADICTED: "another row judges the same answers differently",
        REFUSED: next((w for w in report["warnings"] if w.startswith("data.template")), ""),
    }
    lines = [f"{report['rows']:>10,} rows read", f"{report['kept']:>10,} kept"]
    return "\n".join([*lines, *(f"{n:>10,} dropped: {name} ({why[name]})" for name, n in report["dropped"].items())])


def describe_part(part: TokenizedComparisons, config: Config) -> str:
    """Rows, formats, sources, tokens, sharing ratio (tokens of separate texts / with each prompt once), lengths."""
    report, lengths = part.report, part.text_length_A
    computed, logical = len(part.tokens), int(part.logical_tokens_N.sum())
    low, middle, high, longest = np.percentile(lengths, [5, 50, 95, 100])
    rows = np.bincount(part.source_index, minlength=len(part.sources))
    gathered = f" in {len(part):,} comparisons" if len(part) != report["pairs"] else ""
    shown = [f"{part.sources[i]} {rows[i]:,}" for i in np.argsort(-rows, kind="stable")[:8]]
    more = f", ... ({len(part.sources)} in all)" if len(part.sources) > len(shown) else ""
    return "\n".join(
        [
            f"{report['key']}: {report['pairs']:,} pairs{_besides(report)}{gathered}",
            drop_table(report, config),
            *(f"  format   {origin}: {format}" for origin, format in report["formats"].items()),
            f"  sources  {', '.join(shown)}{more}",
            *_duplicates(report),
            f"  tokens   {computed:,} with each prompt once, {logical:,} as separate texts: "
            f"sharing ratio {logical / computed:.2f}",
            f"  lengths  of prompt and answer: 5 % {low:.0f}, median {middle:.0f}, 95 % {high:.0f}, "
            f"longest {longest:.0f} tokens",
        ]
    )


def _besides(report: dict[str, Any]) -> str:
    """The counts of what the objective reads besides pairs."""
    counts = {"ties": report.get("ties", 0), "scored answers": report.get("scored_answers", 0)}
    return "".join(f", {count:,} {name}" for name, count in counts.items() if count)


def _duplicates(report: dict[str, Any]) -> list[str]:
    """Repeated and contradicted rows, if there are any."""
    meanings = {
        REPEATED: "prompt, answers and judgement of an earlier row",
        CONTRADICTED: "another row judges the same answers to the same prompt differently",
    }
    return [
        f"  {reason}: {report[reason]:,} rows ({meaning}; "
        + (f"data.drop_{reason}=true drops them)" if reason not in report["dropped"] else "dropped)")
        for reason, meaning in meanings.items()
        if report[reason]
    ]
