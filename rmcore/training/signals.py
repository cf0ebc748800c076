"""SIGTERM and SIGINT: stop after saving, and leave at once when asked twice.

Enters: signals. Leaves: `Stopped`, raised at once where there is nothing to lose, or at the next step boundary inside
`deferred()`. Example: SIGTERM during step 7 -> the step ends, every rank hears of it, checkpoint step-8 is written,
exit 3. Signals within TWICE seconds are one: a scheduler signals a process and torchrun passes the same signal on.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rmcore.parallel.world import World, any_rank_max

TWICE = 2.0  # seconds
CAUGHT = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """The run was asked to stop. `step`, `episode`: where it was; 0 before the first step."""

    def __init__(self, number: int, step: int = 0, episode: int = 0) -> None:
        self.step, self.episode = step, episode
        self.name = signal.Signals(number).name
        super().__init__(f"stopped by {self.name}")


class GivenUp(Exception):
    """What ran between two steps was left unfinished for a signal; the next boundary saves and stops."""


def give_up_if_stopped(world: World, signals: "Signals") -> None:
    """Raises GivenUp on all ranks when any of them got a signal; a collective."""
    if any_rank_max(world, [signals.received])[0]:
        raise GivenUp


class Signals:
    """`received`: the number of the signal that came while it was deferred, 0 for none."""

    def __init__(self) -> None:
        self.received = 0
        self._first = 0.0
        self._deferred = False

    @contextmanager
    def watched(self) -> Iterator["Signals"]:
        """Catch them; the former handlers come back afterwards. In the main thread of the process alone."""
        former = {number: signal.signal(number, self._handle) for number in CAUGHT}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal only sets `received`; the code inside looks at it and raises Stopped itself."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.received:
            raise Stopped(self.received)

    def ignore(self) -> None:
        """From here on the process ends by itself, and soon."""
        self._deferred = True

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.received and now - self._first < TWICE:
            return
        if self.received:
            print("rmcore.train: a second signal: leaving at once", file=sys.stderr, flush=True)
            os._exit(128 + number)
        self.received, self._first = number, now
        if not self._deferred:
            raise Stopped(number)
