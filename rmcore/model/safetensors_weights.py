"""Finds the weights of a checkpoint in its safetensors files, so that single rows of them can be read.

Input: a directory or hub id with safetensors files, and the names and shapes that a model expects.
Output: `StoredWeights`, which fills tensors with rows; or one error that lists all weights that are missing, unexpected
or of another shape.
Example: `gpt_neox.layers.3.mlp.dense_h_to_4h.weight` [8192, 2048] of pythia-1b lies in the second of three files. Rank
2 of 4 reads its rows 4096 to 6143, 8 MiB of bf16, and no other byte of that weight.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from rmcore.config import UserError
from rmcore.host.model_directory import indexed_files
from rmcore.model.conversion import CannotConvert, Conversion
from rmcore.model.found_weights import HEAD_FILES, SCORE, check_found

WantedRows = Mapping[str, tuple[int, Tensor]]  # name -> (first row, the rows to fill, on any device)
FLOATS = ("F64", "F32", "F16", "BF16")
# Older checkpoints hold these buffers; today's models compute them, and transformers ignores them too.
COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


class StoredTensor(NamedTuple):
    """Rows of one tensor of a checkpoint: its file, its name in the file, their shape, and where they begin.

    `turned`: the dimensions that the file has the other way round; `shape` is the one after the swap.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    begin: int = 0
    turned: tuple[int, int] | None = None


