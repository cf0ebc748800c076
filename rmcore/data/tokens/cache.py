"""Caches tokens on disk: one process builds a directory of .npy files and meta.json, all read it by memory maps.

Input: a key (a hash of all that decides the content), and a function that writes the arrays.
Output: TokenizedComparisons.
Example: <root>/3f0c/{tokens.npy, ..., meta.json} and 3f0c.lock; while process 71 on host a builds, 3f0c.building-a-71.

Any number of processes may open an entry at the same time. The first one takes the file lock and builds into a
directory of its own, which it renames when everything is on disk; the others wait for the lock. A killed builder leaves
only that directory. It is never read, and the next builder deletes it. To open an entry, a process reads it once and
compares hashes (xxh3, some GB per second), so that a flipped bit or a lost block is found before training.
"""

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from filelock import FileLock, Timeout

from rmcore.config import UserError
from rmcore.data.tokens.comparisons import ARRAYS, OFFSET_OF, OPTIONAL, TokenizedComparisons, shaped
from rmcore.host.files import fsync_directory

FORMAT_VERSION = 3
READER = 1  # raised when rows are read otherwise, so that what an older rmcore read of them is built again
_BLOCK = 1 << 22  # bytes hashed at a time
WAIT_SECONDS = 30.0  # between two log lines that say which process holds the lock

_log = logging.getLogger(__name__)


class DamagedCache(Exception):
    """A cache directory differs from what its builder wrote."""


class CacheWriter:
    """Appends chunks (rmcore.data.tokens.comparisons.lay_out) to .npy files, one per array. Memory does not grow.

    `optional`: the arrays that these data have besides ARRAYS.
    """

    def __init__(self, directory: Path, optional: Sequence[str] = ()) -> None:
        self._directory = directory
        self._dtypes = ARRAYS | {name: OPTIONAL[name] for name in optional}
        self._length = dict.fromkeys(self._dtypes, 0)  # entries written
        self._offset = dict.fromkeys(OFFSET_OF, 0)  # the last offset written
        self._hash = {name: xxhash.xxh3_128() for name in self._dtypes}
        self._files: dict[str, IO[bytes]] = {}
        directory.mkdir()
        for name in self._dtypes:
            self._files[name] = open(directory / f"{name}.npy", "wb")  # noqa: SIM115  (closed by finish)
            self._write_header(name)
            if name in OFFSET_OF:
                self._append(name, np.zeros(1, dtype=np.int64))

    def __len__(self) -> int:
        return self._length["prefix_length"]

    def write(self, chunk: dict[str, np.ndarray]) -> None:
        """Appends one chunk; its offsets are lengths, which are summed here."""
        for name, values in chunk.items():
            if name in OFFSET_OF and len(values):
                values = self._offset[name] + np.cumsum(values)
                self._offset[name] = int(values[-1])
            self._append(name, values)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def finish(self, sources: list[str], report: dict[str, Any]) -> None:
        """Writes the final headers and meta.json, and syncs everything to the disk."""
        for name, file in self._files.items():
            file.seek(0)
            self._write_header(name)
            _sync(file)
            file.close()
        fingerprint = xxhash.xxh3_128()
        for name in self._dtypes:
            fingerprint.update(self._hash[name].digest())
        fingerprint.update(json.dumps(sources).encode())
        meta = {
            "format_version": FORMAT_VERSION,
            "reader": READER,
            "bytes": {name: (self._directory / f"{name}.npy").stat().st_size for name in self._dtypes},
            "length": self._length,
            "hash": {name: self._hash[name].hexdigest() for name in self._dtypes},
            "sources": sources,
            "fingerprint": fingerprint.hexdigest(),
            "report": report,
        }
        with open(self._directory / "meta.json", "w", encoding="utf-8") as meta_file:
            json.dump(meta, meta_file, indent=1)
            _sync(meta_file)
        fsync_directory(self._directory)

    def _append(self, name: str, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values, dtype=self._dtypes[name]).tobytes()
        self._files[name].write(data)
        self._hash[name].update(data)
        self._length[name] += len(values)

    def _write_header(self, name: str) -> None:
        # numpy pads the header so that the first axis can grow: with the final length it has the same size.
        header = {"descr": np.dtype(self._dtypes[name]).str, "fortran_order": False, "shape": (self._length[name],)}
        np.lib.format.write_array_header_1_0(self._files[name], header)


