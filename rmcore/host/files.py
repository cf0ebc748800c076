"""Writes files that survive a power cut (a new file is complete on disk before it takes its name), and only into files.

Input: a path and a text. Output: the file. Example: `write_text_atomically(Path("run_status.json"), text)` writes
.run_status.json.4711 (4711 is the process), flushes it to disk and renames it.
"""

import errno
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def finite(value: Any) -> Any:
    """A copy of `value` with None in place of NaN and infinities, which are not JSON: strict readers reject them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def write_text_atomically(path: Path, text: str) -> None:
    """Replace `path` by a file with this text, flushed to disk (fsync) before the rename; mode 0644 under the umask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(
        f".{path.name}.{os.getpid()}"
    )  # not mkstemp, which ignores the umask and creates files with mode 0600
    try:
        temporary.unlink(missing_ok=True)  # of a killed process with the same number
        with open(temporary, "x", encoding="utf-8") as file:  # "x" does not write through a link of this name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def regular_file(path: str, flags: int) -> int:
    """An opener for `open` that refuses symbolic links, pipes and devices: appending must not reach other files.

    Raises OSError; its message says what the path is.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)  # opening a pipe would wait for a reader
    except OSError as error:
        if error.errno == errno.ELOOP:
            error.strerror = f"{os.path.basename(path)} is a symbolic link, which is not followed"
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, f"{os.path.basename(path)} is not a regular file", path)
    return handle


def fsync_directory(directory: Path) -> None:
    """Flush a directory to disk, so that new and renamed files in it survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
