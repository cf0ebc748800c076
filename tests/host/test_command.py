"""How a command ends: exit codes, what is printed and by which rank."""

import os
import subprocess
import sys

import pytest

from rmcore.hf_export.parity import ExportError
from rmcore.hf_export.upload import PushError
from rmcore.host.command import ExplainedError, UserError, run_command
from rmcore.parallel.world import RankError
from tests.harness.paths import ROOT


def raising(error: Exception):
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("no"), 2), (RankError("no"), 1), (ExportError("no"), 1), (PushError("no"), 1)],
)
def test_an_explained_error_becomes_one_line_and_an_exit_code(error, code, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert run_command("rmcore x", raising(error)) == code
    assert capsys.readouterr() == ("", "rmcore x: no\n")


def test_success_prints_nothing(capsys):
    assert run_command("rmcore x", lambda: None) == 0
    assert capsys.readouterr() == ("", "")


def test_other_ranks_print_only_what_no_other_rank_knows(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert run_command("rmcore x", raising(UserError("on every rank"))) == 2
    assert capsys.readouterr().err == ""
    error = ExplainedError("on rank 3")
    error.only_this_rank = True
    assert run_command("rmcore x", raising(error)) == 1
    assert capsys.readouterr().err == "rmcore x: on rank 3\n"


def test_any_other_exception_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command("rmcore x", lambda: 1 / 0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no full device")
@pytest.mark.parametrize(
    ("shell", "code", "error"),
    [
        ("{command} > /dev/full", 1, "rmcore x: the output cannot be written: No space left on device\n"),
        ("{command} | true; exit ${{PIPESTATUS[0]}}", 1, ""),
        ("{command} >&-", 0, ""),
        ("{command} > /dev/null", 0, ""),
    ],
)
def test_output_that_cannot_be_written_is_one_line(shell: str, code: int, error: str) -> None:
    work = "import sys, rmcore.host.command as c; sys.exit(c.run_command('rmcore x', lambda: print('x' * 100_000)))"
    script = shell.format(command=f'"{sys.executable}" -c "{work}"')
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, error)


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run_command("rmcore x", interrupted) == 130
    assert capsys.readouterr().err == "rmcore x: interrupted\n"
