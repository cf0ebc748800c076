"""What the package exports: the documented names, each imported when it is first used."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import rmcore
from tests.harness.paths import ROOT

HEAVY = {"torch", "numpy", "transformers", "datasets", "pydantic", "yaml", "rich", "pyarrow", "matplotlib"}


def test_importing_the_package_imports_no_library() -> None:
    """A second or more of imports would be paid by every program that only mentions rmcore."""
    code = "import sys; before = set(sys.modules); import rmcore; print(*sorted(set(sys.modules) - before))"
    found = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True, timeout=60).split()
    assert "rmcore" in found and not {name.split(".")[0] for name in found} & HEAVY
    assert [name for name in found if name.startswith("rmcore.")] == []


def test_the_exports_are_the_documented_ones_and_type_checkers_see_the_same() -> None:
    source = ast.parse((ROOT / "rmcore" / "__init__.py").read_text(encoding="utf-8"))
    guarded = next(node for node in source.body if isinstance(node, ast.If))
    for_types = {
        alias.asname: (node.module, alias.name)
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(for_types) == rmcore.__all__ == sorted(rmcore.__all__)
    readme = (ROOT / "rmcore" / "README.md").read_text(encoding="utf-8")
    for name in rmcore.__all__:
        assert f"`rmcore.{name}" in readme, f"{name} is not documented"
        assert getattr(rmcore, name) is getattr(rmcore, name) and name in dir(rmcore)
        assert rmcore._PLACES[name] == for_types[name][0]
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        rmcore.lod  # type: ignore[attr-defined]  # noqa: B018


def test_the_five_lines_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, but with a run of two steps in another directory."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^(    import rmcore\n(?:    .*\n)+)", text, re.MULTILINE)
    assert found and found.group().count("\n") == 5
    code = re.sub("^    ", "", found.group(), flags=re.MULTILINE)
    short = f'"run.dir={tmp_path / "run"}", "run.max_steps=2", "data.limit=40", "log.report=none"'
    assert '"run.dir=runs/first"' in code
    (tmp_path / "five_lines.py").write_text(code.replace('"run.dir=runs/first"', short), encoding="utf-8")
    monkeypatch.chdir(ROOT)
    made = runpy.run_path(str(tmp_path / "five_lines.py"))
    assert made["run"].status["step"] == 2
    assert made["best"].reward == max(made["reward"](["2+2?", "2+2?"], ["4", "5"]))
