"""Progress of preparing data: a bar with ETA on a terminal, a line now and then elsewhere.

In: (rows done, rows in all, what), called by the one process that prepares. Out: text on stderr, such as
    data.train: 120,832 of 1,000,000 rows, 4,310 rows/s, eta 0:03:24
A part that is ready within some seconds says nothing in a log file.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SECONDS = 10.0  # between two lines in a log file


class DataProgress:
    """`with DataProgress() as progress: prepare_data(..., progress=progress)`."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, tuple[float, int]] = {}  # when a part was first heard of, and its rows done by then
        self._told: dict[str, float] = {}

    def __enter__(self) -> DataProgress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, what: str) -> None:
        if sys.stderr.isatty():
            self._show(done, total, what)
            return
        now = time.monotonic()
        started, first = self._started.setdefault(what, (now, done))
        if now - self._told.setdefault(what, started) < self._seconds:
            return
        self._told[what] = now
        rate = (done - first) / (now - started)
        left = f", {rate:,.0f} rows/s, eta {_clock((total - done) / rate)}" if rate > 0 else ""
        print(f"{what}: {done:,} of {total:,} rows{left}", file=sys.stderr, flush=True)

    def _show(self, done: int, total: int, what: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows, eta"),
                TimeRemainingColumn(), console=Console(stderr=True), refresh_per_second=4,
            )  # fmt: skip
            self._bar.start()
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[what], completed=done)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
