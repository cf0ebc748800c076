"""Model directories that are refused before transformers reads them, by the commands that load a model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rmcore.config import UserError
from rmcore.config.schema import ModelConfig
from rmcore.data.synthetic import byte_tokenizer
from rmcore.host.model_directory import check_model_directory
from rmcore.model.backbone import load_model_config
from rmcore.model.synthetic_model import synthetic_model_config
from tests.harness.paths import ROOT

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with a config and a tokenizer, and something in place of weights."""
    synthetic_model_config().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    return tmp_path


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_refused(folder: Path, name: str) -> None:
    check_model_directory(str(folder))
    (folder / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"^model\.name {folder}: {folder / name} is a Git LFS pointer.*git lfs pull"):
        load_model_config(ModelConfig(name=str(folder)))


def test_adapters_are_refused_with_and_without_weights_next_to_them(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(UserError, match=r"transformers would add the adapter in .*adapter_config\.json"):
        check_model_directory(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=rf"^model\.name {folder} is an adapter of org/base, not a model"):
        check_model_directory(str(folder))
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match="an adapter of another model"):
        check_model_directory(str(folder))


def test_a_training_refuses_it_in_one_line(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(POINTER)
    given = [f"model.name={folder}", "data.train.path=synthetic", "data.template=none", f"run.dir={folder / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-m", "rmcore.train", *given], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "git lfs pull" in done.stderr, done.stderr


def test_data_that_is_a_pointer_is_refused(tmp_path: Path) -> None:
    from rmcore.data.reading.files import read_files

    (tmp_path / "pairs.jsonl").write_text(POINTER)
    with pytest.raises(UserError, match=rf"^{tmp_path}/pairs\.jsonl is a Git LFS pointer"):
        read_files([tmp_path / "pairs.jsonl"], tmp_path / "cache")
