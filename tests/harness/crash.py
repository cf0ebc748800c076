"""Whole runs in real processes with planted faults: killed, stopped, out of space, poisoned at a given point.

Input: the arguments of `python -m rmcore.train`, a world size, `Fault`s.
Output: exit codes, what each rank printed, the final weights and the order of the data.
Example: `run(folder, arguments, 2, [Fault("compute", "kill", rank=1, nth=3)])` kills rank 1 in its third forward.

Every rank is a fork of a server that has imported rmcore once, so a run of two ranks and eight steps takes a few
seconds. rmcore imports nothing from here.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from tests.harness.paths import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.harness.crash_preload"])
LIMIT = 300.0  # seconds; a run that takes longer hangs, also where many share the cores


@dataclass(frozen=True)
class Fault:
    """On `rank`, the `nth` time that it passes `point`: do `action` (see `_act`)."""

    point: str
    action: str = "kill"
    rank: int = 0
    nth: int = 1
    every: bool = False  # and every later time


@dataclass
class Outcome:
    """The end of a run: by rank, the exit code (negative: the signal) and everything that it printed."""

    codes: list[int]
    output: list[str]
    seconds: float
    directory: Path
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "\n".join(self.output)

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.directory / "run_status.json").read_text(encoding="utf-8"))

    @property
    def order(self) -> dict[int, list[int]]:
        """Step -> the comparisons that it trained on, over all ranks, in the last attempt at that step."""
        last: dict[int, tuple[str, list[int]]] = {}
        for path in sorted(
            scratch_of(self.directory).glob("order-*.jsonl"), key=lambda path: int(path.stem.split("-")[1])
        ):
            for line in path.read_text(encoding="utf-8").splitlines():
                if not line.endswith("}"):
                    continue  # the writer was killed in the middle of it
                entry = json.loads(line)
                attempt = path.stem.split("-")[1]
                kept, numbers = last.get(entry["step"], ("", []))
                last[entry["step"]] = (attempt, sorted([*(numbers if kept == attempt else []), *entry["comparisons"]]))
        return {step: numbers for step, (_, numbers) in sorted(last.items())}


def run(
    directory: Path,
    arguments: Sequence[str],
    size: int = 1,
    faults: Sequence[Fault] = (),
    *,
    publish: bool = False,
    environment: dict[str, str] | None = None,
    limit: float = LIMIT,
) -> Outcome:
    """One attempt at a run in `directory` on `size` ranks. `publish`: export as users do; else only dump weights."""
    scratch = scratch_of(directory)
    scratch.mkdir(parents=True, exist_ok=True)
    attempt = len(list(scratch.glob("attempt-*")))
    folder = scratch / f"attempt-{attempt}"
    folder.mkdir()
    began = time.monotonic()
    processes = []
    for rank in range(size):
        settings = {"rank": rank, "size": size, "attempt": attempt, "publish": publish, "directory": str(directory)}
        process = CONTEXT.Process(
            target=_rank, args=(settings, list(arguments), list(faults), str(folder), environment or {}), daemon=True
        )
        process.start()
        processes.append(process)
    waiting = {process.sentinel: process for process in processes}
    while waiting and time.monotonic() - began < limit:
        for sentinel in wait(list(waiting), timeout=1.0):
            waiting.pop(sentinel)
    for process in waiting.values():
        process.kill()
    for process in processes:
        process.join()
    codes = [process.exitcode if process.sentinel not in waiting else 999 for process in processes]
    output = [(folder / f"rank-{rank}.txt").read_text(encoding="utf-8", errors="replace") for rank in range(size)]
    weights = {}
    if (folder / "weights.npz").exists():
        with np.load(folder / "weights.npz", allow_pickle=False) as stored:
            weights = dict(stored)
    return Outcome([int(code) for code in codes], output, time.monotonic() - began, directory, weights)


def copy_of(outcome: Outcome, name: str) -> Path:
    """A copy of the run's directory next to it, to be resumed in another way."""
    target = outcome.directory.with_name(name)
    shutil.copytree(outcome.directory, target)
    shutil.copytree(scratch_of(outcome.directory), scratch_of(target))
    return target


