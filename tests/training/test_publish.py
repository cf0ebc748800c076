"""Exports the model at the end of a run, while the other ranks wait."""

from pathlib import Path

import pytest

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
