"""Publishes where each rank is, so that an error message can name the rank that hung or died.

Input: the phase that this rank enters.
Output: if something goes wrong, one message from one rank, and the end of all ranks.
Example: rank 1 waits for a file that never comes. After parallel.timeout_seconds rank 0's collective fails, and rank 0
prints "lost touch with other ranks at step 7, phase backward: rank 1 last seen at step 7, phase data, for 61 s". The
failure is in the store, so rank 1's thread ends its process too.

A thread on every rank writes the rank's place into the process group's store twice per second. It works while a
collective waits. When a collective times out, NCCL ends the process without an exception, so on GPUs the thread reports
a phase that has lasted nearly that long. After a signal to stop, a thread ends a process whose step does not move, also
one without other ranks: the scheduler would kill it soon, and the status would remain "running".

Phases of a step: data (waiting for a micro batch), compute (forward), backward (with its gradient sync), update,
boundary; evaluate and save where they are due; export after the last step.
"""

import json
import os
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from rmcore.config import UserError
from rmcore.data.batches.batch import RaggedBatch
from rmcore.host.faults import fault
from rmcore.host.terminal import print_text
from rmcore.parallel.world import RankError, World, all_gather_json
from rmcore.tracking.status import read_status, record_status
from rmcore.tracking.tracker import Tracker

BEAT_SECONDS = 0.5  # between two beats
LISTEN_SECONDS = 3.0  # within this time a live rank beats, and a failed rank publishes its message
GRACE_SECONDS = 15.0  # for a rank to leave by itself after another one failed
NCCL_SECONDS = 20.0  # before NCCL would end the process, its hang is reported
SIGNAL_SECONDS = 20.0  # after a signal, for a step to move; schedulers kill 30 s after it (torchrun, Kubernetes, Slurm)
UNUSUAL = 4.0  # a phase hangs once it takes UNUSUAL times as long as the longest one of its kind
STEP_PHASES = ("data", "compute", "backward", "update", "boundary")  # none lasts as long as a collective may wait
SLOW, SLOW_SECONDS = 1.5, 0.05  # a slow rank takes SLOW times as long as the median rank, and SLOW_SECONDS longer


class DeviceTime:
    """How long a GPU takes between two marks, of which every second one ends what is measured."""

    def __init__(self) -> None:
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """Queue a mark behind the work of the device so far."""
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        self._marks.append(mark)

    def seconds(self) -> float:
        """Since the last call; waits for the marks."""
        marks, self._marks = self._marks, []
        if marks:
            marks[-1].synchronize()
        return sum(a.elapsed_time(b) for a, b in zip(marks[::2], marks[1::2], strict=False)) / 1e3


class StuckError(RuntimeError):
    """The main thread of this rank does not move, and the process has to end."""


@dataclass(frozen=True)
class Place:
    """What a rank published last: its number of beats, step, phase, seconds in this phase, and host."""

    beats: int
    step: int
    phase: str
    seconds: float
    host: str

    def __str__(self) -> str:
        return f"step {self.step}, phase {self.phase}"


