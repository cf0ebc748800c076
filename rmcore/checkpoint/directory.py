"""Names on disk: `checkpoints/step-N`, made whole or not at all. Rank 0 alone works here.

    .tmp-step-8      being written; after a crash it is swept at the next start
    step-8           whole: every file and the directory were synced before it got this name
    .trash-step-4    on its way out: a deletion that is cut short never leaves half a checkpoint behind
    bad-step-12      failed verification; kept for people, with why.txt, never used again
    undone-step-12   the user went back to an earlier one; kept likewise

Example: commit(root, 8) renames .tmp-step-8 to step-8 and syncs the parent; only then retire(root, keep={8, 4})
deletes.
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
    """Where checkpoint `step` is written."""
    return root / f".tmp-step-{step}"


def begin(root: Path, step: int) -> Path:
    """Make the directory to write into. Raises OSError; FileExistsError where `step-N` is there already."""
    root.mkdir(parents=True, exist_ok=True)
    if (root / f"step-{step}").exists():
        raise FileExistsError(f"{root / f'step-{step}'} exists already")
    path = temporary(root, step)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


def commit(root: Path, step: int) -> Path:
    """All files are synced: sync the directory, give it its name, sync the parent."""
    final = root / f"step-{step}"
    fsync_directory(temporary(root, step))
    fault("save.rename")
    os.rename(temporary(root, step), final)
    fault("save.parent")
    fsync_directory(root)
    return final


def steps(root: Path) -> list[int]:
    """The steps that there are checkpoints of, newest first."""
    if not root.is_dir():
        return []
    found = (NAME.fullmatch(path.name) for path in root.iterdir() if path.is_dir())
    return sorted((int(match.group(1)) for match in found if match), reverse=True)


def retire(root: Path, keep: Iterable[int]) -> list[int]:
    """Delete all checkpoints but those in `keep`; returns what went."""
    gone = [step for step in steps(root) if step not in set(keep)]
    for step in gone:
        fault("retain.trash")
        os.rename(root / f"step-{step}", root / f".trash-step-{step}")
    if gone:
        fsync_directory(root)
    for step in gone:
        fault("retain.delete")
        shutil.rmtree(root / f".trash-step-{step}", ignore_errors=True)
    return gone


def sweep(root: Path) -> list[str]:
    """Remove what a crash left half written or half deleted; returns the names."""
    left = sorted([*root.glob(".tmp-step-*"), *root.glob(".trash-step-*")]) if root.is_dir() else []
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in left]


def quarantine(path: Path, reason: str, word: str = "bad") -> str:
    """Move a checkpoint aside and say in it why; returns its name now."""
    aside, number = path.with_name(f"{word}-{path.name}"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{word}-{path.name}.{number}")
    os.rename(path, aside)
    fsync_directory(path.parent)
    write_text_atomically(aside / "why.txt", reason + "\n")
    return aside.name


def move_aside(root: Path) -> Path | None:
    """A run that starts from zero keeps the checkpoints of a former one: checkpoints -> checkpoints.1, .2, ..."""
    if not root.is_dir() or not any(root.iterdir()):
        return None
    number = 1
    while (aside := root.with_name(f"{root.name}.{number}")).exists():
        number += 1
    os.rename(root, aside)
    return aside
