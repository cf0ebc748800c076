"""Checks a run directory before the run uses it: it is writable, no other run uses it, and the checkpoints fit.

Input: run.dir.
Output: a lock that is held until the end of the run, or a UserError.
Example: "run.dir runs/hh is in use by pid 123 on host a since 2025-01-01 10:00:00".

The lock is `flock` on <run.dir>/.lock. The system releases it when the process ends, in whatever way. It separates the
processes of one host only, so the file also contains the holder, and a thread of the holder touches it every few
seconds: a lock of another host is in use if the file is touched while we watch it, and left over if not.

Why not the package filelock: without flock (ENOSYS) it falls back to a file that a killed process leaves behind, on
other errors (ENOLCK, EOPNOTSUPP) it fails, and its older versions empty the file that contains the holder.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rmcore.config import UserError
from rmcore.config.schema import Config
from rmcore.cost.formats import checkpoint_bytes
from rmcore.hf_export.rehearsal import Sizes
from rmcore.host.files import regular_file
from rmcore.parallel.world import World, first_error

TOUCH_SECONDS = 5.0
WATCH_SECONDS = 30.0  # longer than the time between two touches as a network disk shows them (attribute caches)


@contextmanager
def own_directory(config: Config, world: World) -> Iterator[None]:
    """Hold run.dir for this run. Raises UserError, on all ranks, if it is not writable or in use."""
    directory = Path(config.run.dir)
    lock = first_error(world, "preparing the run directory", lambda: _Lock(directory) if world.is_main else None)
    try:
        if world.size > world.local_size:
            first_error(world, "looking for the run directory", lambda: _check_visible(directory))
        yield
    finally:
        if lock:
            lock.release()


def check_disk(config: Config, sizes: Sizes) -> None:
    """Raises UserError if the disk cannot hold the checkpoints to keep, and one more or the exported model."""
    directory = Path(config.run.dir).absolute()
    root = directory / "checkpoints"
    existing = next(folder for folder in (directory, *directory.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    held = sum(file.stat().st_size for file in root.glob("step-*/*")) if root.is_dir() else 0
    saves = config.run.save_every is not None or config.run.save_minutes is not None or config.run.kept_best > 0
    kept = config.run.keep + config.run.kept_best if saves else 0
    one = checkpoint_bytes(config, sizes.trained) if saves else 0.0
    # A new checkpoint is complete before an old one is deleted. The export comes after the last of them.
    need = kept * one + max(one, sizes.exported)
    if free + held < need:
        checkpoints = f"{kept + 1} checkpoints of {_gigabytes(one)} and " if saves else ""
        less = ", lower run.keep, or save nothing with run.save_minutes=null" if saves else ""
        raise UserError(
            f"run.dir {config.run.dir}: {checkpoints}the exported model of {_gigabytes(sizes.exported)} need "
            f"{_gigabytes(need)}, {_gigabytes(free + held)} are free: make room, choose another disk{less}"
        )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def _check_visible(directory: Path) -> None:
    """Raises UserError if this host does not see the directory to which rank 0 writes."""
    end = time.monotonic() + WATCH_SECONDS
    while not (directory / ".lock").exists():
        if time.monotonic() > end:
            host = socket.gethostname()
            raise UserError(f"run.dir {directory}: host {host} does not see what rank 0 wrote: is it a shared disk?")
        time.sleep(0.5)


class _Lock:
    """The lock of a run directory, held by this process until `release`. Raises UserError."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / ".lock"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            # Open as long as the lock is held.
            self._file = open(self._path, "a+", encoding="utf-8", opener=regular_file)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"run.dir {directory} cannot be written: {error.strerror or error}") from None
        try:
            self._take(directory)
            self._write({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
        except OSError as error:
            with contextlib.suppress(OSError):  # on a full disk, closing tries to write again
                self._file.close()
            raise UserError(f"run.dir {directory} cannot be written: {error.strerror or error}") from None
        except BaseException:
            self._file.close()
            raise
        self._end = threading.Event()
        threading.Thread(target=self._touch, name="rmcore-lock", daemon=True).start()

    def release(self) -> None:
        """Release the lock. The file stays: if it were removed, two later runs could lock two files of this name."""
        self._end.set()
        self._file.truncate(0)
        self._file.close()

    def _take(self, directory: Path) -> None:
        holder = self._holder()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(_in_use(directory, holder)) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
        if holder.get("host", socket.gethostname()) != socket.gethostname() and self._is_touched():
            raise UserError(_in_use(directory, holder))

    def _is_touched(self) -> bool:
        """Whether a process on another host touches the file while this process watches it."""
        first, end = self._path.stat().st_mtime_ns, time.monotonic() + WATCH_SECONDS
        while time.monotonic() < end:
            time.sleep(0.5)
            if self._path.stat().st_mtime_ns != first:
                return True
        return False

    def _holder(self) -> dict[str, str]:
        self._file.seek(0)
        try:
            content = json.loads(self._file.read())
        except ValueError:
            return {}
        return {key: str(value) for key, value in content.items()} if isinstance(content, dict) else {}

    def _write(self, holder: dict[str, object]) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps(holder))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _touch(self) -> None:
        while not self._end.wait(TOUCH_SECONDS):
            try:
                os.utime(self._file.fileno())
            except OSError:
                return


def _in_use(directory: Path, holder: dict[str, str]) -> str:
    who = f"pid {holder.get('pid', 'unknown')} on host {holder.get('host', 'unknown')}"
    return (
        f"run.dir {directory} is in use by {who} since {holder.get('since', 'unknown')}: wait for it, stop it, or "
        "choose another run.dir"
    )
