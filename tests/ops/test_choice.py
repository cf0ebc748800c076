"""The choice of the kernels: the line about them, the switch, and how compiled kernels can be missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rmcore.ops as ops
from rmcore.ops.ragged_attention import ragged_attention
from tests.harness.paths import ROOT

ATTEND = """
import torch
import rmcore.ops as ops
from rmcore.ops.ragged_attention import ragged_attention
q = torch.arange(40.0).reshape(5, 2, 4).sin()
out = ragged_attention(q, q, q, torch.tensor([[0, 4, 0, 0], [4, 5, 0, 2]], dtype=torch.int32), 0.5)
print(ops.describe())
print(out.flatten().tolist())
"""


def attend(**environment: str) -> tuple[str, torch.Tensor]:
    """(describe(), the attention output) of a new process with the given environment variables."""
    command = [sys.executable, "-W", "error", "-c", ATTEND]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    line, numbers = done.stdout.splitlines()
    return line, torch.tensor([float(n) for n in numbers.strip("[]").split(",")])


def test_the_environment_chooses_the_reference():
    line, out = attend(RMCORE_OPS="reference")
    assert line == "ops: the PyTorch reference runs (chosen by RMCORE_OPS or use())"
    line, default = attend()
    assert line.startswith("ops: CPU runs ")
    torch.testing.assert_close(out, default)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="there is no lower instruction set")
def test_kernels_of_another_instruction_set_are_not_loaded():
    if (
        ops.cpu_library().parent / ops.cpu_library().name.replace("avx512", "default").replace("avx2", "default")
    ).exists():
        pytest.skip("kernels for DEFAULT are built too")
    line, out = attend(ATEN_CPU_CAPABILITY="default")
    assert "the PyTorch reference (no rmcore_cpu_default_torch" in line and "pip install" in line
    torch.testing.assert_close(out, attend()[1])


def test_a_library_that_does_not_load_is_reported(tmp_path, monkeypatch):
    broken = tmp_path / ops.cpu_library().name
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(ops, "cpu_library", lambda: broken)
    assert "failed to load, reinstall rmcore" in ops._load_cpu.__wrapped__()


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="fused, reference"):
        ops.use("fast")


@pytest.mark.skipif("C++" not in ops.describe(), reason="the C++ kernels are not in use")
def test_the_switch_reaches_the_dispatcher_and_back():
    """The kernels have different messages for the same mistake, a segment that begins at row 1."""
    q, segments = torch.zeros(3, 1, 8), torch.tensor([[1, 3, 0, 0]], dtype=torch.int32)
    in_cpp, in_python = r"segment 0 covers rows 1 to 3", r"segment 0 \(1, 3, 0, 0\) must begin"
    for mode, words in (("fused", in_cpp), ("reference", in_python), ("reference", in_python), ("fused", in_cpp)):
        ops.use(mode)
        with pytest.raises(ValueError, match=words):
            ragged_attention(q, q, q, segments, 1.0)


@pytest.mark.parametrize("without", ["cmake", "compiler"])
def test_an_install_without_build_tools_succeeds_and_says_so(tmp_path, without):
    """setup.py build_ext as pip calls it, without CMake or without a compiler: one line, exit code 0."""
    environment = os.environ | {"CXX": "/nonexistent/c++"}
    if without == "cmake":
        if (Path(sys.executable).parent / "cmake").exists():
            pytest.skip("cmake is installed next to this Python")
        environment["PATH"] = str(tmp_path)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib")]
    command += ["--build-temp", str(tmp_path / "temp")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("rmcore: C++ kernels not built")]
    assert len(lines) == 1
    assert not list(tmp_path.rglob("*.so"))


def test_an_unknown_choice_in_the_environment_is_reported():
    line, _ = attend(RMCORE_OPS="fast")
    assert line.startswith("ops: CPU runs ") and line.endswith("(RMCORE_OPS=fast is unknown: fused or reference)")
