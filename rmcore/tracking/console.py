"""The console of rank 0: a progress bar on a terminal, plain lines in a file, the samples table on both.

In: figures by name at a moment of the run, sample rows, lines of text. Out: text on a rich `Console`.
Example of a plain line: step 10/28 episode 640 epoch 0.357 loss 0.6931 accuracy 0.531 lr 2.70e-06 ... eta 0:01:23
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rmcore.host.terminal import _clock, visible

if TYPE_CHECKING:
    from rmcore.evaluation.samples import SampleRow
    from rmcore.tracking.moment import Moment

SHOWN_CHARACTERS = 240  # of each text in the samples table; samples.jsonl holds them whole
FILE_WIDTH = 160  # characters a line of a table in a log file, which has no edge to fit

# Figure, its label on the console, its format.
LABELS = (
    ("train/rm/loss", "loss", ".4f"),
    ("train/rm/accuracy", "accuracy", ".3f"),
    ("train/rm/reward_margin", "reward_margin", ".3f"),
    ("train/rm/lr", "lr", ".2e"),
    ("grad_norm", "grad_norm", ".3g"),
    ("pairs_per_second", "pairs/s", ".1f"),
    ("tokens_per_second", "tokens/s", ",.0f"),
    ("eval/rm/accuracy", "accuracy", ".4f"),
    ("eval/rm/accuracy_low", "from", ".4f"),
    ("eval/rm/accuracy_high", "to", ".4f"),
    ("eval/rm/length_accuracy", "length_alone", ".4f"),
    ("eval/rm/loss", "loss", ".4f"),
    ("eval/rm/objective_loss", "objective", ".4f"),
    ("eval/rm/reward_margin", "reward_margin", ".4f"),
    ("eval/rm/count", "pairs", "d"),
)


class Screen:
    """A progress bar on a terminal, plain lines elsewhere; the samples table on both."""

    def __init__(self, console: Console, steps: int, start_step: int) -> None:
        self.console, self._steps, self._start_step = console, steps, start_step
        self._started = time.monotonic()
        self._progress: Progress | None = None
        if not console.is_terminal:
            console.width = max(console.width, FILE_WIDTH)
        else:
            self._progress = Progress(
                TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), console=console, refresh_per_second=2,
            )  # fmt: skip
            self._task = self._progress.add_task("train", total=steps, completed=start_step, figures="")
            self._progress.start()

    def say(self, text: str | Text) -> None:
        plain = Text(visible(text)) if isinstance(text, str) else text
        self.console.print(plain, soft_wrap=True)

    def step_done(self, step: int) -> None:
        if self._progress:
            self._progress.update(self._task, completed=step)

    def figures(self, at: Moment, figures: Mapping[str, float]) -> None:
        shown = " ".join(f"{label} {format(figures[name], how)}" for name, label, how in LABELS if name in figures)
        if any(name.startswith("eval/") for name in figures):
            self.say(f"evaluation at step {at.step}: {shown}")
        elif self._progress:
            self._progress.update(self._task, completed=at.step, figures=shown)
        else:
            done = at.step - self._start_step
            left = (time.monotonic() - self._started) / max(done, 1) * (self._steps - at.step)
            place = f"step {at.step}/{self._steps} episode {at.episode} epoch {at.epoch:.3f}"
            self.say(f"{place} {shown} eta {_clock(left)}")

    def samples(self, at: Moment, rows: Sequence[SampleRow]) -> None:
        table = Table(title=f"samples at step {at.step}", show_lines=True)
        for column in ("prompt", "chosen", "rejected"):
            table.add_column(column, ratio=3, overflow="fold")
        for column in ("rewards", "correct"):
            table.add_column(column, justify="right")
        for row in rows:
            texts = (Text(_short(text)) for text in (row.prompt, row.chosen, row.rejected))
            rewards = Text(f"{row.chosen_reward:.4f}\n{row.rejected_reward:.4f}")
            table.add_row(*texts, rewards, Text("yes", "green") if row.correct else Text("no", "red"))
        self.console.print(table)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()


def _short(text: str) -> str:
    """The end of a long text: what is scored is its last token."""
    text = visible(text)
    return text if len(text) <= SHOWN_CHARACTERS else "\u2026" + text[-SHOWN_CHARACTERS:]
