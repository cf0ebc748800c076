"""Keeps the rewards of finished chunks on disk, so that a restart scores only the missing ones.

Input: a scorer, the file of rows, a directory. Output: one file per chunk, and in the end OUT with all rows.
Example: 2,500 rows in 3 chunks on 2 ranks: rank 0 writes OUT.parts/00000000.jsonl and 00000002.jsonl, rank 1
00000001.jsonl, and rank 0 joins them with the rows into OUT.

OUT.parts/of.json describes model, rows and settings. A restart whose description differs begins from an empty
directory.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rmcore import __version__
from rmcore.config import UserError
from rmcore.host.faults import fault
from rmcore.host.files import fsync_directory, write_text_atomically
from rmcore.parallel.world import RankError, World, barrier
from rmcore.scoring import files
from rmcore.scoring.files import PlacedRow, chunks, read_rows, write_scored
from rmcore.scoring.scorer import Scorer

STANDARD = "-"  # in place of a file: standard input or output


def prepare_parts(parts: Path, scorer: Scorer, rows: str) -> None:
    """Make the directory of finished chunks. It is kept if model, rows and settings are the same, else emptied.

    Standard input is copied into it.
    """
    if rows == STANDARD:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        with open(source_file(rows, parts), "wb") as spool:
            shutil.copyfileobj(sys.stdin.buffer, spool)
        return
    label = parts / "of.json"
    text = json.dumps(fingerprint(scorer, rows), sort_keys=True)
    if not label.is_file() or label.read_text(encoding="utf-8") != text:
        shutil.rmtree(parts, ignore_errors=True)
        write_text_atomically(label, text)


def fingerprint(scorer: Scorer, rows: str) -> dict[str, Any]:
    """What must not change between a stopped run and the run that continues with its chunks."""
    sizes = {}
    for path in (Path(rows), *sorted(Path(scorer.name).glob("*"))):
        if path.is_file():
            sizes[str(path)] = [path.stat().st_size, path.stat().st_mtime_ns]
    chunk = [files.CHUNK_ROWS, files.CHUNK_CHARACTERS]
    return {"rmcore": __version__, "chunks": chunk, "files": sizes, **scorer.settings()}


def score_parts(scorer: Scorer, source: Path, parts: Path, world: World) -> None:
    """Score this rank's chunks, each into its own file: {"rewards": [...], "single": ...} per row."""
    try:
        for number, chunk in enumerate(chunks(read_rows(source))):
            if number == 0:
                scorer.choose_path(chunk)  # the same rows on every rank and after every restart
            if number % world.size == world.rank and not part_file(parts, number).exists():
                _write_part(part_file(parts, number), scorer, chunk)
    except UserError as error:
        error.only_this_rank = True  # only this rank has read the row
        raise


def _write_part(part: Path, scorer: Scorer, chunk: list[PlacedRow]) -> None:
    scored = scorer.rewards(chunk)
    fault("score.part")
    lines = [json.dumps({"rewards": row.rewards, "single": row.single, "pair": row.pair}) for row in scored]
    write_text_atomically(part, "\n".join(lines) + "\n")


def wait_for_all(world: World) -> None:
    """Wait for all ranks. Raises RankError if one of them has stopped; that rank has printed the reason."""
    try:
        barrier(world)
    except RuntimeError as error:
        stopped = RankError("another rank has stopped; the finished chunks are kept")
        stopped.only_this_rank = True  # the other rank may have been killed without a message
        raise stopped from error


def finish(parts: Path, source: Path, target: Path) -> tuple[int, int]:
    """Join the rows with the rewards of all chunks into `target`; return the counts of rows and of missing rewards.

    The file gets its name once it is complete and on disk. Then the parts are removed.
    """
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
    """The results of all chunks in order; can be iterated repeatedly."""

    def __init__(self, parts: Path) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        number = 0
        while (part := part_file(self._parts, number)).exists():
            with open(part, encoding="utf-8") as lines:
                for line in lines:
                    yield json.loads(line)
            number += 1


def part_file(parts: Path, number: int) -> Path:
    """The file of the rewards of a chunk."""
    return parts / f"{number:08d}.jsonl"


def source_file(rows: str, parts: Path) -> Path:
    """The file of rows; for standard input its copy."""
    return parts / "input.jsonl" if rows == STANDARD else Path(rows)
