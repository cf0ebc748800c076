"""The table of metrics: the name, the meaning and the places of every number that rmcore reports.

Input: nothing. Output: `TRAINING` and `EVALUATION`, and the functions that lay metrics out by them.
Example: the entry `brier` makes an evaluation log `eval/rm/brier` and puts a column into report.html, a tile above it
and a sentence into the model card.

To add a metric, compute it (rmcore/training/metrics.py, or pair_metrics.py and its neighbours) and add an entry here.
The log, the console, `rmcore evaluate`, report.html and the model card read this table, and a test compares it with
README.md of this folder and with the log of a run.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rmcore.config.schema import UNNAMED
from rmcore.data.rewardbench import SECTIONS
from rmcore.evaluation.rewardbench import ROWS_2, section_name

# The table that `rmcore evaluate` prints, report.html, the model card, and the comparison of several models.
Place = Literal["evaluate", "page", "card", "models"]
ALL_TABLES: tuple[Place, ...] = ("evaluate", "page", "card", "models")


@dataclass(frozen=True)
class Metric:
    """One entry of the table.

    Args:
        name: the key in the dict of metrics, which is also the key in `rmcore evaluate --json`.
        meaning: one sentence for people.
        prefix: what metrics.jsonl writes before the name; of an evaluation, that of the set without a name.
        logged: False for what only --json, the report and the card hold.
        better: whether more or less of it is better, so that run.best_metric may be this metric; None: neither.
        sometimes: the metric is missing in many runs (a known GPU, several answers or another objective needed).
        console: label and format on the console; None keeps the metric off it.
        column: heading and format in tables.
        tables: the tables that have the column.
        tile: the small print of the metric's tile on report.html, a format string over all metrics; None: no tile.
        sentence: a line below the table of `rmcore evaluate`, likewise a format string.
        on_card: whether the model card has the sentence, too.
    """

    name: str
    meaning: str
    prefix: str = f"eval/{UNNAMED}/"
    logged: bool = True
    better: Literal["more", "less"] | None = None
    sometimes: bool = False
    console: tuple[str, str] | None = None
    column: tuple[str, str] = ("", "")
    tables: tuple[Place, ...] = ()
    tile: str | None = None
    sentence: str = ""
    on_card: bool = False

    @property
    def log_name(self) -> str:
        """The key in metrics.jsonl."""
        return self.prefix + self.name


TRAINING = (
    Metric(
        "loss",
        "Mean of the training objective.",
        prefix="train/rm/",
        console=("loss", ".4f"),
    ),
    Metric(
        "accuracy",
        "Share of the pairs with r_chosen > r_rejected; a tie is an error, 0.5 is chance.",
        prefix="train/rm/",
        console=("accuracy", ".3f"),
    ),
    Metric("chosen_rewards", "Mean reward of the preferred answers.", prefix="train/rm/"),
    Metric("rejected_rewards", "Mean reward of the other answers.", prefix="train/rm/"),
    Metric(
        "reward_margin",
        "Mean of r_chosen - r_rejected.",
        prefix="train/rm/",
        console=("reward_margin", ".3f"),
    ),
    Metric("lr", "Learning rate of the last step.", prefix="train/rm/", console=("lr", ".2e")),
    Metric(
        "sft_loss",
        "Mean language-modelling loss of the chosen answers per token, with `loss.sft`.",
        prefix="train/rm/",
        sometimes=True,
    ),
    Metric(
        "router_balance",
        "Mean balance of the experts over the texts, 1 if all are used equally, with `loss.router_aux`; "
        "`train/rm/loss` of one objective over pairs, lists or answers holds `loss.router_aux` times it.",
        prefix="train/rm/",
        sometimes=True,
    ),
    Metric(
        "length_correlation",
        "Correlation of reward and length over the answers of the last step, with `loss.length_decorrelation`.",
        prefix="train/rm/",
        sometimes=True,
    ),
    Metric("head_lr", "The same of the score head, with `optim.head_lr`.", prefix="train/rm/", sometimes=True),
    Metric("skipped_steps", "Steps that were skipped because their gradient was NaN or Inf.", prefix="train/"),
    Metric(
        "grad_norm",
        "Global norm of the gradient before clipping, mean over the steps that were not skipped.",
        prefix="",
        console=("grad_norm", ".3g"),
    ),
    Metric("pairs_per_second", "Pairs trained on per second.", prefix="", console=("pairs/s", ".1f")),
    Metric("tokens_per_second", "Computed tokens per second.", prefix="", console=("tokens/s", ",.0f")),
    Metric(
        "logical_tokens_per_second",
        "Tokens of all texts per second, as if each prompt were computed once per answer.",
        prefix="",
    ),
    Metric(
        "sharing_ratio",
        "Logical tokens divided by computed tokens; 1.6 means 1.6 tokens for the price of one.",
        prefix="",
    ),
    Metric("step_seconds", "Mean time of a step in seconds.", prefix=""),
    Metric(
        "mfu",
        "Model FLOP/s utilisation: 6 FLOP per computed token and matrix element (of the last layer only those of keys "
        "and values), plus causal attention, divided by the dense bf16 peak of the GPUs. Only on GPUs whose peak is "
        "known, and not with LoRA, `loss.sft` or `loss.router_aux`.",
        prefix="",
        sometimes=True,
    ),
)

EVALUATION = (
    Metric(
        "accuracy",
        "Share of the pairs with r_chosen > r_rejected; a tie is an error, 0.5 is chance.",
        better="more",
        console=("accuracy", ".4f"),
        column=("accuracy", ".4f"),
        tables=ALL_TABLES,
        tile="{accuracy_low:.3f} to {accuracy_high:.3f}",
    ),
    Metric(
        "accuracy_low",
        "Lower end of the 95 % interval of the accuracy (Wilson). Pairs of one comparison are not independent trials.",
        better="more",
        console=("from", ".4f"),
        column=("95 % interval", ".4f"),  # the cell holds both ends: see `_cell`
        tables=ALL_TABLES,
    ),
    Metric("accuracy_high", "Upper end of this interval.", console=("to", ".4f")),
    Metric(
        "length_accuracy",
        "Accuracy of always preferring the longer answer. A model that is not better has learnt no more than that.",
        console=("length_alone", ".4f"),
        column=("longer answer", ".4f"),
        tables=ALL_TABLES,
        tile="accuracy of always preferring it",
        sentence="Longer answer: the accuracy of always preferring the longer answer.",
        on_card=True,
    ),
    Metric(
        "length_matched_accuracy",
        "Accuracy on the pairs whose lengths differ by at most a tenth of the longer. Only where there are such pairs.",
        better="more",
        sometimes=True,
        column=("like lengths", ".4f"),
        tables=("page",),
        sentence="Lengths within 10 %: accuracy {length_matched_accuracy:.4f} ({length_matched_count:,} pairs).",
    ),
    Metric(
        "length_matched_count", "Number of pairs whose lengths differ by at most a tenth of the longer.", logged=False
    ),
    Metric(
        "length_controlled_accuracy",
        "Accuracy at equal length: sigmoid(a) of the fit log odds(right) = a + b tanh(difference of the lengths / "
        "their standard deviation). Only where the differences vary, or all are 0.",
        better="more",
        sometimes=True,
        console=("equal_length", ".4f"),
        column=("equal length", ".4f"),
        tables=("evaluate", "page", "models"),
        tile="{length_controlled_low:.3f} to {length_controlled_high:.3f}",
        sentence="Equal length: accuracy {length_controlled_accuracy:.4f} (95 % interval {length_controlled_low:.4f} "
        "to {length_controlled_high:.4f}) by a logistic fit on the difference of the lengths.",
        on_card=True,
    ),
    Metric("length_controlled_low", "Lower end of the 95 % interval of `length_controlled_accuracy`.", sometimes=True),
    Metric("length_controlled_high", "Upper end of this interval.", sometimes=True),
    Metric(
        "accuracy_chosen_longer",
        "Accuracy on the pairs whose preferred answer is the longer one.",
        logged=False,
        sometimes=True,
    ),
    Metric(
        "accuracy_chosen_shorter",
        "Accuracy on the pairs whose preferred answer is the shorter one.",
        logged=False,
        sometimes=True,
    ),
    Metric(
        "loss",
        "Mean of -log sigmoid(r_chosen - r_rejected), whatever the objective; ln 2 = 0.693 is chance, "
        "more means confidently wrong.",
        better="less",
        console=("loss", ".4f"),
        column=("loss", ".4f"),
        tables=ALL_TABLES,
        tile="chance 0.693",
    ),
    Metric(
        "objective_loss",
        "Mean of the training objective with its margins and extras, the only metric in which ties count. "
        "Only where the objective differs from the plain pairwise loss.",
        better="less",
        sometimes=True,
        console=("objective", ".4f"),
    ),
    Metric(
        "chosen_rewards",
        "Mean reward of the preferred answers. The level of rewards means nothing and may drift: "
        "adding a constant to all rewards changes no loss.",
        column=("chosen", ".4f"),
        tables=("evaluate",),
    ),
    Metric(
        "rejected_rewards",
        "Mean reward of the other answers.",
        column=("rejected", ".4f"),
        tables=("evaluate",),
    ),
    Metric(
        "reward_margin",
        "Mean of r_chosen - r_rejected. If it grows while the loss of the evaluation grows, the model overfits.",
        better="more",
        console=("reward_margin", ".4f"),
        column=("margin", ".3f"),
        tables=("evaluate", "page"),
        tile="mean reward difference",
    ),
    Metric(
        "ece",
        "Expected calibration error: mean distance of the confidence, sigmoid of the size of the margin, from the "
        "share of correct pairs, over ten bins.",
        better="less",
        column=("ECE", ".3f"),
        tables=("page", "models"),
        tile="0: confidence is accuracy",
        sentence="Calibration of sigmoid(r_chosen - r_rejected): ECE {ece:.4f}, Brier score {brier:.4f} "
        "(0.25 is chance).",
        on_card=True,
    ),
    Metric(
        "brier",
        "Brier score: mean of (1 - sigmoid(r_chosen - r_rejected))^2; 0.25 is chance.",
        better="less",
        column=("Brier", ".3f"),
        tables=("page", "models"),
        tile="chance 0.250",
    ),
    Metric("reward_mean", "Mean of the rewards of all answers, to see them drift."),
    Metric("reward_std", "Standard deviation of the rewards of all answers, to see them spread."),
    Metric(
        "length_spearman_within",
        "Rank correlation of reward and length, after the mean of the comparison is subtracted from both.",
        column=("reward ~ length", "+.3f"),
        tables=("models",),
        sentence="Reward and length within a prompt: Spearman {length_spearman_within:+.4f}, "
        "Pearson {length_pearson_within:+.4f}.",
    ),
    Metric(
        "length_pearson_within",
        "Linear correlation of reward and length, after the same subtraction as for `length_spearman_within`.",
        logged=False,
    ),
    Metric("length_spearman", "Rank correlation of reward and length over all answers.", logged=False),
    Metric("length_pearson", "Linear correlation of reward and length over all answers.", logged=False),
    Metric(
        "best_of_k_accuracy",
        "Share of the comparisons in which a best answer has the highest reward; if n answers share the highest "
        "reward, each is worth 1/n. Only for comparisons of three or more answers.",
        better="more",
        sometimes=True,
        column=("best of k", ".4f"),
        tables=("page", "models"),
        tile="chance {best_of_k_chance:.3f}",
        sentence="Best of 3 answers or more: {best_of_k_accuracy:.4f} of {best_of_k_count:,} comparisons "
        "(chance {best_of_k_chance:.4f}).",
        on_card=True,
    ),
    Metric(
        "best_of_k_chance",
        "The `best_of_k_accuracy` that answers drawn at random would reach.",
        logged=False,
        sometimes=True,
    ),
    Metric(
        "best_of_k_count",
        "Number of comparisons of three or more answers that count for `best_of_k_accuracy`.",
        logged=False,
        sometimes=True,
    ),
    Metric(
        "count",
        "Number of pairs.",
        console=("pairs", "d"),
        column=("pairs", ",d"),
        tables=ALL_TABLES,
        tile="{source_count}",
    ),
    Metric(
        "rewardbench_score",
        "The score of RewardBench, by its own rules. Only on its data, as the next ones.",
        better="more",
        sometimes=True,
        console=("rewardbench", ".4f"),
        column=("RewardBench", ".4f"),
        tables=("page", "models"),
    ),
    *(
        Metric(section_name(section), f"The score of the section {section}.", better="more", sometimes=True)
        for section in dict.fromkeys([*SECTIONS, *ROWS_2])
    ),
)


OWN = "own"  # the metrics of the user's functions (own_metrics.py), by their names


def prefix(name: str) -> str:
    """What the log writes before the metrics of an evaluation set: eval/rm/ for the one without a name, eval/NAME/."""
    return f"eval/{name}/"


def logged(metrics: Mapping[str, Any], name: str = UNNAMED) -> dict[str, float]:
    """The metrics of an evaluation set under their names in metrics.jsonl: eval/rm/accuracy, eval/rm/loss, ..."""
    found = [metric.name for metric in EVALUATION if metric.logged and metric.name in metrics]
    own = {prefix(name) + metric: value for metric, value in metrics.get(OWN, {}).items()}
    return {prefix(name) + metric: metrics[metric] for metric in found} | own


def sets_of(metrics: Iterable[str]) -> list[str]:
    """The evaluation sets that have some of these metrics: ["eval/rm/loss", "eval/a/loss", "eval/a/ece"] -> [rm, a]."""
    return list(dict.fromkeys(name.split("/")[1] for name in metrics if name.startswith("eval/")))


def from_log(logged: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of all sets of an evaluation from their names in the log: the reverse of `Evaluations.logged`."""
    sets = {
        name: {key.removeprefix(prefix(name)): value for key, value in logged.items() if key.startswith(prefix(name))}
        for name in sets_of(logged)
    }
    main = next(iter(sets.values()), {})
    return main if list(sets) in ([], [UNNAMED]) else {**main, "sets": sets}


