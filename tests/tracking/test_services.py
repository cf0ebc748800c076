"""Trackers: what their packages are called with, that failures end no training; and the real packages, if installed."""

import math
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rmcore.tracking import services
from rmcore.tracking.tracker import start_tracker
from tests.tracking.test_tracking import EVAL, MAIN, ROWS, TRAIN, config, file_console, moment, printed


class Recorder:
    """A stand-in for a module or an object of it: records each call with its arguments, and returns another one."""

    def __init__(self, calls: list[tuple[str, tuple, dict]], name: str = "") -> None:
        self._calls, self._name = calls, name

    def __getattr__(self, name: str) -> "Recorder":
        return Recorder(self._calls, f"{self._name}.{name}".lstrip("."))

    def __call__(self, *arguments: Any, **named: Any) -> "Recorder":
        self._calls.append((self._name, arguments, named))
        return Recorder(self._calls, f"{self._name}()")


def two_attempts(directory: Path, key: str) -> str:
    """A run that stops after step 2 and is resumed; what it printed."""
    console = file_console(400)
    for start, steps in ((None, (1, 2)), (moment(2), (3,))):
        given = config(directory, f"log.{key}=true", "log.tensorboard=false")
        with start_tracker(MAIN, given, steps=10, start=start, console=console) as tracker:
            for step in steps:
                tracker.log(moment(step), TRAIN)
            tracker.log(moment(steps[-1]), {**EVAL, "eval/other/loss": math.nan})
            tracker.log_samples(moment(steps[-1]), ROWS[:1])
            tracker.log_samples(moment(steps[-1]), ROWS[:2], "other")
            tracker.close()  # closing twice is harmless
    return printed(console)


@pytest.mark.parametrize(("key", "file"), [("wandb", "wandb_run_id"), ("trackio", "trackio_run_name")])
def test_trackers_with_the_interface_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, file: str
) -> None:
    calls: list[tuple[str, tuple, dict]] = []
    monkeypatch.setitem(sys.modules, key, Recorder(calls))
    assert "warning" not in two_attempts(tmp_path / "my-run", key)
    begun = [named for name, _, named in calls if name == "init"]
    identity = (tmp_path / "my-run" / file).read_text().strip()
    for named in begun:
        assert (named["project"], named["resume"], named["config"]["optim"]["lr"]) == ("rmcore", "allow", 3e-6)
        assert named["id" if key == "wandb" else "name"] == identity, "the resumed run is the same one"
        assert named["name"].startswith("my-run")
    logged = [(arguments[0], named) for name, arguments, named in calls if name == "init().log"]
    assert len(begun) == 2 and len(logged) == 9
    for (metrics, named), step in zip((logged[0], logged[5]), (1, 3), strict=True):
        assert metrics["train/rm/loss"] == TRAIN["train/rm/loss"] and metrics["epoch"] == moment(step).epoch
        assert (metrics if key == "wandb" else {"episode": named["step"]})["episode"] == 64 * step
    tables = [arguments or named for name, arguments, named in calls if name == "Table"]
    assert [len(table["data"]) for table in tables] == [1, 2] * 2
    assert tables[0]["data"] == [["prompt 0 |", "yes\nindeed", "no [bold]", 1.25, -0.33333, True]]
    assert [key for metrics, _ in logged for key in metrics if "samples" in key] == [
        "eval/samples", "eval/other/samples",
    ] * 2  # fmt: skip
    assert sum(name.endswith("finish") for name, *_ in calls) >= 2


