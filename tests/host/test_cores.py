"""The cores that a process may use, by its affinity and by the limits of its control groups."""

import os
from pathlib import Path

import pytest

from rmcore.host.cores import usable_cores

ALL = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/", {}, ALL),
        ("0::/", {"cpu.max": "max 100000"}, ALL),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/pod/run", {"pod/run/cpu.max": "max 100000", "pod/cpu.max": "100000 100000"}, 1),
        ("0::/pod", {"pod/cpu.max": "110000 100000"}, min(ALL, 2)),
        ("9:cpu,cpuacct:/pod", {"cpu/pod/cpu.cfs_quota_us": "100000", "cpu/pod/cpu.cfs_period_us": "100000"}, 1),
        ("9:cpu,cpuacct:/pod", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, ALL),
        ("4:memory:/pod", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, ALL),
        ("nonsense", {"cpu.max": "nonsense"}, ALL),
    ],
)
def test_the_least_limit_counts(tmp_path: Path, membership: str, files: dict[str, str], expected: int) -> None:
    (tmp_path / "membership").write_text(f"{membership}\n")
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert usable_cores(tmp_path / "groups", tmp_path / "membership") == expected


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert usable_cores(tmp_path, tmp_path / "missing") == ALL


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_the_affinity_counts() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
