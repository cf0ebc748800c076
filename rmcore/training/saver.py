"""Saving: when, and how, beside the training.

Enters: the end of each step. Leaves: checkpoints. The loop is held up only while this rank's share of the state is
copied to host memory; a thread on each rank then writes its file, rank 0's the manifest, and the directory gets its
name. The threads agree through a process group of their own, so nothing they send crosses what the loop sends. The
next save waits for this one; so do the end of the run and a stop by a signal.

Example: save_every 4, keep 2: .tmp-step-12 appears at step 12, step 13 computes while it is written, step-12 appears
when every file is synced, and only then step-4 goes.
"""

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import rmcore
from rmcore.checkpoint import directory
from rmcore.checkpoint.manifest import Manifest, read_manifest, write_manifest
from rmcore.checkpoint.shards import Damaged, FileRecord, write_shard
from rmcore.checkpoint.state import HostCopy, pieces, updates_made
from rmcore.data.batches.step_plan import Step
from rmcore.evaluation.evaluate import Evaluation
from rmcore.host.faults import fault
from rmcore.parallel.world import SAVING, RankError, all_gather_json, any_rank_max, first_error, second_group
from rmcore.training.heartbeat import Pulse
from rmcore.training.metrics import Metrics
from rmcore.training.run import Run
from rmcore.training.signals import Signals, Stopped

T = TypeVar("T")
LONGEST_WRITE = 3600.0  # seconds that one rank may write longer than another before the save is given up
LEAVE_SECONDS = 5.0


