"""A run inside a program or a notebook: `rmcore.fit(CONFIG)`, with errors as exceptions and a result as an object.

Input: a configuration as a path, a nested dict or a `Config`.
Output: a `FinishedRun`; or a UserError, a RunError, or KeyboardInterrupt once the run has saved.
Example: rmcore.fit({"model": {"name": "synthetic", "init": "random"}, "data": {"train": {"path": "synthetic"}}})
trains in this process; its result's `load()` is the reward model, and `evaluations` holds what was measured.
"""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from rmcore.config import Config, UserError, config_from_values, load_config
from rmcore.hf_export.upload import PushError
from rmcore.host.command import ExplainedError
from rmcore.parallel.world import environment_number
from rmcore.scoring.reward_model import RewardModel, load
from rmcore.tracking.status import read_status
from rmcore.training.outcome import FAILED, STOPPED, Ending
from rmcore.training.signals import Stopped


class RunError(ExplainedError):
    """A run failed. The message holds the step, the phase and the reason, as run_status.json does.

    Or it is completed, and the hub did not accept its model; the message has the command that pushes it.
    """


class FinishedRun:
    """A completed run: what its directory holds. Also for runs of `python -m rmcore.train`: FinishedRun("runs/hh").

    Attributes:
        dir: the run directory.
        status: run_status.json: step, episode, reason, eval (metrics of the exported weights) and more.
    Raises UserError if the directory holds no completed run.
    """

    def __init__(self, directory: str | Path) -> None:
        if not isinstance(directory, str | Path):
            raise UserError(f"directory must be the path of a run, not {type(directory).__name__}")
        self.dir = Path(directory)
        self.status = read_status(self.dir)
        if self.status.get("status") != "completed":
            found = self.status.get("status", "without run_status.json")
            raise UserError(f"{self.dir} is not the directory of a completed run: it is {found}")

    @property
    def model_dir(self) -> Path:
        """The exported Hugging Face directory."""
        return self.dir / "model"

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of the last evaluation (rmcore/evaluation/README.md); {} if nothing was evaluated."""
        return dict(self.status["eval"])

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """One dict per evaluation, in order: step, episode, epoch, and eval/rm/accuracy, eval/rm/loss, ..."""
        lines = (self.dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = map(json.loads, lines)
        return [row for row in rows if any(key.startswith("eval/") for key in row)]

    def load(self, **settings: Any) -> RewardModel:
        """The trained model; `settings` are those of `rmcore.load`."""
        return load(self.model_dir, **settings)

    def __repr__(self) -> str:
        return f"FinishedRun({str(self.dir)!r}, step={self.status.get('step')})"


def config_of(config: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str]) -> Config:
    """The configuration of a run. Raises UserError with every mistake."""
    if isinstance(config, Config):
        return config_from_values(config.model_dump(), overrides, where="the Config") if overrides else config
    if isinstance(config, Mapping):
        return config_from_values(config, overrides, where="the dict")
    if not isinstance(config, str | Path):
        raise UserError(f"config must be a path, a dict or a Config, not {type(config).__name__}")
    return load_config(str(config), overrides)


@contextmanager
def in_process() -> Iterator[None]:
    """Goes around a run of one process in a program, whose random generators are as before afterwards.

    Raises UserError if the process is one of several, or already uses torch.distributed.
    """
    if environment_number("WORLD_SIZE", 1) > 1:
        raise UserError(
            "rmcore.fit trains in one process; for several ranks: torchrun --nproc_per_node N -m rmcore.train CONFIG"
        )
    if dist.is_initialized():
        raise UserError(
            "rmcore.fit needs torch.distributed for itself, and this process has started it already: call "
            "torch.distributed.destroy_process_group() first, or train in a process of its own"
        )
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def raise_reason(end: Ending | Stopped, directory: str, received: int) -> NoReturn:
    """Raise what ended a run: UserError, RunError, or for a signal, after saving, KeyboardInterrupt or SystemExit(3).

    received: the number of the signal.
    """
    status = read_status(directory)
    if isinstance(end, Stopped) or end.code == STOPPED:
        if received != signal.SIGINT:
            raise SystemExit(STOPPED) from None
        raise KeyboardInterrupt(f"the run in {directory} has stopped; the same call resumes it") from None
    cause = end.__cause__
    if isinstance(cause, PushError):
        raise RunError(f"the run in {directory} is completed, but its model is not on the hub: {cause}") from cause
    if end.code == FAILED:
        reason = status.get("reason") if status.get("status") == "failed" else None
        raise RunError(f"the run in {directory} failed: {reason or end.__cause__}") from end.__cause__
    assert end.__cause__ is not None  # a UserError, as `recorded` caught it
    raise end.__cause__
