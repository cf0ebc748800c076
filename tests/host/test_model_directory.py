"""Model directories that are refused before transformers reads them, by the commands that load a model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rmcore
from rmcore.config import UserError
from rmcore.config.schema import ModelConfig
from rmcore.data.synthetic import byte_tokenizer
from rmcore.host.model_directory import check_model_directory
from rmcore.model.backbone import load_model_config
from rmcore.model.safetensors_weights import check_indices, weight_files
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


def test_the_directories_of_a_run_and_of_a_checkpoint_are_refused(folder: Path) -> None:
    """A run has config.yaml, not config.json. The tokenizer is read first, so its loader refuses them, too."""
    check_model_directory(str(folder))
    run = folder / "run"
    checkpoint = run / "checkpoints" / "step-2"
    checkpoint.mkdir(parents=True)
    (run / "run_status.json").write_text('{"status": "running"}')
    (checkpoint / "manifest.json").write_text("{}")
    for place, words in [(run, "a run without an exported model"), (checkpoint, "a checkpoint")]:
        with pytest.raises(UserError, match=f"{place} is the directory of {words}: `rmcore export {place} -o DIR`"):
            load_model_config(ModelConfig(name=str(place)))
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=f"{run} is the directory of a run; give that of its model: {run}/model$"):
        rmcore.load(run)


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


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/hostname", "sub/model.safetensors", "..", "", 3, None])
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_cannot_list_files_outside_its_directory(folder: Path, kind: str, file: object) -> None:
    """By every reader: rmcore's own, and transformers', before which check_model_directory and check_indices run."""
    index = folder / f"{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"score.weight": "model-1.safetensors"}}))
    check_model_directory(str(folder))
    check_indices(str(folder), None)
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "model-1.safetensors", "score.weight": file}}))
    message = rf"{re.escape(index.name)} refers to a file outside its directory"
    for read in (
        lambda: load_model_config(ModelConfig(name=str(folder))),
        lambda: check_indices(str(folder), None),
        lambda: weight_files(str(folder), None),
    ):
        if kind == "model.safetensors" or read.__code__.co_names[0] != "weight_files":
            with pytest.raises(UserError, match=message):
                read()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000, "\xff"])
def test_what_is_not_an_index_is_one_message(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json is not an index of weights"):
        load_model_config(ModelConfig(name=str(folder)))
