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
PRODUCTS = {"_attend", "_queries_back", "_keys_back"}  # their sums fill the registers


# Bytes of shared memory that a program may have. What compiles for sm_80 also runs on GPUs of 99 KiB (sm_86, sm_89).
ROOM = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # A100, H100, B200


@pytest.mark.parametrize(
    "capability, variants",
    [(90, "few"), *(pytest.param(capability, "all", marks=pytest.mark.slow) for capability in ROOM)],
)
def test_every_kernel_compiles_and_none_spills(capability: int, variants: str) -> None:
    triton = pytest.importorskip("triton")
    # A process of its own, because other tests let Triton interpret the kernels.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.harness.compile_kernels", variants, str(capability)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["kernel"] for one in found} == KERNELS | PRODUCTS
    older = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
    most = dict.fromkeys(PRODUCTS, 128 if older else 0)  # bytes
    assert [one for one in found if one["spilled"] > most.get(one["kernel"], 0)] == []
    assert [one for one in found if one["shared"] > ROOM[capability]] == []
    assert [one for one in found if one["registers"] > 128 and one["kernel"] not in PRODUCTS] == []
