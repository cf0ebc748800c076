"""Builds the micro batches of a plan's steps ahead of the model, in one thread, and moves them to the device.

Input: comparisons, the steps of a plan, this rank.
Output: for each step its micro batches, in order, each with the flag "is the last of its step".
Example: a step whose rank 1 has two micro batches gives `[(batch, False), (batch, True)]` on rank 1.

To build a micro batch takes about a millisecond of numpy copying, so one thread hides it behind the model's step. For a
GPU the thread also pins the batch and copies it to the device, on a stream of its own: the copies run while the model
computes, and the model's stream waits for those of its batch only (`CopyStream`). The host waits for neither.
"""

import queue
import threading
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmcore.data.batches.batch import Comparisons, RaggedBatch, build_batch
from rmcore.data.batches.step_plan import Step

AHEAD = 4  # micro batches built before they are needed


class CopyStream:
    """Copies batches to a GPU next to what it computes. One thread sends, another one receives."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, _copy_stream(device)

    def send(self, batch: RaggedBatch) -> "Sent":
        """Pin a batch of the host, and begin its copies."""
        pinned = batch.with_varlen().pin_memory()
        with torch.cuda.stream(self._stream):
            return Sent(pinned.to(self._device), self._stream.record_event())

    def receive(self, sent: "Sent") -> RaggedBatch:
        """The batch, for the stream of this thread: what is launched from now on runs after the copies."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(sent.copied)

        def used(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)  # its memory is not given to a later batch before this stream has read it
            return tensor

        return sent.batch.mapped(used)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all loaders of this process: the allocator keeps the memory of each stream apart."""
    return torch.cuda.Stream(device)


class Sent(NamedTuple):
    """A batch on its way."""

    batch: RaggedBatch
    copied: torch.cuda.Event


class Loader:
    """Iterates over (step, its micro batches on this rank).

    `share=False` packs without sharing the prompt, for architectures that cannot share. `language`, `multiple`: see
    `build_batch`. `rank`: which of the plan's ranks this is; a context group is one of them. An error of the building
    thread is raised when the batch is read. `close()` ends the thread; a loader that is read to its end, or used in a
    `with`, closes itself.
    """

    def __init__(
        self,
        data: Comparisons,
        steps: Iterable[Step],
        rank: int,
        device: torch.device,
        *,
        share: bool = True,
        language: bool = False,
        multiple: int = 1,
    ) -> None:
        self._data, self._steps, self._rank, self._device, self._share = data, steps, rank, device, share
        self._language, self._multiple = language, multiple
        self._copies = CopyStream(device) if device.type == "cuda" else None
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
            yield step, ((self._batch(), place == count - 1) for place in range(count))

    def close(self) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:  # make room, so that a waiting put returns and sees the stop
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.01)

    def _batch(self) -> RaggedBatch:
        item = self._get()
        return self._copies.receive(item) if self._copies else item.to(self._device)

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
                    batch = build_batch(
                        self._data, numbers, self._share, language=self._language, multiple=self._multiple
                    )
                    self._put(self._copies.send(batch) if self._copies else batch)
            self._put(None)
        except _Stopped:
            return
        except BaseException as error:
            self._queue.put(error)


class _Stopped(Exception):
    """Ends the building thread after the loader was closed."""
