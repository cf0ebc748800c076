"""Creates, renames and deletes the directories of checkpoints, so that `checkpoints/step-N` is always complete.

Input: the directory `checkpoints` of a run, and step numbers. Only rank 0 calls these functions.
Output: directories with these names:

    .tmp-step-8      is being written; after a crash the next start deletes it
    step-8           is complete: every file and the directory were synced before they got this name
    .trash-step-4    is being deleted: an interrupted deletion never leaves a damaged step-4 behind
    bad-step-12      failed verification; kept for people with the reason in why.txt, never used again
    undone-step-12   the user went back to an earlier step; kept in the same way

Example: commit(root, 8) renames .tmp-step-8 to step-8 and syncs the parent. Only then retire(root, keep={8, 4}) deletes
the others.
"""

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from rmcore.host.faults import fault
from rmcore.host.files import fsync_directory, write_text_atomically

NAME = re.compile(r"step-(0|[1-9]\d*)")


def temporary(root: Path, step: int) -> Path:
    """The directory in which checkpoint `step` is written."""
    return root / f".tmp-step-{step}"


def begin(root: Path, step: int) -> Path:
    """Make the directory to write into. Raises OSError, and FileExistsError if `step-N` exists already."""
    root.mkdir(parents=True, exist_ok=True)
    if (root / f"step-{step}").exists():
        raise FileExistsError(f"{root / f'step-{step}'} exists already")
    path = temporary(root, step)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


def commit(root: Path, step: int) -> Path:
    """Call it when all files are synced: syncs the directory, renames it, syncs the parent."""
    final = root / f"step-{step}"
    fsync_directory(temporary(root, step))
    fault("save.rename")
    os.rename(temporary(root, step), final)
    fault("save.parent")
    fsync_directory(root)
    return final


def steps(root: Path) -> list[int]:
    """The steps that have a checkpoint, newest first."""
    if not root.is_dir():
        return []
    found = (NAME.fullmatch(path.name) for path in root.iterdir() if path.is_dir())
    return sorted((int(match.group(1)) for match in found if match), reverse=True)


def retire(root: Path, keep: Iterable[int]) -> list[int]:
    """Delete all checkpoints except those in `keep`; returns the deleted steps."""
    deleted = [step for step in steps(root) if step not in set(keep)]
    for step in deleted:
        fault("retain.trash")
        os.rename(root / f"step-{step}", root / f".trash-step-{step}")
    if deleted:
        fsync_directory(root)
    for step in deleted:
        fault("retain.delete")
        shutil.rmtree(root / f".trash-step-{step}", ignore_errors=True)
    return deleted


def sweep(root: Path) -> list[str]:
    """Delete what a crash left half written or half deleted; returns the names."""
    leftovers = sorted([*root.glob(".tmp-step-*"), *root.glob(".trash-step-*")]) if root.is_dir() else []
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in leftovers]


def quarantine(path: Path, reason: str, word: str = "bad") -> str:
    """Rename a checkpoint to WORD-NAME and write the reason into it; returns the new name."""
    aside, number = path.with_name(f"{word}-{path.name}"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{word}-{path.name}.{number}")
    os.rename(path, aside)
    fsync_directory(path.parent)
    write_text_atomically(aside / "why.txt", reason + "\n")
    return aside.name


def move_aside(root: Path) -> Path | None:
    """Keep the checkpoints of a former run when a new one starts at step 0: checkpoints -> checkpoints.1, .2, ..."""
    if not root.is_dir() or not any(root.iterdir()):
        return None
    number = 1
    while (aside := root.with_name(f"{root.name}.{number}")).exists():
        number += 1
    os.rename(root, aside)
    return aside
