"""The number of cores that this process may use, by its CPU affinity and by its control groups (Linux).

Input: /proc and /sys. Output: a whole number, at least 1.
Example: a container with `--cpus 2.5` on a host of 64 cores: 3.
"""

import contextlib
import math
import os
from pathlib import Path


def usable_cores(groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process may use. `groups`, `membership`: where the system describes control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota(groups, membership))))


def _quota(groups: Path, membership: Path) -> float:
    """The least CPU quota of the process's control groups and those above them; infinite without a limit."""
    quotas = [math.inf]
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return math.inf
    for line in lines:  # version 2: "0::/a/b"; version 1: "4:cpu,cpuacct:/a/b"
        _, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        root = groups if not kinds else groups / "cpu" if "cpu" in kinds.split(",") else None
        if root is None:
            continue
        inner = Path(path.lstrip("/"))
        for folder in (root / inner, *(root / above for above in inner.parents), root):
            with contextlib.suppress(OSError, ValueError):  # skipped if its files are missing or have another format
                quotas.append(_quota_of(folder, version_2=not kinds))
    return min(quotas)


def _quota_of(folder: Path, *, version_2: bool) -> float:
    if version_2:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
    else:
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period"))
    return math.inf if quota.strip() in ("max", "-1") else int(quota) / int(period)
