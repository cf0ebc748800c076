"""The Triton kernels compile for the GPUs that users have, and none spills registers to memory; needs no GPU."""

import json
import os
import subprocess
import sys

import pytest

from tests.harness.paths import ROOT

KERNELS = {
    "_score",
    "_pairs",
    "_scatter",
    "_weight_part",
    "_gather",
    "_add_copies",
    "_rotate",
    "_rotate_back",
    "_gelu_back",
}


@pytest.mark.parametrize(
    "capability",
    [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)],  # A100, H100, B200
)
def test_every_kernel_compiles_and_none_spills(capability: int) -> None:
    pytest.importorskip("triton")
    # A process of its own, because other tests let Triton interpret the kernels.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.harness.compile_kernels", str(capability)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["kernel"] for one in found} == KERNELS
    assert [one for one in found if one["spilled"] or one["registers"] > 128] == []
