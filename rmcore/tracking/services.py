"""Sends metrics and samples to experiment trackers by their own packages: Weights & Biases, Trackio, MLflow.

Input: metrics by name at a moment of the run, sample rows. Output: a run in the project (MLflow: experiment) rmcore,
with the name of the run directory. A file in that directory holds the identity of the run, so that a resumed run
continues it.
Example: after log.mlflow=true and MLFLOW_TRACKING_URI=http://tracker:5000, the metric eval/rm/accuracy of that run is
0.684 at step 640, which is the episode.

Where a tracker is, and who may write to it, is set as its own documentation says: WANDB_*, TRACKIO_*, MLFLOW_*.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rmcore.config import UserError
from rmcore.config.schema import Config
from rmcore.evaluation.samples import SampleRow
from rmcore.host.files import write_text_atomically
from rmcore.tracking.moment import Moment
from rmcore.tracking.sinks import samples_key

PROJECT = "rmcore"
COLUMNS = ("prompt", "chosen", "rejected", "chosen_reward", "rejected_reward", "correct")
LAST_SECONDS = 60.0  # that the end of a run waits for a tracker that does not answer
PARAMETERS_A_CALL, LONGEST_PARAMETER = 100, 6000  # MLflow's limits


class WeightsAndBiases:
    """A wandb run; its package sends in the background."""

    def __init__(self, directory: Path, config: Config) -> None:
        self._wandb = _package("wandb")
        self._run = self._wandb.init(
            project=PROJECT,
            name=directory.resolve().name,
            dir=str(directory),
            id=_identity(directory / "wandb_run_id", lambda: uuid.uuid4().hex),
            resume="allow",
            config=config.model_dump(mode="json"),
        )
        self._run.define_metric("*", step_metric="episode")

    def metrics(self, at: Moment, metrics: Mapping[str, float]) -> None:
        self._run.log({**asdict(at), **metrics})

    def samples(self, at: Moment, rows: Sequence[SampleRow], name: str) -> None:
        self._run.log({**asdict(at), samples_key(name): self._wandb.Table(columns=list(COLUMNS), data=_cells(rows))})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A Trackio run; its package sends in the background. A run is found by its name, so the name is unique.

    Trackio's own `step`, the x axis, is the episode.
    """

    def __init__(self, directory: Path, config: Config) -> None:
        self._trackio = _package("trackio")
        name = directory.resolve().name
        self._run = self._trackio.init(
            project=PROJECT,
            name=_identity(directory / "trackio_run_name", lambda: f"{name}-{uuid.uuid4().hex[:8]}"),
            resume="allow",
            config=config.model_dump(mode="json"),
            embed=False,
        )

    def metrics(self, at: Moment, metrics: Mapping[str, float]) -> None:
        self._run.log({"epoch": at.epoch, **metrics}, step=at.episode)

    def samples(self, at: Moment, rows: Sequence[SampleRow], name: str) -> None:
        table = self._trackio.Table(columns=list(COLUMNS), data=_cells(rows))
        self._run.log({samples_key(name): table}, step=at.episode)

    def close(self) -> None:
        if self._run is not None:
            self._trackio.finish()
        self._run = None


class MLflow:
    """An MLflow run. Its client waits for the server, minutes if that is down, so a thread makes the calls.

    A failure is raised by the next call, for the tracker to report. The thread is a daemon: it does not hold up the end
    of the process.
    """

    def __init__(self, directory: Path, config: Config) -> None:
        self._mlflow = _package("mlflow")
        self._client = self._mlflow.MlflowClient()
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._failures: list[Exception] = []
        self._thread = threading.Thread(target=self._work, name="rmcore-mlflow", daemon=True)
        self._thread.start()
        self._run_id = ""
        self._call(lambda: self._begin(directory, config))

    def metrics(self, at: Moment, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        values = {"step": at.step, "epoch": at.epoch, **metrics}
        entries = [self._mlflow.entities.Metric(key, float(value), now, at.episode) for key, value in values.items()]
        self._call(lambda: self._client.log_batch(self._run_id, metrics=entries))

    def samples(self, at: Moment, rows: Sequence[SampleRow], name: str) -> None:
        content = [dict(zip(COLUMNS, cells, strict=True)) for cells in _cells(rows)]
        path = f"{samples_key(name)}/step-{at.step}.json"
        self._call(lambda: self._client.log_dict(self._run_id, {"samples": content}, path))

    def close(self) -> None:
        if not self._thread.is_alive():
            return
        self._calls.put(lambda: self._client.set_terminated(self._run_id))
        self._calls.put(None)
        self._thread.join(LAST_SECONDS)
        if self._thread.is_alive():
            raise TimeoutError(f"no answer after {LAST_SECONDS:g} s: the last entries may be lost")
        self._raise_failure()

    def _begin(self, directory: Path, config: Config) -> None:
        file = directory / "mlflow_run_id"
        if file.exists():
            self._run_id = file.read_text(encoding="utf-8").strip()
            self._client.update_run(self._run_id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._run_id = self._client.create_run(experiment_id, run_name=directory.resolve().name).info.run_id
        write_text_atomically(file, self._run_id + "\n")
        parameters = [self._mlflow.entities.Param(key, value) for key, value in _parameters(config)]
        for first in range(0, len(parameters), PARAMETERS_A_CALL):
            self._client.log_batch(self._run_id, params=parameters[first : first + PARAMETERS_A_CALL])

    def _call(self, action: Callable[[], object]) -> None:
        """Queue a call. Raises the failure of an earlier one."""
        self._calls.put(action)
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failures:
            raise self._failures.pop(0)

    def _work(self) -> None:
        """In the thread: the calls in their order, until there is None."""
        while (action := self._calls.get()) is not None:
            try:
                action()
            except Exception as error:
                self._failures.append(error)


def _package(name: str) -> Any:
    """The package of a tracker. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"log.{name} is on and the package {name} is not installed: "
            f"pip install 'rmcore[{name}]', or set log.{name}=false"
        ) from None


def _identity(file: Path, new: Callable[[], str]) -> str:
    """What `file` holds; the first time, something new that is written into it."""
    if not file.exists():
        write_text_atomically(file, new() + "\n")
    return file.read_text(encoding="utf-8").strip()


def _cells(rows: Sequence[SampleRow]) -> list[list[Any]]:
    return [[getattr(row, name) for name in COLUMNS] for row in rows]


def _parameters(config: Config) -> Iterator[tuple[str, str]]:
    """Every key of the configuration with its value as JSON: ("optim.lr", "1e-05")."""
    for section, values in config.model_dump(mode="json").items():
        for key, value in values.items():
            yield f"{section}.{key}", json.dumps(value)[:LONGEST_PARAMETER]
