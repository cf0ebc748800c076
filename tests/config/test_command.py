"""The configuration on the command line: --help, --version, exit codes, `rmcore X`, the JSON schema."""

import json
import subprocess
import sys

import pytest

from rmcore.config import Config, config_from_argv, load_config
from rmcore.config.help import keys_of
from tests.harness.configs import NEEDED
from tests.harness.paths import ROOT


def test_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert config_from_argv(NEEDED, "prog") == load_config(None, NEEDED)
    hh = str(ROOT / "configs" / "hh.yaml")
    assert config_from_argv([hh, "optim.lr=1e-5"], "prog") == load_config(hh, ["optim.lr=1e-5"])
    assert capsys.readouterr().err == ""

    config_from_argv([*NEEDED, "run.seed=1", "run.seed=2"], "prog")
    assert capsys.readouterr().err == "prog: override `run.seed=2` replaces `run.seed=1`\n"

    for argv in ([], [*NEEDED, "optim.lrr=1"], ["missing.yaml"], ["--flag"], [*NEEDED, hh]):
        with pytest.raises(SystemExit) as stopped:
            config_from_argv(argv, "prog")
        printed = capsys.readouterr()
        assert (stopped.value.code, printed.out) == (2, "")
        assert printed.err.startswith("prog: ")
        assert printed.err.endswith("(--help lists every key)\n")

    monkeypatch.setenv("RANK", "1")  # the other ranks stop as well, but print nothing
    with pytest.raises(SystemExit) as stopped:
        config_from_argv([*NEEDED, "optim.lrr=1"], "prog")
    assert (stopped.value.code, capsys.readouterr().err) == (2, "")


def test_help_lists_every_key_with_type_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        config_from_argv(["configs/hh.yaml", "--help"], "prog", "What it does.")
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert text.startswith("usage: prog [CONFIG] [key=value ...]\n\nWhat it does.\n")
    joined = " ".join(text.split())
    for key in keys_of(Config):
        assert f"{key.name} = {key.default} {key.kind} {key.meaning}" in joined
    assert max(map(len, text.splitlines())) <= 120


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("module", ["rmcore.train", "rmcore"])
def test_help_waits_for_no_heavy_import(module: str) -> None:
    done = run_python("-X", "importtime", "-m", module, "--help")
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ")
    assert "rmcore" in imported  # the list was parsed
    assert not imported & {"torch", "transformers", "datasets", "numpy", "pandas", "pyarrow", "rich"}


def test_rmcore_x_is_python_m_rmcore_x() -> None:
    short, long = (
        run_python("-m", *words, "run.epochs=x", "--oops") for words in (("rmcore", "train"), ("rmcore.train",))
    )
    assert (short.returncode, short.stdout, short.stderr) == (2, long.stdout, long.stderr)
    assert "run.epochs" in long.stderr
    listed = run_python("-m", "rmcore", "--help")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "  train " in listed.stdout
    wrong = run_python("-m", "rmcore", "trian")
    assert (wrong.returncode, wrong.stderr) == (2, "rmcore: unknown command `trian`; did you mean train?\n")
    assert run_python("-m", "rmcore", "--version").stdout == run_python("-m", "rmcore.train", "--version").stdout


def test_the_json_schema_comes_from_the_same_classes() -> None:
    done = run_python("-m", "rmcore.config", "--schema")
    schema = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    found = set()

    def walk(prefix: str, section: dict) -> None:
        assert section["additionalProperties"] is False
        for key, entry in section["properties"].items():
            inner = schema["$defs"].get(entry.get("$ref", "").rsplit("/", 1)[-1])
            if inner is None:
                found.add(prefix + key)
            else:
                walk(f"{prefix}{key}.", inner)

    walk("", schema)
    assert found == {key.name for key in keys_of(Config) if not key.name.startswith("data.train.")}
    data = schema["$defs"]["DataConfig"]
    source = {"$ref": "#/$defs/SourceConfig"}
    for key in ("train", "eval"):  # an object, a list of objects, or nothing
        assert data["properties"][key]["anyOf"] == [source, {"type": "array", "items": source}, {"type": "null"}]
    assert "required" not in schema["$defs"]["SourceConfig"]  # data.eval may take its path from data.train
    assert schema["$defs"]["OptimConfig"]["properties"]["lr"]["exclusiveMinimum"] == 0
    assert run_python("-m", "rmcore.config").returncode == 2
