"""Writes checkpoints while the training continues.

Input: the end of each step.
Output: checkpoints in <run.dir>/checkpoints.
Example: save_every 4, keep 2. At step 12 the saver makes .tmp-step-12. Step 13 computes while the files are written.
When every file is synced, the directory becomes step-12; after that, step-4 is deleted.

The loop waits only while each rank copies its share of the state to host memory. Then a thread on each rank writes this
rank's file, and rank 0's thread writes the manifest and renames the directory. The threads use a process group of their
own, so that their collectives do not mix with those of the loop. The next save, the end of the run and a stop by a
signal wait for the save under way.
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
from rmcore.evaluation.criterion import Criterion
from rmcore.evaluation.evaluate import Evaluations
from rmcore.host.faults import fault
from rmcore.parallel.world import SAVING, RankError, all_gather_json, any_rank_max, first_error, second_group
from rmcore.training.bad_steps import BadSteps
from rmcore.training.heartbeat import Heartbeat
from rmcore.training.metrics import Metrics
from rmcore.training.patience import Patience
from rmcore.training.run import Run
from rmcore.training.signals import Signals, Stopped

T = TypeVar("T")
LONGEST_WRITE = 3600.0  # seconds that a rank waits for the slowest rank to write its file, before the save fails
LEAVE_SECONDS = 5.0  # wait for the writing thread when the run fails


def best_steps(root: Path, criterion: Criterion) -> list[int]:
    """The steps of the checkpoints that were evaluated, the best first; of equal ones the later first."""
    quality = {}
    for step in directory.steps(root):
        try:
            found = criterion.quality(read_manifest(root / f"step-{step}").figures)
        except Damaged:
            continue  # the next start finds the damage and moves the checkpoint aside
        if found is not None:
            quality[step] = found
    return sorted(quality, key=lambda step: (quality[step], step), reverse=True)


class Saver:
    """The checkpoints of one run; use it in a `with` around the loop, on every rank."""

    def __init__(
        self,
        run: Run,
        metrics: Metrics,
        bad_steps: BadSteps,
        patience: Patience,
        heartbeat: Heartbeat,
        signals: Signals,
    ) -> None:
        self._run, self._world, self._metrics = run, run.world, metrics
        self._bad_steps, self._patience, self._heartbeat, self._signals = bad_steps, patience, heartbeat, signals
        self._config = run.config.run
        self._root = Path(self._config.dir) / "checkpoints"
        self._saved = run.start.step if run.start.checkpoint else -1  # the step of the newest checkpoint
        self._saved_at = time.monotonic()
        self._host = HostCopy()
        self._group = second_group(LONGEST_WRITE) if self._world.size > 1 else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Stopped | RankError):  # every rank leaves here
            self.wait()
        elif self._thread:
            self._thread.join(LEAVE_SECONDS)

    def step_done(self, step: Step, evaluations: Evaluations | None) -> None:
        """Call it at the end of a step with the evaluations of that step, if there were any.

        Saves if a checkpoint is due or a rank received a signal. While non-finite steps follow each other it does not
        save: the checkpoint before them stays the newest. Raises Stopped after a signal, once everything is saved.
        """
        done = step.index + 1
        self._heartbeat.at("boundary", done)
        mine = [self._signals.received, self._minutes_are_over(), int(self._error is not None)]
        signal, minutes, failed = any_rank_max(self._world, mine)
        if failed:
            self.wait()  # raises on all ranks; on some of them the thread may not have failed yet
        due = bool(minutes) or self._is_due(done, evaluations)
        # Whether the last steps were finite is known on the device only. Waiting for it is left to steps that save.
        if (due or signal) and done != self._saved and self._bad_steps.in_row == 0:
            self.save(step, evaluations)
        if signal:
            self.wait()
            raise Stopped(signal, done, step.episode)

    def save(self, step: Step, evaluations: Evaluations | None) -> None:
        """Begin a checkpoint of the present state; a collective. Raises RankError on all ranks."""
        self.wait()
        with self._metrics.clock_paused():
            done, world = step.index + 1, self._world
            self._heartbeat.at("save")
            fault("save.begin")
            self._first_error(done, lambda: directory.begin(self._root, done) if world.is_main else None)
            manifest = self._manifest(step, evaluations)
            fault("save.copy")
            self._host.take(pieces(self._run.strategy, world))
            self._saved, self._saved_at = done, time.monotonic()
            if self._config.background_save:
                self._thread = threading.Thread(target=self._write_guarded, args=(manifest,), name=SAVING, daemon=True)
                self._thread.start()
            else:
                self._write(manifest)

    def wait(self) -> None:
        """Wait until the save under way is on the disk. Raises its error, on all ranks."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def _is_due(self, done: int, evaluations: Evaluations | None) -> bool:
        config = self._config
        if config.save_every and done % config.save_every == 0:
            return True
        if config.kept_best and evaluations:
            return True
        return done == self._run.plan.steps and bool(config.save_every or config.save_minutes)

    def _minutes_are_over(self) -> int:
        minutes = self._config.save_minutes
        return int(self._world.is_main and minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes)

    def _manifest(self, step: Step, evaluations: Evaluations | None) -> Manifest:
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
            figures=evaluations.logged() if evaluations else None,
            progress=self._patience.stored(),
        )

    def amend(self, evaluations: Evaluations | None) -> None:
        """Add the evaluations to the checkpoint from which the run continues; a collective.

        A signal stopped the run before they were complete. Without them, that checkpoint could not be the best one.
        """
        start = self._run.start
        if evaluations is None or start.checkpoint is None or start.manifest is None:
            return
        path, complete = start.checkpoint, replace(start.manifest, figures=evaluations.logged())
        complete = replace(complete, progress=self._patience.stored())
        if path.resolve().parent == self._root.resolve():
            self._first_error(complete.step, lambda: write_manifest(path, complete) if self._world.is_main else None)

    def _write_guarded(self, manifest: Manifest) -> None:
        try:
            self._write(manifest)
        except BaseException as error:
            self._error = error

    def _write(self, manifest: Manifest) -> None:
        """Every rank writes its file. When all files are on the disk, rank 0 writes the manifest and renames."""
        world, step = self._world, manifest.step
        name = f"rank-{world.rank:05d}-of-{world.size:05d}.safetensors"
        temporary = directory.temporary(self._root, step)

        def write_file() -> FileRecord:
            fault("save.open")
            return write_shard(temporary / name, self._host.slices)

        try:
            record = self._first_error(step, write_file, in_thread=True)
            keys = sorted({key for key, _, _ in self._host.slices})
            parts = all_gather_json(world, {"name": name, "record": asdict(record), "keys": keys}, self._group)
            files = {part["name"]: FileRecord(**part["record"]) for part in parts}
            complete = replace(manifest, files=files, keys=sorted({key for part in parts for key in part["keys"]}))
            self._first_error(step, lambda: self._finish(complete) if world.is_main else None, in_thread=True)
        except RankError:
            if world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _finish(self, manifest: Manifest) -> None:
        """On rank 0, when all files are complete and on the disk."""
        fault("save.manifest")
        write_manifest(directory.temporary(self._root, manifest.step), manifest)
        directory.commit(self._root, manifest.step)
        directory.retire(self._root, self._kept())

    def _kept(self) -> set[int]:
        """The newest run.keep checkpoints, and the run.kept_best best of all by their evaluation."""
        best = best_steps(self._root, self._patience.criterion) if self._config.kept_best else []
        return {*directory.steps(self._root)[: self._config.keep], *best[: self._config.kept_best]}

    def _first_error(self, step: int, action: Callable[[], T], *, in_thread: bool = False) -> T:
        """`first_error`, where a failure of the disk becomes one sentence that says which checkpoint is kept."""

        def explained() -> T:
            try:
                return action()
            except OSError as error:
                raise RankError(self._disk_failure(step, error)) from error

        return first_error(self._world, f"checkpoint step {step}", explained, self._group if in_thread else None)

    def _disk_failure(self, step: int, error: OSError) -> str:
        need = sum(tensor.nbytes for _, _, tensor in self._host.slices) * self._world.size
        free = shutil.disk_usage(self._root if self._root.is_dir() else ".").free
        steps = directory.steps(self._root)
        kept = f"step {steps[0]} is kept" if steps else "there is no earlier checkpoint"
        return (
            f"checkpoint step {step} failed on rank {self._world.rank}: {error.strerror or error}; it needs "
            f"{need / 1e9:.3g} GB, {free / 1e9:.3g} GB are free in {self._root}; {kept}"
        )
