"""Finds the weights of a checkpoint in its safetensors files, so that single rows of them can be read.

Input: a directory or hub id with safetensors files, and the names and shapes that a model expects.
Output: `StoredWeights`, which fills tensors with rows; or one error that lists all weights that are missing, unexpected
or of another shape.
Example: `gpt_neox.layers.3.mlp.dense_h_to_4h.weight` [8192, 2048] of pythia-1b lies in the second of three files. Rank
2 of 4 reads its rows 4096 to 6143, 8 MiB of bf16, and no other byte of that weight.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import cached_file

from rmcore.config import UserError
from rmcore.model.found_weights import HEAD_FILES, SCORE, check_found

WantedRows = Mapping[str, tuple[int, Tensor]]  # name -> (first row, the rows to fill, on any device)
FLOATS = ("F64", "F32", "F16", "BF16")
# Older checkpoints hold these buffers; today's models compute them, and transformers ignores them too.
COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


class StoredTensor(NamedTuple):
    """One tensor of a checkpoint: its file, its name in the file, its shape."""

    path: Path
    key: str
    shape: tuple[int, ...]


class StoredWeights:
    """The weights of a checkpoint under the names that the model gives them."""

    def __init__(self, entries: Mapping[str, StoredTensor]) -> None:
        self._entries = entries

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight in the checkpoint."""
        return self._entries[name].shape

    def fill(self, wanted: WantedRows) -> None:
        """Read the wanted rows, file by file, and nothing else. Raises UserError when a file has become unreadable."""
        by_file: dict[Path, list[str]] = {}
        for name, (_, rows) in wanted.items():
            if rows.numel():
                by_file.setdefault(self._entries[name].path, []).append(name)
        for path, names in by_file.items():
            try:
                with safe_open(path, framework="pt") as file:
                    for name in names:
                        first, rows = wanted[name]
                        rows.copy_(file.get_slice(self._entries[name].key)[first : first + rows.shape[0]])
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read: {error}") from None


def weight_files(name: str, revision: str | None) -> list[Path] | None:
    """The safetensors files of a model, fetched from the hub where needed; None when the model has none.

    Raises OSError, ValueError or KeyError: the index is broken, or the hub cannot be reached.
    """
    known: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    index = cached_file(name, "model.safetensors.index.json", **known)
    if index is None:
        single = cached_file(name, "model.safetensors", **known)
        return [Path(single)] if single is not None else None
    listed = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    if any(Path(file).name != file for file in listed):
        raise ValueError(f"{index} refers to a file outside its directory")
    return [Path(str(cached_file(name, file, revision=revision))) for file in listed]


def is_rewritten(model: PreTrainedModel) -> bool:
    """Whether transformers renames or fuses the weights of this model while it loads them, as it does for experts."""
    return bool(get_model_conversion_mapping(model, add_legacy=False)) or hasattr(model.config, "quantization_config")


def open_weights(
    files: Iterable[Path],
    model: PreTrainedModel,
    heads: set[str],
    head: str,
    embedding: str = "",
    others: Sequence[str] = (),
) -> tuple[StoredWeights, str]:
    """The checkpoint's weights under the names of `model`, and a note on them. Only its names and shapes are used.

    Args:
        heads: names of another head (the language model's). They may be in the checkpoint and are ignored.
        head: model.head: with `fresh`, the score head is not read.
        embedding: its name; a checkpoint with a tied head may hold it under the head's name.
        others: see `head_files`.
    Raises:
        UserError: weights are missing, unexpected, or have another shape or type; one message lists them all.
        OSError, SafetensorError: a file is not a safetensors file.
    """
    replaced = {SCORE} if head == "fresh" else set()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, StoredTensor] = {}
    unexpected, wrong = [], []
    ignored = re.compile("|".join([*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *COMPUTED]))
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                stored = file.get_slice(key)
                shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
                name = next((n for n in (key, f"{model.base_model_prefix}.{key}") if n in expected or n in heads), None)
                if name is None:
                    unexpected += [] if ignored.search(key) else [key]
                    continue
                found[name] = StoredTensor(path, key, shape)
                if name in expected and name not in replaced:
                    wanted = expected[name]
                    wrong += [] if shape == wanted else [f"{name} {list(shape)} (expected {list(wanted)})"]
                    wrong += [] if dtype in FLOATS else [f"{name} in {dtype}"]
    if embedding and embedding not in found and getattr(model.config, "tie_word_embeddings", False):
        # A checkpoint whose head is tied to the embedding may hold the weight only under the head's name.
        alike = [found[name] for name in heads if name in found and found[name].shape == expected[embedding]]
        if len(alike) == 1:
            found[embedding] = alike[0]
    note = check_found(
        type(model).__name__,
        head,
        missing=expected.keys() - found.keys() - replaced,
        unexpected=unexpected,
        wrong=wrong,
        head_files=others,
    )
    return StoredWeights({name: found[name] for name in expected if name in found}), note


def head_files(name: str, revision: str | None) -> list[str]:
    """The files of a model, here or on the hub, that hold the head of another trainer next to the model's own."""
    quiet: dict[str, Any] = {
        f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")
    }
    return [file for file in HEAD_FILES if cached_file(name, file, revision=revision, **quiet) is not None]
