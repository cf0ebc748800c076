"""Writes run_status.json: the state of a run, for scripts that read the run directory and not exit codes.

Input: the status, the step and episode reached, a reason, the metrics of the last evaluation. Output: the file,
replaced as a whole, so that a reader sees either the old or the new one, never half of one.
Example: {"status": "completed", "step": 28, "episode": 1790, "reason": "", "eval": {"accuracy": 0.61}, "time": ...}
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rmcore.host.files import finite, regular_file, write_text_atomically
from rmcore.host.terminal import print_text
from rmcore.parallel.world import World

Status = Literal["running", "completed", "preempted", "failed"]
FILE = "run_status.json"


def write_status(world: World, run_dir: str | Path, status: Status, **content: Any) -> None:
    """Rank 0 calls `record_status`; the other ranks return at once."""
    if world.is_main:
        record_status(run_dir, status, **content)


def record_status(
    run_dir: str | Path,
    status: Status,
    *,
    step: int = 0,
    episode: int = 0,
    reason: str = "",
    evaluation: Mapping[str, Any] | None = None,
    best: Mapping[str, Any] | None = None,
) -> None:
    """Write run_status.json. If it cannot be written, print a warning and return.

    Args:
        step, episode: optimizer steps done and pairs seen.
        reason: why the run failed, was preempted or ended early, for people.
        evaluation: the metrics of the last evaluation; of the exported weights, once the run is completed.
        best: the step, the metric and its value of the best checkpoint, if that is exported.
    """
    content = {
        "status": status,
        "step": step,
        "episode": episode,
        "reason": reason,
        "eval": dict(evaluation or {}),
        **({"best": dict(best)} if best else {}),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    path, text = Path(run_dir) / FILE, json.dumps(finite(content), indent=2) + "\n"
    try:
        write_text_atomically(path, text)
    except OSError as error:
        try:  # a full disk has no room for a second file, and the old one must not keep the status "running"
            with open(path, "r+", encoding="utf-8", opener=regular_file) as file:
                file.write(text)
                file.truncate()
        except OSError:
            print_text(f"rmcore.train: warning: {path} cannot be written: {error.strerror}", sys.stderr)


def read_status(run_dir: str | Path) -> dict[str, Any]:
    """The content of run_status.json, {} if it is missing or cannot be read."""
    try:
        content = json.loads((Path(run_dir) / FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
