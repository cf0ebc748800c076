"""A rank whose main thread hangs in native code, where no Python handler of a signal runs."""

from pathlib import Path

import pytest

from tests.harness.crash import Fault, run
from tests.harness.small_run import arguments


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2])
def test_a_signal_ends_a_rank_that_hangs_in_native_code(tmp_path: Path, size: int) -> None:
    """Step 3 hangs, and SIGTERM comes to the rank that hangs. gloo would wait for ten minutes."""
    fault = Fault("compute", "hang-in-native-code", rank=size - 1, nth=3)
    stuck = run(tmp_path / "run", arguments(tmp_path), size, [fault])
    assert stuck.codes == [1] * size, stuck.text
    assert stuck.status["status"] == "failed" and stuck.status["step"] == 3
    for text in (stuck.status["reason"], stuck.output[0]):
        assert f"rank {size - 1} of {size} failed at step 3, phase compute: SIGTERM came, and the step did not" in text
    assert stuck.text.count("rmcore.train:") == 1 and "Traceback" not in stuck.text