def console_line(metrics: Mapping[str, float], name: str = UNNAMED) -> str:
    """Logged metrics as a line: {"train/rm/loss": 0.5, "grad_norm": 1.25} -> "loss 0.5000 grad_norm 1.25".

    `name`: the evaluation set whose metrics are shown.
    """
    keys = [(metric.log_name, metric) for metric in TRAINING]
    keys += [(prefix(name) + metric.name, metric) for metric in EVALUATION]
    known = {key for key, _ in keys}
    shown = [
        f"{metric.console[0]} {format(metrics[key], metric.console[1])}"
        for key, metric in keys
        if metric.console and key in metrics
    ]
    own = [key for key in metrics if key.startswith(prefix(name)) and key not in known]
    return " ".join([*shown, *(f"{key.removeprefix(prefix(name))} {metrics[key]:.4g}" for key in own)])


def table(metrics: Mapping[str, Any], place: Place) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the metrics of an evaluation: a row for all data, and one for each of several sources.

    The first two columns are the source (without a heading) and its pairs. A column that no row fills is left out.
    Example: (["", "pairs", "accuracy", ...], [["all", "2,000", "0.7500", ...], ["helpful", "1,200", "0.7600", ...]]).
    """
    sources = metrics.get("sources", {})
    rows = {"all": metrics, **(sources if len(sources) > 1 else {})}
    count_first = sorted(EVALUATION, key=lambda metric: metric.name != "count")
    columns = [
        metric for metric in count_first if place in metric.tables and any(metric.name in row for row in rows.values())
    ]
    heads = ["", *(metric.column[0] for metric in columns)]
    return heads, [[name, *(_cell(row, metric) for metric in columns)] for name, row in rows.items()]


def aligned(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table as lines of text: the first column on the left, the others on the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = []
    for first, *others in [heads, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines


def _cell(row: Mapping[str, Any], metric: Metric) -> str:
    if metric.name == "accuracy_low" and metric.name in row:
        return " to ".join(shown(row[end], metric.column[1]) for end in ("accuracy_low", "accuracy_high"))
    return shown(row.get(metric.name), metric.column[1])


def shown(value: Any, how: str) -> str:
    """A number in the format `how`; "-" for NaN and for what is missing."""
    return format(value, how) if isinstance(value, int | float) and value == value else "-"


def tiles(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Label, number and small print of the tiles of report.html."""
    count = len(metrics.get("sources", {}))
    words = {**metrics, "source_count": f"{count:,} source{'s' * (count != 1)}"}
    for metric in EVALUATION:
        if metric.tile is not None and metric.name in metrics:
            label, how = metric.column
            yield label, shown(metrics[metric.name], ",d" if how == ",d" else ".3f"), metric.tile.format_map(words)


def sentences(metrics: Mapping[str, Any], *, card: bool = False) -> list[str]:
    """The sentences below a table whose numbers are all there; with `card` those of the model card."""
    chosen = [metric.sentence for metric in EVALUATION if metric.sentence and (metric.on_card or not card)]
    return [sentence.format_map(metrics) for sentence in chosen if _fields(sentence) <= metrics.keys()]


def _fields(sentence: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(sentence) if name}
