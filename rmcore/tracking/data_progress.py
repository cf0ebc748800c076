"""Prints the progress of preparing data: a bar on a terminal, a line every ten seconds elsewhere.

Input: (rows done, rows in total, what), from the one process that prepares. Output: text on stderr.
Example: data.train: 120,832 of 1,000,000 rows, 4,310 rows/s, eta 0:03:24

A part that is ready within ten seconds prints nothing into a log file.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from rmcore.host.terminal import clock, print_text

SECONDS = 10.0  # between two lines in a log file


class DataProgress:
    """`with DataProgress() as progress: prepare_data(..., progress=progress)`."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, tuple[float, int]] = {}  # time of the first call for a part, and its rows done by then
        self._printed: dict[str, float] = {}  # time of the last line for a part

    def __enter__(self) -> DataProgress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, what: str) -> None:
        if sys.stderr.isatty():
            self._update_bar(done, total, what)
            return
        now = time.monotonic()
        started, first = self._started.setdefault(what, (now, done))
        if now - self._printed.setdefault(what, started) < self._seconds:
            return
        self._printed[what] = now
        rate = (done - first) / (now - started)
        left = f", {rate:,.0f} rows/s, eta {clock((total - done) / rate)}" if rate > 0 else ""
        print_text(f"{what}: {done:,} of {total:,} rows{left}", sys.stderr)

    def _update_bar(self, done: int, total: int, what: str) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("rows, eta"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                refresh_per_second=4,
            )
            self._bar.start()
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[what], completed=done)
