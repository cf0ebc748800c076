"""Where every rank is: told to the others once a second, so that a rank that hangs, dies or fails is named.

Enters: the phase this rank is in. Leaves: one message when something goes wrong, on one rank, and an end for all of
them. Through the process group's store, by a thread of its own: it works while a collective waits.
Example: rank 1 waits for a file that never comes; after parallel.timeout_seconds rank 0's collective fails: "lost touch
with other ranks at step 7, phase backward: rank 1 is at step 7, phase data, for 61 s". The failure is in the store, so
rank 1's thread ends its process too.

Phases of a step: data (waiting for a micro batch), compute (forward), backward (its gradient sync included), update,
then boundary, and evaluation and save where they are due.
"""

import json
import os
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
from rmcore.parallel.world import RankError, World, all_gather_json
from rmcore.tracking.status import record_status
from rmcore.tracking.tracker import Tracker

BEAT_SECONDS = 0.5
LISTEN_SECONDS = 3.0  # in which a rank that lives has beaten, and a rank that failed has said so
GRACE_SECONDS = 15.0  # in which a rank leaves by itself once another has failed
SLOW, SLOW_SECONDS = 1.5, 0.05  # times the median rank, and seconds a step more than it


@dataclass(frozen=True)
class Place:
    """A rank's own words: how often it has beaten, its step, its phase, for how many seconds it has been there, and its
    host.
    """

    beats: int
    step: int
    phase: str
    seconds: float
    host: str

    def __str__(self) -> str:
        return f"step {self.step}, phase {self.phase}"


