"""Refuses local model directories that transformers would misread or explain badly.

Input: the name of a model. Output: nothing, or a UserError.
Example: a clone without Git LFS -> "model.name m: m/model.safetensors is a Git LFS pointer, not the file itself: run
`git lfs pull` in m". Hub ids pass: the hub's client downloads the files themselves.
"""

import json
import os
from pathlib import Path

from rmcore.host.command import UserError

LFS = b"version https://git-lfs"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # of peft
LORA_BASE = "lora_base"  # in `rmcore` of config.json: marks an adapter that rmcore exported
RUN, CHECKPOINT = "run_status.json", "manifest.json"  # mark directories that rmcore wrote for runs, not for models
READ = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt")  # weights, configs and tokenizers


def check_model_directory(name: str) -> None:
    """Raises UserError for Git LFS pointers, an index that leaves the directory, an adapter of another program, adapter
    files next to weights, and the directories of a run and a checkpoint."""
    folder = Path(name)
    if not folder.is_dir():
        return
    _refuse_run(folder)
    for pattern in READ:
        for file in sorted(folder.glob(pattern)):
            refuse_lfs_pointer(file, f"model.name {name}: ")
    for index in sorted(folder.glob("*.index.json")):
        indexed_files(index, f"model.name {name}: ")
    adapter = folder / ADAPTER
    if not adapter.is_file() or is_own_adapter(folder):
        return
    if (folder / "config.json").is_file():
        raise UserError(
            f"model.name {name}: transformers would add the adapter in {adapter} to the weights next to it; merge the "
            "two (peft: merge_and_unload), or move adapter_config.json away to train without the adapter"
        )
    raise UserError(
        f"model.name {name} is an adapter of {_base(adapter)}, not a model; merge the two (peft: merge_and_unload, "
        "then save_pretrained; of a reward model: `rmcore convert DIR -o DIR`) and give the directory of the result"
    )


def _refuse_run(folder: Path) -> None:
    if (folder / "config.json").exists():
        return
    if (folder / RUN).is_file() and (folder / "model" / "config.json").is_file():
        raise UserError(f"model.name {folder} is the directory of a run; give that of its model: {folder / 'model'}")
    for mark, kind in ((RUN, "a run without an exported model"), (CHECKPOINT, "a checkpoint")):
        if (folder / mark).is_file():
            raise UserError(
                f"model.name {folder} is the directory of {kind}: `rmcore export {folder} -o DIR` makes a model of it"
            )


def refuse_missing_directory(name: str) -> None:
    """Raises UserError if the name of a model is a path, and not the id of a repository, and no directory is there."""
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not os.path.isdir(name):
        raise UserError(f"model.name={name}: there is no such directory (looked in {os.getcwd()})")


def refuse_lfs_pointer(file: Path, where: str = "") -> None:
    """Raises UserError, which begins with `where`, if the file is the pointer that Git LFS leaves in its place."""
    try:
        with open(file, "rb") as stream:
            start = stream.read(len(LFS))
    except OSError:
        return  # whoever reads the file reports this
    if start == LFS:
        raise UserError(f"{where}{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in {file.parent}")


def indexed_files(index: Path, where: str = "") -> list[str]:
    """The names of the files of weights that an index (model.safetensors.index.json) lists, sorted.

    Raises UserError, which begins with `where`, if it is not an index, or lists a file outside its directory.
    """
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}{index} is not an index of weights: {type(error).__name__}") from None
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name or name in ("", "..")]
    if outside:
        raise UserError(f"{where}{index} refers to a file outside its directory: {min(map(repr, outside))[:200]}")
    return sorted(names)


def is_own_adapter(folder: Path) -> bool:
    """Whether rmcore exported the adapter: its config.json describes the whole model, whose weights are elsewhere."""
    try:
        own = json.loads((folder / "config.json").read_bytes()).get("rmcore")
    except (OSError, ValueError, AttributeError):
        return False
    weights = [file for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind)]
    return isinstance(own, dict) and LORA_BASE in own and [file.name for file in weights] == [ADAPTER_WEIGHTS]


def _base(adapter: Path) -> str:
    try:
        return str(json.loads(adapter.read_bytes())["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return "another model"
