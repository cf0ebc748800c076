"""Scores a file of rows: loads the model, scores each rank's chunks, joins them.

Input: the name of a model, a file of rows (or `-`), where to write. Output: the rows with their rewards.
Example: `rmcore score runs/hh/model rows.jsonl -o out.jsonl` on 3,000 rows: out.jsonl with 3,000 rows, (3000, 0).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rmcore.config import UserError
from rmcore.data.tokens.build import MOST_UNREAD
from rmcore.host.terminal import print_text
from rmcore.parallel.precision import bf16_of_all
from rmcore.parallel.world import World, all_gather_json, first_error
from rmcore.scoring.files import check_input, check_output, chunks, json_line, read_rows, with_rewards
from rmcore.scoring.parts import STANDARD, finish, prepare_parts, score_parts, source_file, wait_for_all
from rmcore.scoring.scorer import Scorer


def score(
    world: World, model: str, rows: str, out: str, overrides: Sequence[str] = (), normalise: bool = False
) -> tuple[int, int]:
    """Score all rows; return (rows written, texts without a reward) on rank 0, zeros on the others. A collective.

    Raises UserError for a model, rows or files that cannot be used. The rank that reads a bad row prints it.
    """

    bf16 = bf16_of_all(world)

    def start() -> Scorer:
        check_files(rows, out, world.size)
        return Scorer(model, overrides, normalise=normalise, bf16=bf16)

    scorer = first_error(world, "loading the model", start)
    for line in scorer.notes if world.is_main else []:
        print_text(f"rmcore score: {line}", sys.stderr)
    if out == STANDARD:
        counts = score_stream(scorer, rows, sys.stdout.buffer)
        _report_unread([scorer.unread], world)
        return counts
    parts = Path(f"{out}.parts")

    def prepare() -> None:
        if world.is_main:
            with explained(out):
                prepare_parts(parts, scorer, rows)

    with explained(out):
        first_error(world, "preparing", prepare)
        score_parts(scorer, source_file(rows, parts), parts, world)
        wait_for_all(world)
        _report_unread(all_gather_json(world, scorer.unread), world)
        return finish(parts, source_file(rows, parts), Path(out)) if world.is_main else (0, 0)


@contextmanager
def explained(out: str) -> Iterator[None]:
    """Within, a file that cannot be read or written raises UserError; `out` stands for one without a name."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be read or written: {error.strerror or error}") from None


def _report_unread(counts: Sequence[Mapping[str, int]], world: World) -> None:
    """Prints on rank 0 what of the rows' content is not read; of a restarted run, for the chunks scored now."""
    total = sum(map(Counter, counts), Counter[str]())
    for what, rows in total.most_common(MOST_UNREAD) if world.is_main else ():
        print_text(f"warning: content that is not read, in {rows:,} rows: {what}", sys.stderr)


def check_files(rows: str, out: str, ranks: int) -> None:
    """Raises UserError for files that cannot be read or written, before the model is loaded."""
    if rows != STANDARD:
        check_input(Path(rows))
    if out == STANDARD or rows == STANDARD:
        if ranks > 1:
            raise UserError("standard input and output need a single process: give files, or start without torchrun")
    elif Path(out).resolve() == Path(rows).resolve():
        raise UserError(f"{out} is the input and would be overwritten: give another file")
    if out != STANDARD:
        check_output(Path(out))


def score_stream(scorer: Scorer, rows: str, stream: BinaryIO) -> tuple[int, int]:
    """Write JSON lines to a stream, chunk by chunk. Nothing is kept, so a restart begins with the first row."""
    count = unscored = 0
    for number, chunk in enumerate(chunks(read_rows(None if rows == STANDARD else Path(rows)))):
        if number == 0:
            scorer.choose_path(chunk)
        for (row, _), scored in zip(chunk, scorer.rewards(chunk), strict=True):
            given = scored.rewards, scored.single, scored.pair, scored.probabilities
            stream.write(json_line(with_rewards(row, *given)))
            unscored += scored.rewards.count(None)
        stream.flush()
        count += len(chunk)
    return count, unscored
