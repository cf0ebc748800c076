"""Exports the model at the end of a run, while the other ranks wait."""

import re
from pathlib import Path

import pytest

import rmcore
from rmcore.config import load_config
from tests.harness.crash import Fault, run
from tests.harness.small_run import arguments


@pytest.mark.distributed
def test_the_check_may_take_longer_than_a_collective_may_wait(tmp_path: Path) -> None:
    """On one thread the check of a 1.4b model takes a quarter of an hour, and the other ranks wait for it."""
    given = arguments(tmp_path, "run.max_steps=2", "parallel.timeout_seconds=6")
    outcome = run(tmp_path / "run", given, 2, [Fault("export.check", "outlast")], publish=True)
    assert outcome.codes == [0, 0], outcome.text
    assert "rewards reloaded by transformers differ by" in outcome.text
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_size > 0
    assert outcome.status["status"] == "completed"


@pytest.mark.distributed
def test_a_refused_push_leaves_a_completed_run(tmp_path: Path) -> None:
    """The hub is offline. The push comes last, so the status, the metrics and the report are those of any other run."""
    pushed = ("hub.push=true", "hub.repo=me/rm", "data.eval_fraction=0.25", "run.evals=1", "run.max_steps=2")
    given = arguments(tmp_path, *pushed)
    outcome = run(tmp_path / "run", given, 2, publish=True)
    assert outcome.codes == [1, 1] and "Traceback" not in outcome.text, outcome.text
    model = tmp_path / "run" / "model"
    message = rf"could not push to me/rm: .*The model is saved in {model}.* rmcore push {model} me/rm"
    assert len(re.findall(message, outcome.text)) == 1, outcome.text
    finished = rmcore.FinishedRun(tmp_path / "run")
    assert finished.status["step"] == 2 and 0 <= finished.metrics["accuracy"] <= 1
    assert (tmp_path / "run" / "report.html").stat().st_size > 0 and (model / "model.safetensors").is_file()

    config = load_config(None, [*given, f"run.dir={tmp_path / 'fit'}", "log.report=none"])
    with pytest.raises(rmcore.RunError, match=rf"fit is completed, but (.|\n)*rmcore push {tmp_path}/fit/model me/rm"):
        rmcore.fit(config)
    assert rmcore.fit(config).metrics["loss"] == pytest.approx(finished.metrics["loss"], abs=1e-4)