class MLflowServer:
    """A stand-in for the package mlflow, with a server that keeps what it is sent; `answers`: whether it does so."""

    def __init__(self) -> None:
        self.entities = SimpleNamespace(Metric=lambda *values: values, Param=lambda *values: values)
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.answers = threading.Event()
        self.answers.set()

    def MlflowClient(self) -> "MLflowServer":
        return self

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        self.answers.wait()
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        return self.experiments.setdefault(name, f"experiment {name}")

    def create_run(self, experiment_id: str, run_name: str) -> SimpleNamespace:
        run_id = f"run {len(self.runs)}"
        self.runs[run_id] = {"of": experiment_id, "name": run_name, "metrics": [], "params": {}, "files": {}}
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id]["status"] = status

    def set_terminated(self, run_id: str) -> None:
        self.update_run(run_id, "FINISHED")

    def log_batch(self, run_id: str, metrics: list = [], params: list = []) -> None:  # noqa: B006
        assert len(params) <= 100
        self.runs[run_id]["metrics"] += metrics
        self.runs[run_id]["params"] |= dict(params)

    def log_dict(self, run_id: str, dictionary: dict[str, Any], artifact_file: str) -> None:
        self.runs[run_id]["files"][artifact_file] = dictionary


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = MLflowServer()
    monkeypatch.setitem(sys.modules, "mlflow", server)
    assert "warning" not in two_attempts(tmp_path / "my-run", "mlflow")
    [(run_id, found)] = server.runs.items()
    assert (tmp_path / "my-run" / "mlflow_run_id").read_text().strip() == run_id
    assert (found["of"], found["name"], found["status"]) == ("experiment rmcore", "my-run", "FINISHED")
    losses = [(step, value) for key, value, _, step in found["metrics"] if key == "train/rm/loss"]
    assert losses == [(64 * step, TRAIN["train/rm/loss"]) for step in (1, 2, 3)], "x is the episode"
    assert found["params"]["optim.lr"] == "3e-06" and "synthetic" in found["params"]["data.train"]
    files = found["files"]
    assert list(files) == [f"eval/{name}samples/step-{step}.json" for step in (2, 3) for name in ("", "other/")]
    assert files["eval/samples/step-2.json"]["samples"][0]["chosen_reward"] == 1.25


def test_a_server_that_does_not_answer_holds_up_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, other = MLflowServer(), tmp_path / "other"
    server.answers.clear()
    monkeypatch.setitem(sys.modules, "mlflow", server)
    monkeypatch.setattr(services, "LAST_SECONDS", 0.01)
    try:
        output = two_attempts(tmp_path / "run", "mlflow")
    finally:
        server.answers.set()
    assert "warning: MLflow: TimeoutError: no answer after 0.01 s: the last entries may be lost" in output
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 5

    monkeypatch.setattr(services, "LAST_SECONDS", 60.0)
    monkeypatch.setattr(server, "create_run", lambda *_, **__: 1 / 0)
    output = two_attempts(other, "mlflow")
    assert output.count("warning: MLflow: ZeroDivisionError: division by zero; the training continues") == 2
    assert len((other / "metrics.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("key", ["wandb", "trackio", "mlflow"])
def test_a_tracker_that_cannot_start_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """No login, no network, another API: one warning per attempt, and everything else is logged."""

    class Closed:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("not logged in")

    monkeypatch.setitem(sys.modules, key, Closed())
    output = two_attempts(tmp_path, key)
    assert output.count("RuntimeError: not logged in; the training continues without") == 2
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


# ---- the real packages, where they are installed


def test_the_real_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert "warning" not in two_attempts(tmp_path / "my-run", "mlflow")
    client = mlflow.MlflowClient()
    [found] = client.search_runs([client.get_experiment_by_name("rmcore").experiment_id])
    assert (found.info.run_name, found.info.status) == ("my-run", "FINISHED")
    history = client.get_metric_history(found.info.run_id, "train/rm/loss")
    assert [entry.step for entry in history] == [64, 128, 192]
    assert found.data.params["optim.lr"] == "3e-06"
    files = client.list_artifacts(found.info.run_id, "eval/other/samples")
    assert [file.path for file in files] == [f"eval/other/samples/step-{step}.json" for step in (2, 3)]


def test_the_real_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when the package is imported
    trackio = pytest.importorskip("trackio")
    assert "warning" not in two_attempts(tmp_path / "my-run", "trackio")
    name = (tmp_path / "my-run" / "trackio_run_name").read_text().strip()
    [found] = trackio.Api().runs("rmcore")
    assert found.name == name


def test_the_real_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert "warning" not in two_attempts(tmp_path / "my-run", "wandb")
    identity = (tmp_path / "my-run" / "wandb_run_id").read_text().strip()
    assert len(list((tmp_path / "my-run" / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))) == 2