def torchrun(
    directory: Path,
    arguments: Sequence[str],
    size: int = 2,
    faults: Sequence[Fault] = (),
    *,
    options: Sequence[str] = (),
    environment: dict[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Start a run under a real torchrun; `communicate` gives its output. Faults act only in the first attempt."""
    settings = json.dumps({"directory": str(directory), "faults": [asdict(fault) for fault in faults]})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}", *options]
    return subprocess.Popen(
        [*command, "-m", "tests.harness.crash_worker", settings, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outcome_of(process: subprocess.Popen[str], directory: Path, limit: float = LIMIT) -> Outcome:
    """Wait for a run under torchrun."""
    began = time.monotonic()
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        return Outcome([999], [output], limit, directory)
    return Outcome([process.returncode], [output], time.monotonic() - began, directory)


def _rank(
    settings: dict[str, Any], arguments: list[str], faults: list[Fault], folder: str, environment: dict[str, str]
) -> None:
    """In the process of one rank."""
    rank, size = settings["rank"], settings["size"]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    with open(Path(folder) / f"rank-{rank}.txt", "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(CUDA_VISIBLE_DEVICES="", **environment)
    os.environ["LOCAL_RANK"] = str(rank % int(os.environ["LOCAL_WORLD_SIZE"]))
    import torch

    import rmcore.train
    from rmcore.config import config_from_argv
    from rmcore.host.terminal import survive_lost_output
    from rmcore.training import heartbeat

    survive_lost_output()  # as `python -m rmcore.train` does
    torch.set_num_threads(1)
    heartbeat.BEAT_SECONDS, heartbeat.LISTEN_SECONDS, heartbeat.GRACE_SECONDS = 0.2, 1.0, 4.0  # one machine is fast
    if any(fault.action == "hang-in-native-code" for fault in faults):
        heartbeat.SIGNAL_SECONDS, heartbeat.UNUSUAL = 2.0, 0.0
    rmcore.train.running_world = functools.partial(
        rmcore.train.running_world, init_method=f"file://{folder}/rendezvous"
    )
    if not settings["publish"]:
        rmcore.train.publish = functools.partial(_dump, Path(folder) / "weights.npz")
        rmcore.train.rehearse = lambda *_: "the export is not rehearsed"
    prepare(rank, faults, Path(settings["directory"]), settings["attempt"])
    try:
        place = [] if any(word.startswith("run.dir=") for word in arguments) else [f"run.dir={settings['directory']}"]
        code = rmcore.train.main(config_from_argv([*arguments, *place], "rmcore.train"))
    except SystemExit as end:
        code = int(end.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def prepare(rank: int, faults: Sequence[Fault], directory: Path, attempt: int) -> None:
    """Plant this rank's faults, and record the order of the data."""
    import rmcore.train
    from rmcore.host import faults as hooks

    mine = [fault for fault in faults if fault.rank == rank]
    hooks.hook = functools.partial(_pass, mine, {}) if mine else None
    folder = scratch_of(directory)
    folder.mkdir(parents=True, exist_ok=True)
    rmcore.train.Loader = functools.partial(_Recorded, order=folder / f"order-{attempt}-{rank}.jsonl")
    rmcore.train.train = functools.partial(_remember, rmcore.train.train)


def scratch_of(directory: Path) -> Path:
    """The tests' own files on a run: next to its directory, in which only rmcore writes."""
    return directory.parent / f"{directory.name}.scratch"


_STEPPED = threading.Event()  # this rank has begun to compute
_RUN: list[Any] = []  # the Run of this process, for faults that reach into the model


def _remember(train: Any, run: Any, *rest: Any) -> Any:
    import torch

    _RUN.append(run)
    before = torch.get_rng_state()
    evaluation = train(run, *rest)
    print("random state untouched" if torch.equal(before, torch.get_rng_state()) else "random state used")
    return evaluation


class _Recorded:
    """The engine's loader, which also records what it yields."""

    def __init__(self, *arguments: Any, order: Path, **more: Any) -> None:
        from rmcore.data.batches.loader import Loader

        self._loader, self._order = Loader(*arguments, **more), order

    def __enter__(self) -> "_Recorded":
        return self

    def __exit__(self, *_: object) -> None:
        self._loader.close()

    def __iter__(self) -> Any:
        with open(self._order, "a", encoding="utf-8") as file:
            for step, micro_batches in self._loader:
                yield step, self._written(file, step.index, micro_batches)

    def _written(self, file: Any, index: int, micro_batches: Any) -> Any:
        for batch, is_last in micro_batches:
            numbers = [int(number) for number in batch.comparisons_C]
            file.write(json.dumps({"step": index, "comparisons": numbers}) + "\n")
            file.flush()
            yield batch, is_last


def _dump(path: Path, run: Any, *_: object) -> None:
    """Instead of the export: rank 0 writes the whole weights."""
    state = {name: tensor.float().numpy() for name, tensor in run.strategy.whole_tensors()}
    if run.world.is_main:
        np.savez(path, **state)


def _pass(faults: list[Fault], counts: dict[str, int], point: str) -> None:
    """The hook: this rank passes a point."""
    counts[point] = counts.get(point, 0) + 1
    if point == "compute":
        _STEPPED.set()
    for fault in faults:
        if fault.point == point and (counts[point] == fault.nth or (fault.every and counts[point] > fault.nth)):
            _act(fault)


def _act(fault: Fault) -> None:
    import torch

    from rmcore.training import signals

    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.action in ("term", "int", "hup", "quit", "usr1", "usr2"):
        os.kill(os.getpid(), signal.Signals[f"SIG{fault.action.upper()}"])
    elif fault.action == "raise":
        raise ValueError(f"planted at {fault.point}")
    elif fault.action in ("closed-pipe", "full-console"):
        _lose_output(fault.action)
    elif fault.action == "fill":
        fill(_RUN[-1].config.run.dir)
    elif fault.action == "oom":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (planted)")
    elif fault.action == "twice":
        signals.TWICE = 0.0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    elif fault.action == "until-next-step":
        _STEPPED.clear()
        assert _STEPPED.wait(30), "no step computed while a checkpoint was written"
    elif fault.action == "slow":
        time.sleep(0.3)
    elif fault.action == "hang":
        time.sleep(600)
    elif fault.action == "hang-in-native-code":
        import ctypes

        lock = ctypes.create_string_buffer(64)  # a mutex of glibc: no signal ends the second call, and no handler runs
        ctypes.CDLL(None).pthread_mutex_lock(lock)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        ctypes.CDLL(None).pthread_mutex_lock(lock)
    elif fault.action == "outlast":
        time.sleep(1.5 * _RUN[-1].config.parallel.timeout_seconds)
    elif fault.action == "nan":
        weight = next(p for name, p in _RUN[-1].strategy.named_parameters().items() if name == "score.weight")
        handle = weight.register_hook(lambda gradient: (handle.remove(), gradient * float("nan"))[1])
    elif fault.action == "nan-loss":
        spoil = _RUN[-1].strategy.model.register_forward_hook(
            lambda _, __, out: (spoil.remove(), out._replace(loss_sum=out.loss_sum * float("nan")))[1]
        )
    else:
        raise AssertionError(fault.action)


def _lose_output(how: str) -> None:
    """From here on, both standard streams of this process fail: nobody reads the pipe, or its disk is full."""
    if how == "closed-pipe":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open("/dev/full", os.O_WRONLY)
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    os.close(writing)


def fill(directory: str) -> None:
    """Write zeros next to the run until the disk is full, then free a little."""
    path = Path(directory).parent / "filler"
    with open(path, "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        file.truncate(max(0, file.tell() - (1 << 18)))