class Pulse:
    """This rank's place and the others'; use it in a `with` around the run. On one rank it only keeps the place."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.step, self.phase, self._since = 0, "start", time.monotonic()
        self.tokens = 0  # of the micro batch that is computed
        self._own_seconds, self._steps = 0.0, 0
        self.run_dir: str | None = None  # where run_status.json belongs, once the directory is ours
        self._end, self._one_thread, self._told = threading.Event(), threading.Lock(), False
        self._store = None
        if world.size > 1:
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore("rmcore/pulse", store.clone())  # a connection of its own

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self._world.is_main

    def __enter__(self) -> "Pulse":
        if self._store is not None:
            threading.Thread(target=self._beat, name="rmcore-pulse", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def at(self, phase: str, step: int | None = None) -> None:
        """This rank enters a phase; costs well under a microsecond."""
        now = time.monotonic()
        if self.phase in ("data", "compute"):  # before the gradients are synchronised a rank's time is its own
            self._own_seconds += now - self._since
        self.step, self.phase, self._since = self.step if step is None else step, phase, now
        fault(phase)

    def through(
        self, step: int, micro_batches: Iterable[tuple[RaggedBatch, bool]]
    ) -> Iterator[tuple[RaggedBatch, bool]]:
        """The micro batches of a step, with the phase around each: data while it is waited for, then compute."""
        self.at("data", step)
        self._steps += 1
        for batch, is_last in micro_batches:
            self.tokens = batch.computed_tokens
            self.at("compute")
            yield batch, is_last
            self.at("data")
        self.at("update")

    def name_slow_rank(self, tracker: Tracker) -> None:
        """A collective, once a log interval: say which rank needs far longer than the others."""
        seconds = self._own_seconds / max(1, self._steps)
        self._own_seconds, self._steps = 0.0, 0
        everyones = all_gather_json(self._world, seconds)
        slowest, median = max(everyones), statistics.median_low(everyones)
        if slowest > SLOW * median and slowest - median > SLOW_SECONDS:
            rank = everyones.index(slowest)
            tracker.say(f"rank {rank} is slow: {slowest:.3f} s a step before its backward, the median {median:.3f} s")

    def failed(self, error: BaseException) -> None:
        """The run ends with this error: one rank says why, on its console and in run_status.json.

        UserError and RankError were raised on all ranks alike, so rank 0 says them. For anything else the first rank
        that fails publishes its message, and what follows from it on other ranks is not told.
        """
        if isinstance(error, UserError | RankError):
            if self.is_main:
                self._tell(str(error))
            return
        if self._store is None:
            self._tell(self._words(error))
            return
        # Calls on the store may wait for ever when its host is out of reach, so they are made by a thread.
        publishing = threading.Thread(target=self._publish, args=(error,), name="rmcore-failure", daemon=True)
        publishing.start()
        publishing.join(GRACE_SECONDS)
        if publishing.is_alive() and not self._told:
            self._tell_alone(error)

    def _tell_alone(self, error: BaseException) -> None:
        """The others cannot be told: say it here, and that the store is out of reach."""
        what = self._words(error)
        if _is_collective(error):
            where = f"rank {self._world.rank} on {socket.gethostname()}"
            what = f"{where} lost touch with other ranks at step {self.step}, phase {self.phase}"
        store = os.environ.get("MASTER_ADDR", "rank 0's host")
        self._tell(f"{what}; the job's store at {store} does not answer: that host or the network is down")

    def _publish(self, error: BaseException) -> None:
        """Tell the others that this rank failed, and have it said once."""
        assert self._store is not None
        try:
            message = self._words(error)
            if _is_collective(error):
                before = self._places()
                time.sleep(LISTEN_SECONDS)  # it may be the consequence of what another rank is about to say
                message = f"{self._lost(before)}\n({str(error).splitlines()[0][:200]})"
            self._store.compare_set("failure", "", message)
            end = time.monotonic() + 2 * LISTEN_SECONDS
            while not self.is_main and not self._store.check(["told"]) and time.monotonic() < end:
                time.sleep(0.05)  # rank 0's thread tells it; when rank 0 is gone, this one does
            self._tell_failure()
        except (RuntimeError, dist.DistError):  # the connection was given up, or the store's process has ended
            self._tell_alone(error)

    def _tell_failure(self) -> None:
        """Say what was published, unless it has been said, here or elsewhere."""
        assert self._store is not None
        with self._one_thread:
            me = f"{self._world.rank}"
            if not self._told and self._store.compare_set("told", "", me).decode() == me:
                self._tell(self._store.get("failure").decode())

    def _tell(self, message: str) -> None:
        self._told = True
        print(f"rmcore.train: {message}", file=sys.stderr, flush=True)
        if self.run_dir is not None:
            record_status(self.run_dir, "failed", step=self.step, reason=message)

    def _words(self, error: BaseException) -> str:
        where = f"rank {self._world.rank} of {self._world.size} failed at step {self.step}, phase {self.phase}"
        if isinstance(error, torch.OutOfMemoryError):
            return (
                f"{where}: out of memory; a micro batch of {self.tokens:,} tokens does not fit: set batch.tokens lower "
                f"than that, or parallel.recompute=full, or batch.shrink=true and start again ({str(error)[:200]})"
            )
        return f"{where}:\n{''.join(traceback.format_exception(error)).rstrip()}"

    def _lost(self, before: dict[int, Place]) -> str:
        """Which ranks are silent or elsewhere, from two looks some seconds apart."""
        after = self._places()
        others = {rank: place for rank, place in after.items() if rank != self._world.rank}
        silent = [rank for rank, place in others.items() if rank in before and before[rank].beats == place.beats]
        elsewhere = [rank for rank, p in others.items() if (p.step, p.phase) != (self.step, self.phase)]
        here = socket.gethostname()
        at = {rank: f"rank {rank}" + (f" on {p.host}" if p.host != here else "") for rank, p in others.items()}
        lines = [f"{at[rank]} is silent, last seen at {others[rank]}" for rank in silent]
        there = [rank for rank in elsewhere if rank not in silent]
        lines += [f"{at[rank]} last seen at {others[rank]}, for {others[rank].seconds:.0f} s" for rank in there]
        what = "; ".join(lines) or "every rank is at the same place"
        return f"rank {self._world.rank} lost touch with other ranks at step {self.step}, phase {self.phase}: {what}"

    def _places(self) -> dict[int, Place]:
        assert self._store is not None
        keys = {rank: f"place/{rank}" for rank in range(self._world.size)}
        return {
            rank: Place(*json.loads(self._store.get(key))) for rank, key in keys.items() if self._store.check([key])
        }

    def _beat(self) -> None:
        """The thread: say where this rank is; when another failed and this one does not leave, end the process."""
        assert self._store is not None
        beats, heard = 0, 0.0
        try:
            while not self._end.wait(BEAT_SECONDS):
                beats += 1
                place = [beats, self.step, self.phase, time.monotonic() - self._since, socket.gethostname()]
                self._store.set(f"place/{self._world.rank}", json.dumps(place))
                if self._store.check(["failure"]):
                    heard = heard or time.monotonic()
                    if self.is_main:
                        self._tell_failure()
                    if time.monotonic() - heard > GRACE_SECONDS:
                        os._exit(1)
        except (RuntimeError, dist.DistError):
            return  # the store is gone: the process that held it has ended, and the collectives fail by themselves


def _is_collective(error: BaseException) -> bool:
    """Whether the error says that other ranks could not be reached, as gloo and NCCL put it."""
    text = str(error).lower()
    words = ("gloo", "nccl", "connection", "timed out", "timeout", "socket", "collective", "broken pipe")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in words)
    )
