"""Prints the progress of a run on rank 0: a progress bar on a terminal or in a notebook, plain lines in a file.

Input: metrics by name at a moment of the run, sample rows, lines of text. Output: text on a rich `Console`.
Example of a plain line: step 10/28 episode 640 epoch 0.357 loss 0.6931 accuracy 0.531 lr 2.70e-06 ... eta 0:01:23
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rmcore.config.schema import UNNAMED
from rmcore.evaluation.metrics import console_line, sets_of
from rmcore.evaluation.samples import SampleRow
from rmcore.host.terminal import clock, visible
from rmcore.tracking.moment import Moment

SHOWN_CHARACTERS = 240  # of each text in the samples table; samples.jsonl contains the whole texts
FILE_WIDTH = 160  # characters per line of a table in a log file, which has no width of its own


class Screen:
    """A sink of the tracker (rmcore/tracking/tracker.py): a progress bar or plain lines, and the samples table."""

    def __init__(self, console: Console, steps: int, start_step: int) -> None:
        self.console, self._steps, self._start_step = console, steps, start_step
        self._started = time.monotonic()
        self._progress: Progress | None = None
        if not console.is_terminal and not has_widgets(console):
            console.width = max(console.width, FILE_WIDTH)
        else:
            self._progress = Progress(
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[metrics]}"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=console,
                refresh_per_second=2,
            )
            self._task = self._progress.add_task("train", total=steps, completed=start_step, metrics="")
            self._progress.start()

    def say(self, text: str | Text) -> None:
        plain = Text(visible(text)) if isinstance(text, str) else text
        self.console.print(plain, soft_wrap=True)

    def step_done(self, step: int) -> None:
        if self._progress:
            self._progress.update(self._task, completed=step)

    def metrics(self, at: Moment, metrics: Mapping[str, float]) -> None:
        if sets := sets_of(metrics):
            for name in sets:
                of = "" if name == UNNAMED else f" of {name}"
                self.say(f"evaluation{of} at step {at.step}: {console_line(metrics, name)}")
            return
        line = console_line(metrics)
        if self._progress:
            self._progress.update(self._task, completed=at.step, metrics=line)
        else:
            done = at.step - self._start_step
            left = (time.monotonic() - self._started) / max(done, 1) * (self._steps - at.step)
            place = f"step {at.step}/{self._steps} episode {at.episode} epoch {at.epoch:.3f}"
            self.say(f"{place} {line} eta {clock(left)}")

    def samples(self, at: Moment, rows: Sequence[SampleRow], name: str) -> None:
        of = "" if name == UNNAMED else f" of {name}"
        table = Table(title=f"samples{of} at step {at.step}", show_lines=True)
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


def has_widgets(console: Console) -> bool:
    """Whether this is a notebook that can show a progress bar, for which rich needs ipywidgets."""
    return console.is_jupyter and find_spec("ipywidgets") is not None


def _short(text: str) -> str:
    """The end of a long text, because its last token is scored."""
    text = visible(text)
    return text if len(text) <= SHOWN_CHARACTERS else "\u2026" + text[-SHOWN_CHARACTERS:]
