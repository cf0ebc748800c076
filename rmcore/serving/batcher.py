"""Batches the requests of many clients: texts wait in one queue, from which one thread scores up to the token budget.

Input: jobs, each the texts of one request. Output: their rewards, in a future.
Example: while the model computes a batch of 4,000 tokens, 20 requests of 150 tokens arrive. All 20 are the next batch.
Texts that share a prompt compute it once, also if they are of different requests.

No job waits for others: an idle model starts with the first job at once. A job is answered as a whole or not at all.
Batches differ in size, so that the C library keeps ever more freed memory in pieces that fit none of the next batches:
the thread gives it back from time to time.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rmcore.host.memory import trim_freed_memory
from rmcore.scoring.scorer import Text

TRIM_SECONDS = 5.0  # between two times; each takes some 10 ms on a CPU


class Full(Exception):
    """Too many tokens are waiting."""


class Late(Exception):
    """The deadline of the job passed before its turn."""


class Stopping(Exception):
    """The batcher accepts no more jobs."""


Rewards = list[Any]  # one value for each text, as the model gives it


@dataclass
class Job:
    """The texts of one request. `deadline`: by time.monotonic()."""

    texts: Sequence[Text]
    deadline: float
    tokens: int
    done: Future[Rewards] = field(default_factory=Future)


@dataclass
class Counts:
    """The work since the start: batches, jobs, texts, tokens of all texts, seconds of computing."""

    batches: int = 0
    jobs: int = 0
    texts: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Batcher:
    """The queue and the thread that empties it.

    Args:
        score: (texts, deadline) -> rewards, in order; called by one thread only. It raises TimeoutError when it sees
            that the deadline has passed, so that a request that nobody waits for does not hold up the others.
        budget: most tokens of the jobs that are scored together; a larger job is a batch of its own.
        most_waiting: tokens that may wait; a job is always accepted by an empty queue.
    """

    def __init__(self, score: Callable[[Sequence[Text], float], Rewards], budget: int, most_waiting: int) -> None:
        self._score, self._budget, self._most_waiting = score, budget, most_waiting
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self.waiting_tokens = 0
        self.counts = Counts()
        self._thread = threading.Thread(target=self._run, name="rmcore-model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs and accepts jobs."""
        return self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        """Number of waiting jobs."""
        return len(self._jobs)

    def submit(self, texts: Sequence[Text], deadline: float) -> Future[Rewards]:
        """The rewards of `texts`, later. Raises Full, Stopping; the future raises Late or the model's own error."""
        job = Job(texts, deadline, sum(len(text.ids) for text in texts))
        with self._changed:
            if self._stopping:
                raise Stopping
            if self._jobs and self.waiting_tokens + job.tokens > self._most_waiting:
                raise Full
            self._jobs.append(job)
            self.waiting_tokens += job.tokens
            self._changed.notify()
        return job.done

    def stop(self) -> None:
        """Accept no more jobs, finish the waiting ones, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        trimmed = time.monotonic()
        while jobs := self._next():
            began = time.monotonic()
            if began > trimmed + TRIM_SECONDS:  # here, no batch is in memory
                trim_freed_memory()
                trimmed = began
            ready = [job for job in jobs if self._begins(job, began)]
            if ready:
                self._answer(ready)
                self.counts.seconds += time.monotonic() - began

    def _next(self) -> list[Job]:
        """The jobs of the next batch in the order of their arrival; none if the batcher has stopped."""
        with self._changed:
            while not self._jobs:
                if self._stopping:
                    return []
                self._changed.wait()
            jobs = [self._jobs.popleft()]
            tokens = jobs[0].tokens
            while self._jobs and tokens + self._jobs[0].tokens <= self._budget:
                jobs.append(self._jobs.popleft())
                tokens += jobs[-1].tokens
            self.waiting_tokens -= tokens
            return jobs

    def _begins(self, job: Job, now: float) -> bool:
        if not job.done.set_running_or_notify_cancel():
            return False
        if now > job.deadline:
            job.done.set_exception(Late())
            return False
        return True

    def _answer(self, jobs: list[Job]) -> None:
        texts = [text for job in jobs for text in job.texts]
        try:
            rewards = self._score(texts, max(job.deadline for job in jobs))
            if len(rewards) != len(texts):
                raise RuntimeError(f"{len(rewards)} rewards for {len(texts)} texts")
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].done.set_exception(Late() if isinstance(error, TimeoutError) else error)
                return
            for job in jobs:  # one by one, so that a job that fails does not fail the others
                self._answer([job])
            return
        self.counts.batches += 1
        self.counts.jobs += len(jobs)
        self.counts.texts += len(texts)
        self.counts.tokens += sum(job.tokens for job in jobs)
        place = 0
        for job in jobs:
            job.done.set_result(rewards[place : place + len(job.texts)])
            place += len(job.texts)
