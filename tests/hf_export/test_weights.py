"""Weights written one by one lie in the same files, with the same index, as transformers writes them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rmcore.config import UserError
from rmcore.hf_export.weights import check_shard_size, write_weights
from tests.harness.oracle import tiny_model


@pytest.mark.parametrize("size", ["5GB", "20KB", "1KB"])
def test_files_and_index_are_transformers_own(tmp_path: Path, size: str) -> None:
    """Written in reverse order; with 1KB most weights are larger than a file may be, and get one each."""
    model = tiny_model("llama")
    state = dict(model.state_dict())
    (tmp_path / "ours").mkdir()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    write_weights(tmp_path / "ours", shapes, torch.float32, reversed(state.items()), size)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    ours, theirs = ({path.name: path for path in (tmp_path / who).glob("model*")} for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and (len(ours) == 1) == (size == "5GB")
    for name, path in ours.items():
        if name.endswith(".json"):
            index, other = (json.loads(files[name].read_text()) for files in (ours, theirs))
            assert index["weight_map"] == other["weight_map"]
            assert index["metadata"]["total_size"] == other["metadata"]["total_size"]
        else:
            found, expected = load_file(path), load_file(theirs[name])
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("size", ["0GB", "5", "-1GB", "nanGB", "5XB", "1.5GB", ""])
def test_a_wrong_shard_size_is_one_clear_error(tmp_path: Path, size: str) -> None:
    with pytest.raises(UserError, match="expected a whole number and KB, MB or GB, such as 5GB"):
        check_shard_size(size)
    with pytest.raises(UserError, match="is not the size of a file"):
        write_weights(tmp_path, {"a": (2,)}, torch.float32, [("a", torch.zeros(2))], size)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_were_not_announced_or_are_missing(tmp_path: Path) -> None:
    shapes = {"a": (2,), "b": (3,)}
    good = {"a": torch.zeros(2), "b": torch.ones(3)}
    for number, (wrong, message) in enumerate(
        [
            ([("c", torch.zeros(2))], r"unexpected weight c \(2,\)"),
            ([("a", torch.zeros(3))], r"unexpected weight a \(3,\); expected \(2,\)"),
            ([*good.items(), ("a", good["a"])], "unexpected weight a"),
            ([("b", good["b"])], "1 weights are missing, a among them"),
        ]
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        with pytest.raises(ValueError, match=message):
            write_weights(directory, shapes, torch.float32, wrong)
