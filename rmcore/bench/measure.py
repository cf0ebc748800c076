"""What all benchmarks share: a clock that sees the other processes, child processes that answer in JSON, results files.

Input: a command to run.
Output: its record, a dict.
Example: in a run of 10 s, other processes used 1 s of 2 cores: `others_share` is 0.05. A run above that is disturbed,
and medians leave it out as long as undisturbed runs remain.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MARK = "RESULT "  # begins the line of a child's output that holds its record
DIRECTORIES = re.compile(r"(?<![\w.:/])/(?:[^\s/\"':,;]+/)+")
DISTURBED = 0.05  # largest share of the machine that other processes may take in an undisturbed run


def parser(command: str, documentation: str | None) -> argparse.ArgumentParser:
    """The parser of a benchmark; its help begins with the docstring of the benchmark's module."""
    return argparse.ArgumentParser(
        prog=f"python -m rmcore.bench {command}",
        description=documentation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


class Clock:
    """Wall seconds, this process's CPU seconds, and those of all other processes, since the last `lap`."""

    def __init__(self) -> None:
        self._last = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        own = time.process_time()
        try:
            fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except OSError:  # not Linux: the time of other processes is unknown
            return time.perf_counter(), own, own
        busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), own, busy

    def lap(self) -> dict[str, float]:
        now, last = self._now(), self._last
        self._last = now
        wall, own, busy = (a - b for a, b in zip(now, last, strict=True))
        return {"wall_s": wall, "cpu_s": own, "others_cpu_s": max(0.0, busy - own)}


def add_up(laps: Sequence[dict[str, float]]) -> dict[str, float]:
    """The sum of laps, with the share of the machine that other processes took."""
    total = {key: sum(lap[key] for lap in laps) for key in ("wall_s", "cpu_s", "others_cpu_s")}
    total["others_share"] = total["others_cpu_s"] / total["wall_s"] / (os.cpu_count() or 1)
    return total


def report(record: dict[str, Any]) -> None:
    """Called by a child: prints the record, with the process's peak memory, as the last line of standard output."""
    import resource

    record.setdefault("peak_rss_mb", 0.0)
    record["peak_rss_mb"] = record["peak_rss_mb"] or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(MARK + json.dumps(record), flush=True)


def run_child(
    command: Sequence[str], threads: int, settings: dict[str, Any], limit_s: float | None = None
) -> dict[str, Any]:
    """Called by the parent: runs `command` with `settings` as its last argument, and returns the child's record.

    Raises RuntimeError, with the child's output, if the child fails, or if it takes more than `limit_s` seconds.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    whole = [*command, json.dumps(settings)]
    try:
        done = subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(command)} was stopped after {limit_s:.0f} seconds") from None
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        raise RuntimeError(
            f"{' '.join(command)} failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return json.loads(lines[-1][len(MARK) :])


def own_child(module: str) -> list[str]:
    """The command that runs a module of rmcore.bench as a child, with this Python."""
    return [sys.executable, "-m", module]


def machine() -> dict[str, Any]:
    """The machine and the versions that the results belong to."""
    import torch
    import transformers

    model = ""
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else ""
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest value, and their number."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "runs": len(values)}


def undisturbed(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs in which other processes took little of the machine; all runs if there is none."""
    return [run for run in runs if run["others_share"] <= DISTURBED] or runs


def write_results(name: str, record: dict[str, Any], out: str | None) -> Path:
    """Writes the record as JSON. Directories are removed from absolute paths, because they are those of one machine."""
    path = Path(out) if out else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(DIRECTORIES.sub("", json.dumps(record, indent=1)) + "\n", encoding="utf-8")
    return path