class StoredExperts(NamedTuple):
    """A weight whose row e holds expert e: `parts[e]`, one over the other, each a tensor of its own."""

    parts: tuple[tuple[StoredTensor, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0]
        return (len(self.parts), sum(part.shape[0] for part in first), *first[0].shape[1:])


class Copy(NamedTuple):
    """Rows of a stored tensor, from `first` on, that go into `rows`; a number without rows goes there whole."""

    source: StoredTensor
    first: int
    rows: Tensor


class StoredWeights:
    """The weights of a checkpoint under the names that the model gives them."""

    def __init__(self, entries: Mapping[str, StoredTensor | StoredExperts]) -> None:
        self._entries = entries

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight in the checkpoint."""
        return self._entries[name].shape

    def fill(self, wanted: WantedRows) -> None:
        """Read the wanted rows, file by file, and nothing else. Raises UserError when a file has become unreadable."""
        by_file: dict[Path, list[Copy]] = {}
        for name, (first, rows) in wanted.items():
            for copy in _copies(self._entries[name], first, rows):
                by_file.setdefault(copy.source.path, []).append(copy)
        for path, copies in by_file.items():
            try:
                with safe_open(path, framework="pt") as file:
                    for source, first, rows in copies:
                        if rows.ndim:
                            begin = source.begin + first
                            stored = file.get_slice(source.key)[begin : begin + rows.shape[0]]
                            rows.copy_(stored.transpose(*source.turned) if source.turned else stored)
                        else:
                            rows.copy_(file.get_tensor(source.key))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read: {error}") from None


def _copies(entry: StoredTensor | StoredExperts, first: int, rows: Tensor) -> Iterator[Copy]:
    if not rows.numel():
        return
    if isinstance(entry, StoredTensor):
        yield Copy(entry, first, rows)
        return
    for row, parts in zip(rows, entry.parts[first : first + rows.shape[0]], strict=True):
        begin = 0
        for part in parts:
            yield Copy(part, 0, row[begin : begin + part.shape[0]])
            begin += part.shape[0]


def _turned(shape: tuple[int, ...], dimensions: tuple[int, int] | None) -> tuple[int, ...]:
    return shape if dimensions is None else tuple(torch.empty(shape, device="meta").transpose(*dimensions).shape)


def weight_files(name: str, revision: str | None) -> list[Path] | None:
    """The safetensors files of a model, fetched from the hub where needed; None when the model has none.

    Raises UserError, OSError or ValueError: the index is broken, or the hub cannot be reached.
    """
    known: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    index = cached_file(name, "model.safetensors.index.json", **known)
    if index is None:
        single = cached_file(name, "model.safetensors", **known)
        return [Path(single)] if single is not None else None
    return [Path(str(cached_file(name, file, revision=revision))) for file in indexed_files(Path(index))]


def check_indices(name: str, revision: str | None) -> None:
    """Raises UserError if an index that transformers will read, here or on the hub, lists files outside its directory.

    A hub that cannot be reached is left to transformers to report.
    """
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    for file in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        index = cached_file(name, file, revision=revision, **quiet)
        if index is not None:
            indexed_files(Path(index))


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
        CannotConvert: transformers makes a weight of several others in a way that needs them whole.
        UserError: weights are missing, unexpected, or have another shape or type; one message lists them all.
        OSError, SafetensorError: a file is not a safetensors file.
    """
    replaced = {SCORE} if head == "fresh" else set()
    state = model.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    numbers = {name for name, tensor in state.items() if not tensor.is_floating_point()}  # of integers
    found: dict[str, StoredTensor | StoredExperts] = {}
    experts: dict[str, dict[int, dict[int, StoredTensor]]] = {}  # weight -> expert -> part
    conversion = Conversion(model)
    unexpected, wrong = [], []
    ignored = re.compile("|".join([*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *COMPUTED]))
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                stored = file.get_slice(key)
                whole, dtype = tuple(stored.get_shape()), stored.get_dtype()
                for name, expert, part, (piece, pieces), turned in conversion.targets(key):
                    turned = None if whole == expected.get(name) else turned
                    shape = _turned(whole, turned) if pieces == 1 else (whole[0] // pieces, *whole[1:])
                    tensor = StoredTensor(path, key, shape, piece * shape[0] if pieces > 1 else 0, turned)
                    if name not in expected and name not in heads:
                        unexpected += [] if ignored.search(key) else [key]
                        continue
                    if expert is not None:
                        experts.setdefault(name, {}).setdefault(expert, {})[part] = tensor
                        wrong += [] if dtype in FLOATS else [f"{key} in {dtype}"]
                        continue
                    found[name] = tensor
                    if name in expected and name not in replaced:
                        wanted = expected[name]
                        wrong += [] if shape == wanted else [f"{name} {list(shape)} (expected {list(wanted)})"]
                        wrong += [] if dtype in FLOATS or name in numbers else [f"{name} in {dtype}"]
    for name, by_expert in experts.items():
        fused = StoredExperts(
            tuple(tuple(tensor for _, tensor in sorted(parts.items())) for _, parts in sorted(by_expert.items()))
        )
        shapes = {tuple(part.shape for part in parts) for parts in fused.parts}
        found[name] = fused
        wrong += [] if len(shapes) == 1 and fused.shape == expected[name] else [f"the experts of {name}"]
    if embedding and embedding not in found and getattr(model.config, "tie_word_embeddings", False):
        # A checkpoint whose head is tied to the embedding may hold the weight only under the head's name.
        alike = [found[name] for name in heads if name in found and found[name].shape == expected[embedding]]
        if len(alike) == 1:
            found[embedding] = alike[0]
    missing = expected.keys() - found.keys() - replaced
    drawn = re.compile("|".join(getattr(model, "_keys_to_ignore_on_load_missing", None) or ["$^"]))
    for name in sorted(filter(drawn.search, missing)):
        raise CannotConvert(f"transformers itself makes {name}, which the checkpoint does not hold")
    note = check_found(
        type(model).__name__,
        head,
        missing=missing,
        unexpected=unexpected,
        wrong=wrong,
        head_files=others,
        holds_score=SCORE in found,
    )
    return StoredWeights({name: found[name] for name in expected if name in found}), note


def head_files(name: str, revision: str | None) -> list[str]:
    """The files of a model, here or on the hub, that hold the head of another trainer next to the model's own."""
    quiet: dict[str, Any] = {
        f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")
    }
    return [file for file in HEAD_FILES if cached_file(name, file, revision=revision, **quiet) is not None]
