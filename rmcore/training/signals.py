"""Handles the signals that ask a job to stop: the run saves and stops; a second signal ends the process at once.

Input: signals.
Output: `Stopped`, raised at once if nothing would be lost, or by the saver at the next step boundary if signals are
`deferred()`.
Example: SIGTERM during step 7 -> step 7 ends, all ranks agree to stop, checkpoint step-7 is written, exit code 3.

Schedulers send TERM or what their users chose (USR1, USR2), a terminal INT or QUIT, and HUP when it closes. Under nohup
HUP stays ignored, unless torchrun, which handles it, forwards it.

Python calls a handler only between two steps of its interpreter. While the main thread hangs in a native call (a CUDA
call, say, that waits for a collective of NCCL), a thread of this module still sees the signal, and calls `watch`.

Signals within TWICE seconds count as one, because a scheduler signals every process and torchrun forwards the signal
again.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

from rmcore.host.terminal import print_text
from rmcore.parallel.world import World, any_rank_max

TWICE = 2.0  # seconds after which a signal is a second one
CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(BaseException):
    """The run received a signal to stop. `step`, `episode`: its position; 0 before the first step."""

    def __init__(self, number: int, step: int = 0, episode: int = 0) -> None:
        self.step, self.episode = step, episode
        self.name = signal.Signals(number).name
        super().__init__(f"stopped by {self.name}")


class EvaluationGivenUp(Exception):
    """An evaluation was left unfinished because of a signal; the saver stops the run right after it."""


def give_up_if_stopped(world: World, signals: "Signals") -> None:
    """Raises EvaluationGivenUp on all ranks if any of them received a signal; a collective."""
    if any_rank_max(world, [signals.received])[0]:
        raise EvaluationGivenUp


class Signals:
    """The signals of this process. `received`: the number of a signal that came while deferred, 0 for none. `watch`: if
    set, a thread calls it with the number of the first signal.

    guest: the run is part of a program or a notebook. Only SIGINT and SIGTERM are caught, and only if the program does
    not handle them itself; a second signal raises KeyboardInterrupt and does not end the process.
    """

    def __init__(self, *, guest: bool = False) -> None:
        self.received = 0
        self.watch: Callable[[int], None] | None = None
        self._guest = guest
        self._first = 0.0
        self._deferred = False

    @contextmanager
    def watched(self) -> Iterator["Signals"]:
        """Catch signals inside; the former handlers are restored afterwards. Only for the main thread of a process.

        In another thread of a program nothing is caught, because Python handles signals in the main thread.
        """
        under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        caught = [number for number in CAUGHT if not (under_nohup and number == signal.SIGHUP)]
        if self._guest:
            is_main = threading.current_thread() is threading.main_thread()
            free = (signal.SIG_DFL, signal.default_int_handler)
            guests = (signal.SIGINT, signal.SIGTERM) if is_main else ()
            caught = [number for number in guests if signal.getsignal(number) in free]
        former = {number: signal.signal(number, self._handle) for number in caught}
        listening = nullcontext() if self._guest else self._listening(caught)
        try:
            with listening:
                yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    @contextmanager
    def _listening(self, caught: list[signal.Signals]) -> Iterator[None]:
        """The interpreter writes the number of each signal into a pipe at once, and a thread reads it."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        former = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

        def listen() -> None:
            with os.fdopen(reading, "rb", buffering=0) as numbers:
                while number := numbers.read(1):
                    if number[0] in caught and self.watch is not None:
                        self.watch(number[0])
                        return

        threading.Thread(target=listen, name="rmcore-signals", daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(former)
            os.close(writing)

    @contextmanager
    def deferred(self, world: World) -> Iterator[None]:
        """Inside, a signal only sets `received`; the code inside checks it and raises Stopped itself.

        At the end the ranks compare what they received, a collective, and all of them raise Stopped or none does: a
        signal may reach one rank after the last check inside.
        """
        self._deferred = True
        try:
            yield
            self.received = any_rank_max(world, [self.received])[0]
        finally:
            self._deferred = False
        if self.received:
            raise Stopped(self.received)

    def ignore(self) -> None:
        """Ignore signals from here on, because the process is about to end."""
        self._deferred = True

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.received and now - self._first < TWICE:
            return
        if self.received and self._guest:
            raise KeyboardInterrupt
        if self.received:
            print_text("rmcore.train: a second signal: leaving at once", sys.stderr)
            os._exit(128 + number)
        self.received, self._first = number, now
        if not self._deferred:
            raise Stopped(number)
