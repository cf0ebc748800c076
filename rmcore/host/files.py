"""Writes files that survive a power cut: a new file is complete on disk before it takes its name.

Input: a path and a text. Output: the file. Example: `write_text_atomically(Path("run_status.json"), text)` writes
.run_status.json.4711 (4711 is the process), flushes it to disk and renames it.
"""

import math
import os
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
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def fsync_directory(directory: Path) -> None:
    """Flush a directory to disk, so that new and renamed files in it survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
