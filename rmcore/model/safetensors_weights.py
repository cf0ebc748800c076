"""Where the weights of a checkpoint lie, so that any rows of any of them can be read alone.

Enters: a directory or hub id with safetensors files, the names and shapes that a model expects. Leaves: `Stored`, which
fills tensors with rows; or one message that lists what is missing, too much or of another shape.

Example: pythia-1b's index says that `gpt_neox.layers.3.mlp.dense_h_to_4h.weight` [8192, 2048] lies in the second of
three files; rank 2 of 4 reads its rows 4096 to 6144, 16 MB of bf16, and no other byte of that weight.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.utils import cached_file

from rmcore.config import UserError

Wanted = Mapping[str, tuple[int, Tensor]]  # name -> first row, rows to fill, on any device
FLOATS = ("F64", "F32", "F16", "BF16")
SHOWN = 5  # names in a message
# Buffers that older checkpoints hold and today's models compute (transformers ignores them too).
COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


class Entry(NamedTuple):
    """One tensor of a checkpoint: its file, its name there, its shape."""

    path: Path
    key: str
    shape: tuple[int, ...]


class Stored:
    """The weights of a checkpoint under the model's names."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = entries

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the checkpoint has it in."""
        return self._entries[name].shape

    def fill(self, wanted: Wanted) -> None:
        """Read the rows that are wanted, file by file, and nothing else. Raises UserError: a file became unreadable."""
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
    """The safetensors files of a model, on this machine or fetched to it; None when it has none.

    Raises OSError, ValueError, KeyError: the index is broken, or the hub cannot be reached.
    """
    known: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    index = cached_file(name, "model.safetensors.index.json", **known)
    if index is None:
        single = cached_file(name, "model.safetensors", **known)
        return [Path(single)] if single is not None else None
    listed = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    if any(Path(file).name != file for file in listed):
        raise ValueError(f"{index} names a file outside its directory")
    return [Path(str(cached_file(name, file, revision=revision))) for file in listed]


def is_rewritten(hf_config: PretrainedConfig) -> bool:
    """Whether transformers rearranges the weights of this architecture while it loads them (fused experts)."""
    return bool(get_checkpoint_conversion_mapping(hf_config.model_type)) or hasattr(hf_config, "quantization_config")


def open_stored(
    files: Iterable[Path], model: PreTrainedModel, heads: set[str], replaced: set[str], grown: str | None = None
) -> Stored:
    """The checkpoint's weights under the names of `model`, of which nothing but names and shapes is looked at.

    Args:
        heads: names of another head (the language model's), which may be there and are left alone.
        replaced: names of weights that are not read, whatever the checkpoint has of them.
        grown: name of the embedding, which may have fewer rows in the checkpoint than in the model.
    Raises:
        UserError: names missing or unexpected, shapes or types that do not fit, all in one message.
        OSError, SafetensorError: a file is no safetensors file.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, Entry] = {}
    strangers, wrong = [], []
    ignored = re.compile("|".join([*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *COMPUTED]))
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                stored = file.get_slice(key)
                shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
                name = next((n for n in (key, f"{model.base_model_prefix}.{key}") if n in expected or n in heads), None)
                if name is None:
                    strangers += [] if ignored.search(key) else [key]
                    continue
                found[name] = Entry(path, key, shape)
                if name in expected and name not in replaced:
                    fits = shape == expected[name] or (name == grown and shape[1:] == expected[name][1:])
                    wrong += [] if fits else [f"{key} {list(shape)} (expected {list(expected[name])})"]
                    wrong += [] if dtype in FLOATS else [f"{key} in {dtype}"]
    _take_embedding_of_head(found, expected, heads, model, grown)
    missing = sorted(expected.keys() - found.keys() - replaced)
    _complain(type(model).__name__, missing, sorted(strangers), wrong)
    return Stored({name: found[name] for name in expected if name in found})


def _take_embedding_of_head(
    found: dict[str, Entry],
    expected: Mapping[str, tuple[int, ...]],
    heads: set[str],
    model: PreTrainedModel,
    grown: str | None,
) -> None:
    """A checkpoint whose head is tied to the embedding may name the head alone."""
    if grown and grown not in found and getattr(model.config, "tie_word_embeddings", False):
        alike = [found[name] for name in heads if name in found and found[name].shape[1:] == expected[grown][1:]]
        if len(alike) == 1:
            found[grown] = alike[0]


def complaint(what: str, names: list[str]) -> list[str]:
    """ "it lacks a, b and 3 more", or nothing."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{what} {', '.join(names[:SHOWN])}{more}"] if names else []


def _complain(model_class: str, missing: list[str], strangers: list[str], wrong: list[str]) -> None:
    found = [
        *complaint(f"the checkpoint lacks weights of {model_class}:", missing),
        *complaint(f"it holds weights that {model_class} has not:", strangers),
        *complaint("of another shape or type:", wrong),
    ]
    if found:
        hint = "set model.head=fresh to draw one" if missing == ["score.weight"] else "is it the right checkpoint?"
        raise UserError(f"{'; '.join(found)}; {hint}")