class Saver:
    """The checkpoints of one run; use it in a `with` around the loop, on every rank."""

    def __init__(self, run: Run, metrics: Metrics, pulse: Pulse, signals: Signals) -> None:
        self._run, self._world, self._metrics = run, run.world, metrics
        self._pulse, self._signals = pulse, signals
        self._config = run.config.run
        self._root = Path(self._config.dir) / "checkpoints"
        self._saved = run.start.step if run.start.checkpoint else -1  # the step of the newest checkpoint
        self._last = time.monotonic()
        self._host = HostCopy()
        self._group = second_group(LONGEST_WRITE) if self._world.size > 1 else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Stopped | RankError):  # the other ranks are here too
            self.wait()
        elif self._thread:
            self._thread.join(LEAVE_SECONDS)

    def step_done(self, step: Step, evaluation: Evaluation | None, *, healthy: bool) -> None:
        """At the end of a step: save if it is due; raises Stopped, once saved, when any rank got a signal.

        Args:
            evaluation: that of this step, if there was one.
            healthy: False while non-finite steps follow each other; what was saved before them is not replaced then.
        """
        done = step.index + 1
        self._pulse.at("boundary", done)
        told = [self._signals.received, self._minutes_are_over(), int(self._error is not None)]
        signal, minutes, failed = any_rank_max(self._world, told)
        if failed:
            self.wait()  # raises, on the ranks too whose thread has not come to it yet
        due = bool(self._config.save_every and done % self._config.save_every == 0) or bool(minutes)
        due = due or bool(self._config.keep_best and evaluation)
        due = due or (done == self._run.plan.steps and bool(self._config.save_every or self._config.save_minutes))
        if (due or signal) and healthy and done != self._saved:
            self.save(step, evaluation)
        if signal:
            self.wait()
            raise Stopped(signal, done, step.episode)

    def save(self, step: Step, evaluation: Evaluation | None) -> None:
        """Begin a checkpoint of the state as it is now; a collective. Raises RankError on all ranks alike."""
        self.wait()
        with self._metrics.clock_paused():
            done, world = step.index + 1, self._world
            self._pulse.at("save")
            fault("save.begin")
            first_error(
                world,
                f"checkpoint step {done}",
                lambda: self._told(done, lambda: self._begin(done)) if world.is_main else None,
            )
            manifest = self._manifest(step, evaluation)
            fault("save.copy")
            self._host.take(pieces(self._run.strategy, world))
            self._saved, self._last = done, time.monotonic()
            if self._config.background_save:
                self._thread = threading.Thread(target=self._guarded, args=(manifest,), name=SAVING, daemon=True)
                self._thread.start()
            else:
                self._write(manifest)

    def wait(self) -> None:
        """Until the save that is under way is on the disk. Raises what it raised, on all ranks alike."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def _minutes_are_over(self) -> int:
        minutes = self._config.save_minutes
        return int(self._world.is_main and minutes is not None and time.monotonic() - self._last >= 60 * minutes)

    def _begin(self, step: int) -> None:
        directory.begin(self._root, step)

    def _manifest(self, step: Step, evaluation: Evaluation | None) -> Manifest:
        run = self._run
        return Manifest(
            step=step.index + 1,
            episode=step.episode,
            epoch=step.epoch,
            updates=updates_made(run.strategy.adamw),
            world_size=run.world.size,
            strategy=run.config.parallel.strategy,
            rmcore=rmcore.__version__,
            data=run.data.train.fingerprint,
            base=run.base,
            config=run.config.model_dump(mode="json"),
            interval=self._metrics.interval(),
            figures=evaluation.logged() if evaluation else None,
        )

    def _guarded(self, manifest: Manifest) -> None:
        try:
            self._write(manifest)
        except BaseException as error:
            self._error = error

    def _write(self, manifest: Manifest) -> None:
        """On every rank: the file, then, once all have theirs, the manifest and the name. Any failure fails all."""
        world, group, step = self._world, self._group, manifest.step
        what = f"checkpoint step {step}"
        name = f"rank-{world.rank:05d}-of-{world.size:05d}.safetensors"
        path = directory.temporary(self._root, step) / name
        try:
            record = first_error(world, what, lambda: self._told(step, lambda: self._shard(path)), group)
            keys = {key for key, _, _ in self._host.slices}
            parts = all_gather_json(world, {"name": name, "record": asdict(record), "keys": sorted(keys)}, group)
            files = {part["name"]: FileRecord(**part["record"]) for part in parts}
            everything = sorted({key for part in parts for key in part["keys"]})
            whole = replace(manifest, files=files, keys=everything)
            first_error(
                world, what, lambda: self._told(step, lambda: self._finish(whole)) if world.is_main else None, group
            )
        except RankError:
            if world.is_main:
                shutil.rmtree(directory.temporary(self._root, step), ignore_errors=True)
            raise

    def _shard(self, path: Path) -> FileRecord:
        fault("save.open")
        return write_shard(path, self._host.slices)

    def _finish(self, manifest: Manifest) -> None:
        """On rank 0: all files are whole and on the disk."""
        fault("save.manifest")
        write_manifest(directory.temporary(self._root, manifest.step), manifest)
        directory.commit(self._root, manifest.step)
        directory.retire(self._root, self._kept())

    def _kept(self) -> set[int]:
        """The newest run.keep, and the run.keep_best best by evaluation among all that there are."""
        there = directory.steps(self._root)
        quality = {}
        for step in there if self._config.keep_best else []:
            try:
                found = read_manifest(self._root / f"step-{step}").quality
            except Damaged:
                continue  # it is found out, and moved aside, when it is to be read
            if found:
                quality[step] = found
        best = sorted(quality, key=lambda step: (quality[step], step), reverse=True)[: self._config.keep_best]
        return {*there[: self._config.keep], *best}

    def _told(self, step: int, action: Callable[[], T]) -> T:
        """Run it; a failure of the disk becomes one sentence that says what is kept."""
        try:
            return action()
        except OSError as error:
            raise RankError(self._failure(step, error)) from error

    def _failure(self, step: int, error: OSError) -> str:
        need = sum(tensor.nbytes for _, _, tensor in self._host.slices) * self._world.size
        free = shutil.disk_usage(self._root if self._root.is_dir() else ".").free
        kept = directory.steps(self._root)
        rest = f"step {kept[0]} is kept" if kept else "there is no earlier checkpoint"
        return (
            f"checkpoint step {step} failed on rank {self._world.rank}: {error.strerror or error}; it needs "
            f"{need / 1e9:.3g} GB, {free / 1e9:.3g} GB are free in {self._root}; {rest}"
        )