def read(directory: Path) -> TokenizedComparisons:
    """Opens a cache directory by memory maps. Raises FileNotFoundError if it does not exist, or DamagedCache."""
    if not directory.is_dir():
        raise FileNotFoundError(directory)
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        if meta["format_version"] != FORMAT_VERSION:
            raise DamagedCache(f"format {meta['format_version']}, not {FORMAT_VERSION}")
        if meta.get("reader") != READER:
            raise DamagedCache("an older rmcore built it, which did not read all content of the rows")
        dtypes = ARRAYS | {name: dtype for name, dtype in OPTIONAL.items() if name in meta["length"]}
        arrays = {name: _open_array(directory, name, dtype, meta) for name, dtype in dtypes.items()}
        for name, counted in OFFSET_OF.items():
            if arrays[name][0] != 0 or arrays[name][-1] != len(arrays[counted]):
                raise DamagedCache(f"{name} does not fit {counted}")
        return TokenizedComparisons(
            **shaped(arrays), sources=meta["sources"], fingerprint=meta["fingerprint"], report=meta["report"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCache(f"{type(error).__name__}: {error}") from error


def _open_array(directory: Path, name: str, dtype: type[np.generic], meta: dict[str, Any]) -> np.ndarray:
    path = directory / f"{name}.npy"
    if (size := path.stat().st_size) != meta["bytes"][name]:
        raise DamagedCache(f"{path.name} has {size} bytes, not {meta['bytes'][name]}")
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype != dtype or array.shape != (meta["length"][name],):
        raise DamagedCache(f"{path.name} holds {array.dtype} {array.shape}")
    if _hash_from(path, size - array.nbytes) != meta["hash"][name]:
        raise DamagedCache(f"{path.name} is not what was written: its hash differs")
    return np.asarray(array)  # a plain view of the map, because slicing np.memmap is several times slower


def _hash_from(path: Path, start: int) -> str:
    """xxh3 of a file's bytes after its header. Read, not mapped: mapped pages would count as memory of the process."""
    digest, block = xxhash.xxh3_128(), bytearray(_BLOCK)
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()


def open_or_build(
    root: Path, key: str, build: Callable[[CacheWriter], None], what: str, optional: Sequence[str] = ()
) -> TokenizedComparisons:
    """Opens the cache entry `key` under `root`, or has `build(writer)` build it, which ends with writer.finish.

    `what`: the data, for messages. `optional`: the arrays that they have besides ARRAYS.
    Raises UserError if the directory cannot be written. An error of `build` passes
    through, and nothing is left behind.
    """
    final = root / key
    try:
        return read(final)
    except (FileNotFoundError, DamagedCache):
        pass  # read again under the lock: another process may be repairing it
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f"{key}.lock", timeout=WAIT_SECONDS)
        _wait_for(lock, root / f"{key}.owner", what)
    except OSError as error:
        raise UserError(f"data.cache: cannot write {root}: {error}") from error
    try:
        return _read_or_build(root, key, build, what, optional)
    finally:
        lock.release()


def _read_or_build(
    root: Path, key: str, build: Callable[[CacheWriter], None], what: str, optional: Sequence[str]
) -> TokenizedComparisons:
    """Reads or builds the entry; called with the lock held."""
    final = root / key
    try:
        return read(final)
    except FileNotFoundError:
        pass
    except DamagedCache as damage:
        _log.warning("the token cache %s cannot be used (%s): preparing %s again", final, damage, what)
    owner = {"pid": os.getpid(), "host": socket.gethostname()}
    temporary = root / f"{key}.building-{owner['host']}-{owner['pid']}"
    try:
        (root / f"{key}.owner").write_text(json.dumps(owner), encoding="utf-8")
        for leftover in [*root.glob(f"{key}.building-*"), *root.glob(f"{key}.broken-*")]:
            shutil.rmtree(leftover, ignore_errors=True)
        if final.exists():
            aside = root / f"{key}.broken-{owner['host']}-{owner['pid']}"
            final.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        writer = CacheWriter(temporary, optional)
        try:
            build(writer)
        except BaseException:
            writer.close()
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        temporary.rename(final)
        fsync_directory(root)
    except OSError as error:
        raise UserError(f"data.cache: cannot write {root}: {error}") from error
    return read(final)


def _wait_for(lock: FileLock, owner_path: Path, what: str) -> None:
    """Takes the lock, however long it takes, and logs now and then which process has it."""
    start = time.monotonic()
    while True:
        try:
            lock.acquire()
            return
        except Timeout:
            try:
                owner = json.loads(owner_path.read_text(encoding="utf-8"))
                who = f"process {owner['pid']} on {owner['host']}"
            except (OSError, ValueError, KeyError):
                who = "another process"
            _log.warning("waiting for %s to prepare %s (%.0f s so far)", who, what, time.monotonic() - start)


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
