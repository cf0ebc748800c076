"""The plan's steps in, micro batches on the device out, built ahead by one thread.

Enters: comparisons, the steps of a plan, this rank. Leaves: for each step its micro batches, in order.
Example: a step whose rank 1 has two micro batches gives `[(batch, False), (batch, True)]` on rank 1.

Building a micro batch is numpy copying (about a millisecond), so one thread hides it behind the model's step. On a
GPU the batch is pinned, and copied without waiting.
"""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from rmcore.data.batches.batch import Comparisons, RaggedBatch, build_batch
from rmcore.data.batches.step_plan import Step

AHEAD = 4  # micro batches built before they are needed


class Loader:
    """Iterates (step, its micro batches on this rank).

    Args:
        share: False packs without sharing the prompt (an architecture that cannot share).
    Errors of the building thread are raised where the batch is asked for. `close()` ends the thread; a loader that is
    used to its end, or in a `with`, closes itself.
    """

    def __init__(
        self, data: Comparisons, steps: Iterable[Step], rank: int, device: torch.device, *, share: bool = True
    ) -> None:
        self._data, self._steps, self._rank, self._device, self._share = data, steps, rank, device, share
        self._queue: queue.Queue = queue.Queue(maxsize=AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rmcore-loader", daemon=True)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[Step, Iterator[tuple[RaggedBatch, bool]]]]:
        self._thread.start()
        while True:
            step = self._get()
            if step is None:
                return
            count = len(step.ranks[self._rank])
            yield step, ((self._get().to(self._device), place == count - 1) for place in range(count))

    def close(self) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:  # make room, so that a put that waits returns and sees the stop
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.01)

    def _get(self) -> Any:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _put(self, item: object) -> None:
        if self._stop.is_set():
            raise _Stopped
        self._queue.put(item)

    def _run(self) -> None:
        try:
            for step in self._steps:
                self._put(step)
                for numbers in step.ranks[self._rank]:
                    batch = build_batch(self._data, numbers, self._share)
                    if self._device.type == "cuda":
                        batch = batch.with_varlen().pin_memory()
                    self._put(batch)
            self._put(None)
        except _Stopped:
            return
        except BaseException as error:
            self._queue.put(error)


class _Stopped(Exception):
    """The loader was closed while its thread was building."""
