"""A file scored in parts: finished chunks on disk, so that a restart scores only the missing ones."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmcore import __version__
from rmcore.config import UserError
from rmcore.host.faults import fault
from rmcore.parallel.world import World
from rmcore.scoring.files import PlacedRow
from rmcore.scoring.scorer import Scorer

STANDARD = "-"


def prepare_parts(parts: Path, scorer: Scorer, rows: str) -> None:
    """The directory of finished chunks: kept when it is of the same model, rows and settings, else made anew."""
    from rmcore.host.files import write_text_atomically

    label = parts / "of.json"
    if rows == STANDARD:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        with open(_source(rows, parts), "wb") as spool:
            shutil.copyfileobj(sys.stdin.buffer, spool)
        return
    text = json.dumps(fingerprint(scorer, rows), sort_keys=True)
    if not label.is_file() or label.read_text(encoding="utf-8") != text:
        shutil.rmtree(parts, ignore_errors=True)
        write_text_atomically(label, text)


def fingerprint(scorer: Scorer, rows: str) -> dict[str, Any]:
    """What a stopped run must have in common with the one that goes on with its chunks."""
    from rmcore.scoring.files import CHUNK_CHARACTERS, CHUNK_ROWS

    sizes = {}
    for path in (Path(rows), *sorted(Path(scorer.name).glob("*"))):
        if path.is_file():
            sizes[str(path)] = [path.stat().st_size, path.stat().st_mtime_ns]
    return {"rmcore": __version__, "chunks": [CHUNK_ROWS, CHUNK_CHARACTERS], "files": sizes, **scorer.settings()}


def score_parts(scorer: Scorer, source: Path, parts: Path, world: World) -> None:
    """This rank's chunks, each into a file of its own: for every row {"rewards": [...], "single": ...}."""
    from rmcore.scoring.files import chunks, read_rows

    try:
        for number, chunk in enumerate(chunks(read_rows(source))):
            if number == 0:
                scorer.choose_path(chunk)  # on the same rows on every rank and after every stop
            if number % world.size == world.rank and not _part(parts, number).exists():
                _write_part(_part(parts, number), scorer, chunk)
    except UserError as error:
        error.only_this_rank = True
        raise


def _write_part(part: Path, scorer: Scorer, chunk: list[PlacedRow]) -> None:
    from rmcore.host.files import write_text_atomically

    found = scorer.rewards(chunk)
    fault("score.part")
    lines = [json.dumps({"rewards": one.rewards, "single": one.single}) for one in found]
    write_text_atomically(part, "\n".join(lines) + "\n")


def everyone_done(world: World) -> None:
    """Wait for all ranks. Raises RankError when one of them has left: it has said why."""
    from rmcore.parallel.world import RankError, barrier

    try:
        barrier(world)
    except RuntimeError as error:
        stopped = RankError("another rank has stopped; what was finished is kept")
        stopped.only_this_rank = True  # the other rank may have been killed without a message
        raise stopped from error


def finish(parts: Path, source: Path, target: Path) -> tuple[int, int]:
    """The rows joined with the rewards of all chunks, under their own name at once; (rows, texts without a reward)."""
    from rmcore.host.files import fsync_directory
    from rmcore.scoring.files import write_scored

    results = Results(parts)
    whole = parts / f"whole-{target.name}"
    write_scored(whole, source, results)
    handle = os.open(whole, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(whole, target)
    fsync_directory(target.parent)
    rows, unscored = 0, 0
    for result in results:
        rows, unscored = rows + 1, unscored + result["rewards"].count(None)
    shutil.rmtree(parts)
    return rows, unscored


class Results:
    """The results of all chunks in order, as often as they are asked for."""

    def __init__(self, parts: Path) -> None:
        self._parts = parts

    def __iter__(self):  # type: ignore[no-untyped-def]
        number = 0
        while (part := _part(self._parts, number)).exists():
            with open(part, encoding="utf-8") as lines:
                for line in lines:
                    result: Mapping[str, Any] = json.loads(line)
                    yield result
            number += 1


def _part(parts: Path, number: int) -> Path:
    return parts / f"{number:08d}.jsonl"


def _source(rows: str, parts: Path) -> Path:
    return parts / "input.jsonl" if rows == STANDARD else Path(rows)