class Heartbeat:
    """The places of this rank and of the others; use it in a `with` around the run. One rank publishes nothing.

    prints: print the reason of a failure; a program that gets it as an exception prints it itself.
    """

    def __init__(self, world: World, *, prints: bool = True) -> None:
        self._world, self.prints = world, prints
        self.step, self.phase, self._since = 0, "start", time.monotonic()
        self.tokens = 0  # of the micro batch under way
        self._own_seconds, self._steps = 0.0, 0
        self._device_time = DeviceTime() if world.device.type == "cuda" else None
        self._longest: dict[str, float] = {}  # seconds, by phase
        self.run_dir: str | None = None  # where to write run_status.json, once this run owns the directory
        self._end, self._one_thread, self._printed = threading.Event(), threading.Lock(), False
        self._store = None
        if world.size > 1:
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore("rmcore/heartbeat", store.clone())  # a connection of its own

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self._world.is_main

    def __enter__(self) -> "Heartbeat":
        if self._store is not None:
            threading.Thread(target=self._beat, name="rmcore-heartbeat", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def at(self, phase: str, step: int | None = None) -> None:
        """This rank enters a phase; costs well under a microsecond."""
        now = time.monotonic()
        self._longest[self.phase] = max(self._longest.get(self.phase, 0.0), now - self._since)
        if self.phase in ("data", "compute"):  # up to the gradient sync, a rank does not wait for other ranks
            self._own_seconds += now - self._since
        if self._device_time and (phase == "compute" or (self.phase, phase) == ("compute", "backward")):
            self._device_time.mark()
        self.step, self.phase, self._since = self.step if step is None else step, phase, now
        fault(phase)

    def through(
        self, step: int, micro_batches: Iterable[tuple[RaggedBatch, bool]]
    ) -> Iterator[tuple[RaggedBatch, bool]]:
        """Yields the micro batches of a step. The phase is data while waiting for one, compute after it is there."""
        self.at("data", step)
        self._steps += 1
        for batch, is_last in micro_batches:
            self.tokens = batch.computed_tokens
            self.at("compute")
            yield batch, is_last
            self.at("data")
        self.at("update")

    def report_slow_rank(self, tracker: Tracker) -> None:
        """Print which rank takes far longer than the others; a collective, once per log interval.

        On GPUs the time counts in which the device, and not the host, computes the forwards.
        """
        on_device = self._device_time.seconds() if self._device_time else 0.0
        seconds = max(self._own_seconds, on_device) / max(1, self._steps)
        self._own_seconds, self._steps = 0.0, 0
        seconds_by_rank = all_gather_json(self._world, seconds)
        slowest, median = max(seconds_by_rank), statistics.median_low(seconds_by_rank)
        if slowest > SLOW * median and slowest - median > SLOW_SECONDS:
            rank = seconds_by_rank.index(slowest)
            tracker.say(
                f"rank {rank} is slow: it takes {slowest:.3f} s per step before the backward, the median rank "
                f"{median:.3f} s"
            )

    def watch_after(self, number: int) -> None:
        """Called in a thread when a signal came. Returns when the run ends; ends the process if a step hangs."""
        came = time.monotonic()
        while not self._end.wait(BEAT_SECONDS):
            phase, since = self.phase, self._since
            waited = time.monotonic() - max(came, since)
            limit = max(SIGNAL_SECONDS, UNUSUAL * self._longest.get(phase, 0.0))
            if phase in STEP_PHASES and waited > limit and self._since == since:
                name = signal.Signals(number).name
                self.failed(
                    StuckError(
                        f"{name} came, and the step did not move for {waited:.0f} s, so it is not saved; run the same "
                        "command again to resume from the newest checkpoint"
                    )
                )
                sys.stderr.flush()
                os._exit(1)

    def failed(self, error: BaseException) -> None:
        """The run ends with this error: one rank prints the reason and writes it to run_status.json.

        All ranks raise UserError and RankError together, so rank 0 prints them. Of other errors, the first rank that
        fails publishes its message, and the errors that follow on other ranks are not printed.
        """
        if isinstance(error, UserError | RankError):
            if self.is_main:
                self._print(str(error))
            return
        if self._store is None:
            self._print(self._explain(error))
            return
        # A call of the store may wait for ever if its host cannot be reached, so a thread makes these calls.
        publishing = threading.Thread(target=self._publish, args=(error,), name="rmcore-failure", daemon=True)
        publishing.start()
        publishing.join(GRACE_SECONDS)
        if publishing.is_alive() and not self._printed:
            self._print_unreachable(error)

    def _print_unreachable(self, error: BaseException) -> None:
        """Print the error here, because the store, and with it the other ranks, cannot be reached."""
        what = self._explain(error)
        if _is_collective(error):
            where = f"rank {self._world.rank} on {socket.gethostname()}"
            what = f"{where} lost touch with other ranks at step {self.step}, phase {self.phase}"
        store = os.environ.get("MASTER_ADDR", "rank 0's host")
        self._print(f"{what}; the job's store at {store} does not answer: that host or the network is down")

    def _publish(self, error: BaseException) -> None:
        """Publish that this rank failed, and see to it that one rank prints the message."""
        assert self._store is not None
        try:
            message = self._explain(error)
            if _is_collective(error):
                before = self._places()
                time.sleep(LISTEN_SECONDS)  # another rank may be about to publish the cause
                message = f"{self._missing_ranks(before)}\n({str(error).splitlines()[0][:200]})"
            self._store.compare_set("failure", "", message)
            end = time.monotonic() + 2 * LISTEN_SECONDS
            while not self.is_main and not self._store.check(["printed"]) and time.monotonic() < end:
                time.sleep(0.05)  # rank 0's thread prints it; if rank 0 is dead, this rank does
            self._print_failure()
        except (RuntimeError, dist.DistError):  # the connection was closed, or the store's process has ended
            self._print_unreachable(error)

    def _print_failure(self) -> None:
        """Print the published message, unless some rank already did."""
        assert self._store is not None
        with self._one_thread:
            me = f"{self._world.rank}"
            if not self._printed and self._store.compare_set("printed", "", me).decode() == me:
                self._print(self._store.get("failure").decode())

    def _print(self, message: str) -> None:
        self._printed = True
        if self.prints:
            print_text(f"rmcore.train: {message}", sys.stderr)
        # A run that starts writes "running" first. What is refused before leaves a completed run completed.
        if self.run_dir is not None and read_status(self.run_dir).get("status") != "completed":
            record_status(self.run_dir, "failed", step=self.step, reason=message)

    def _explain(self, error: BaseException) -> str:
        where = f"rank {self._world.rank} of {self._world.size} failed at step {self.step}, phase {self.phase}"
        if isinstance(error, torch.OutOfMemoryError):
            return (
                f"{where}: out of memory; a micro batch of {self.tokens:,} tokens does not fit: set batch.tokens lower "
                f"than that, or parallel.recompute=full, or batch.shrink=true and start again ({str(error)[:200]})"
            )
        if isinstance(error, StuckError):
            return f"{where}: {error}"
        return f"{where}:\n{''.join(traceback.format_exception(error)).rstrip()}"

    def _missing_ranks(self, before: dict[int, Place]) -> str:
        """Which ranks are silent or at another place, found by comparing their places now with those `before`."""
        after = self._places()
        others = {rank: place for rank, place in after.items() if rank != self._world.rank}
        here = socket.gethostname()
        names = {rank: f"rank {rank}" + (f" on {p.host}" if p.host != here else "") for rank, p in others.items()}
        silent = [rank for rank, place in others.items() if rank in before and before[rank].beats == place.beats]
        elsewhere = [
            rank
            for rank, place in others.items()
            if (place.step, place.phase) != (self.step, self.phase) and rank not in silent
        ]
        lines = [f"{names[rank]} is silent, last seen at {others[rank]}" for rank in silent]
        lines += [f"{names[rank]} last seen at {others[rank]}, for {others[rank].seconds:.0f} s" for rank in elsewhere]
        what = "; ".join(lines) or "every rank is at the same place"
        return f"rank {self._world.rank} lost touch with other ranks at step {self.step}, phase {self.phase}: {what}"

    def _places(self) -> dict[int, Place]:
        assert self._store is not None
        keys = {rank: f"place/{rank}" for rank in range(self._world.size)}
        return {
            rank: Place(*json.loads(self._store.get(key))) for rank, key in keys.items() if self._store.check([key])
        }

    def _beat(self) -> None:
        """The thread: publish this rank's place. End the process if another rank failed and this one does not leave."""
        assert self._store is not None
        beats, heard, reported = 0, 0.0, False
        try:
            while not self._end.wait(BEAT_SECONDS):
                beats += 1
                place = [beats, self.step, self.phase, time.monotonic() - self._since, socket.gethostname()]
                self._store.set(f"place/{self._world.rank}", json.dumps(place))
                if not reported and self._hangs():
                    reported = True
                    stuck = RuntimeError(f"NCCL: nothing has moved for {time.monotonic() - self._since:.0f} s")
                    threading.Thread(target=self._publish, args=(stuck,), name="rmcore-failure", daemon=True).start()
                if self._store.check(["failure"]):
                    heard = heard or time.monotonic()
                    if self.is_main:
                        self._print_failure()
                    if time.monotonic() - heard > GRACE_SECONDS:
                        os._exit(1)
        except (RuntimeError, dist.DistError):
            return  # the process that held the store has ended; the collectives will fail by themselves

    def _hangs(self) -> bool:
        """Whether NCCL is about to end this process, because the step is stuck."""
        limit = self._world.timeout_seconds
        limit = max(limit - NCCL_SECONDS, limit / 2)
        stuck = self.phase in STEP_PHASES and time.monotonic() - self._since > limit
        return stuck and self._world.device.type == "cuda"


def _is_collective(error: BaseException) -> bool:
    """Whether this is gloo's or NCCL's way to report that other ranks cannot be reached."""
    text = str(error).lower()
    words = ("gloo", "nccl", "connection", "timed out", "timeout", "socket", "collective", "broken pipe")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in words)
    )
