"""Disks that can be filled and disks that cannot be written: small tmpfs mounts, which need root (chmod stops no
root).
"""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(place: Path, size: int, *, read_only: bool = False) -> Iterator[Path]:
    """A mounted tmpfs of `size` bytes; skips the test with a reason where mounting is not permitted."""
    place.mkdir(parents=True)
    options = f"size={size}" + (",ro" if read_only else "")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)
