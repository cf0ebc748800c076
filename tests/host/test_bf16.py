"""The instructions for bf16 products, compared with what oneDNN itself reports."""

import os
import subprocess
import sys

import pytest

from tests.harness.paths import ROOT

MULTIPLY = """
import torch
from rmcore.host.bf16 import bf16_instructions
print("found:", bf16_instructions(torch.device("cpu")), flush=True)
a = torch.ones(64, 64, dtype=torch.bfloat16)
print("sum:", float(torch.mm(a, a).sum()))
"""


@pytest.mark.parametrize("limit", ["", "avx2", "AVX512_CORE_VNNI"])
def test_the_instructions_are_those_that_onednn_reports(limit: str) -> None:
    """oneDNN prints the instruction set that it uses, when it multiplies: "... and bfloat16 support", "... AMX ..."."""
    environment = {key: value for key, value in os.environ.items() if key != "ONEDNN_MAX_CPU_ISA"}
    environment |= {"ONEDNN_VERBOSE": "1"} | ({"ONEDNN_MAX_CPU_ISA": limit} if limit else {})
    command = [sys.executable, "-c", MULTIPLY]
    lines = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    isa = " ".join(line for line in lines.splitlines() if "info,cpu,isa:" in line)
    (found,) = [line.removeprefix("found:").strip() for line in lines.splitlines() if line.startswith("found:")]
    assert bool(found) == ("bfloat16" in isa or "AMX" in isa or found == "Arm BF16"), lines
    assert not (limit and found), "the limit leaves no bf16 products"
