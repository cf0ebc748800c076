"""Commands that are started in a directory whose files hide packages, or that is gone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.paths import ROOT


def started(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of `python -m rmcore.ARGUMENTS` in a folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


@pytest.mark.parametrize("path", ["datasets/__init__.py", "torch.py", "yaml/__init__.py"])
def test_a_file_that_hides_a_package_is_one_line(tmp_path: Path, path: str) -> None:
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text("")
    name = path.split("/")[0].removesuffix(".py")
    expected = (
        f"rmcore: {path} hides the package {name}, which rmcore needs: rename it, or start in another directory\n"
    )
    assert started(tmp_path, "rmcore.train", "--help") == (2, expected)


def test_a_file_that_hides_the_standard_library_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "difflib.py").write_text("")
    code, error = started(tmp_path, "rmcore.train", "model.nam=x")
    assert code == 2 and error.startswith("rmcore: difflib.py hides difflib of the standard library"), error


def test_folders_without_code_hide_nothing(tmp_path: Path) -> None:
    for name in ("datasets", "torch", "wandb", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "code.py").write_text("1 / 0")  # hides a module that nobody imports
    assert started(tmp_path, "rmcore.train", "--help") == (0, "")


def test_a_directory_that_is_gone_is_one_line(tmp_path: Path) -> None:
    script = f"cd {tmp_path} && rmdir {tmp_path} && exec {sys.executable} -m rmcore.train --help"
    done = subprocess.run(
        ["bash", "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (
        2,
        "rmcore: the current directory does not exist any more: change to another one\n",
    )
