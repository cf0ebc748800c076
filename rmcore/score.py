"""`rmcore score MODEL IN -o OUT`: the rewards of texts, by the forward that training uses.

In: a reward model's directory and rows (JSON lines, JSON, CSV, also .gz or .zst, Parquet, or `-`: standard input), each
    {"prompt": text or turns, "answers": [text or turns, ...]}   -> "rewards", one an answer, and "best" (0 based)
    {"prompt": ..., "answer": ...}                               -> "reward"
    {"chosen": ..., "rejected": ...}, with or without "prompt"   -> "rewards" (chosen, rejected) and "best"
    {"messages": [turns]}                                        -> "reward"
    {"text": rendered text}, {"texts": [...]}                    -> "reward"; "rewards" and "best"
Out: the same rows in the same order with those keys added, as JSON lines (also .gz or .zst) or Parquet; `-`: standard
output. `responses` and `completions` may stand for `answers`. A text that exceeds the model's positions gets null.

Example: {"prompt": "2+2?", "answers": ["4", "5"]} -> {..., "rewards": [1.25, -0.5], "best": 0}.

Rows are read as a stream and scored in chunks that depend on the rows alone. Each prompt of a chunk is computed once
for all its answers, and nothing is padded. Rank r of R (torchrun) scores the chunks r, r + R, ... and each finished
chunk is one file in OUT.parts: a run that was stopped goes on with those that lack, on any number of ranks, and OUT is
the same to the byte.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from rmcore.config import UserError
from rmcore.host.command import run_command
from rmcore.scoring.parts import STANDARD, _source, everyone_done, finish, prepare_parts, score_parts

if TYPE_CHECKING:
    from rmcore.parallel.world import World
    from rmcore.scoring.scorer import Scorer

PATIENCE = 7 * 24 * 3600.0  # seconds that a rank waits for the others to finish their chunks


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 1 failed while running, 2 refused (model, rows, files)."""
    parser = argparse.ArgumentParser(
        prog="rmcore score",
        description="Rewards of texts: a prompt with any number of answers, or whole texts.",
        epilog="Rows: prompt and answers (or answer), chosen and rejected, messages, text or texts. "
        "Under torchrun each rank scores its share. A run that was stopped goes on where it was.",
    )
    parser.add_argument("model", metavar="MODEL", help="directory or hub id of a reward model")
    parser.add_argument(
        "rows", metavar="IN", help="rows: .jsonl, .json, .csv (also .gz, .zst), .parquet, or -: JSON lines from stdin"
    )
    parser.add_argument(
        "-o", "--out", metavar="OUT", required=True,
        help="the rows with their rewards: JSON lines (also .gz, .zst), .parquet, or -: stdout",
    )  # fmt: skip
    parser.add_argument(
        "--normalise", action="store_true", help="rewards by the mean and deviation stored in MODEL/config.json"
    )
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="data.template=..., parallel.precision=fp32, ..."
    )
    given = parser.parse_intermixed_args(argv)
    from rmcore.parallel.world import running_world

    def work() -> None:
        with running_world(PATIENCE) as world:
            count, unscored = score(world, given.model, given.rows, given.out, given.overrides, given.normalise)
        if world.is_main:
            note = f"; {unscored:,} texts exceed the model's positions and have no reward" if unscored else ""
            stream = sys.stderr if given.out == STANDARD else sys.stdout
            print(f"{count:,} rows written to {given.out}{note}", file=stream)

    return run_command("rmcore score", work)


def score(
    world: World, model: str, rows: str, out: str, overrides: Sequence[str] = (), normalise: bool = False
) -> tuple[int, int]:
    """Score all rows: (rows written, texts without a reward) on rank 0, zeros on the others. A collective.

    Raises UserError: model, rows or files that cannot be used; a row's mistake is told by the rank that read it.
    """
    from rmcore.parallel.world import first_error

    def start() -> Scorer:
        from rmcore.scoring.scorer import Scorer

        check_names(rows, out, world.size)
        return Scorer(model, overrides, normalise=normalise)

    scorer = first_error(world, "loading the model", start)
    if out == STANDARD:
        return score_stream(scorer, rows, sys.stdout.buffer)
    parts = Path(f"{out}.parts")
    try:
        first_error(world, "preparing", lambda: prepare_parts(parts, scorer, rows) if world.is_main else None)
        score_parts(scorer, _source(rows, parts), parts, world)
        everyone_done(world)
        counts = finish(parts, _source(rows, parts), Path(out)) if world.is_main else (0, 0)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be read or written: {error.strerror or error}") from None
    return counts


def check_names(rows: str, out: str, ranks: int) -> None:
    """Raises UserError for files that cannot be read or written, before the model is loaded."""
    from rmcore.scoring.files import check_input, check_output

    if rows != STANDARD:
        check_input(Path(rows))
    if out == STANDARD or rows == STANDARD:
        if ranks > 1:
            raise UserError("standard input and output belong to one process: give files, or start without torchrun")
    elif Path(out).resolve() == Path(rows).resolve():
        raise UserError(f"{out} is the input: the rows would be overwritten; name another file")
    if out != STANDARD:
        check_output(Path(out))


def score_stream(scorer: Scorer, rows: str, stream: BinaryIO) -> tuple[int, int]:
    """To standard output a chunk at a time, as JSON lines. Nothing is kept, so a stopped run starts anew."""
    from rmcore.scoring.files import chunks, json_line, read_rows, with_rewards

    count = unscored = 0
    for number, chunk in enumerate(chunks(read_rows(None if rows == STANDARD else Path(rows)))):
        if number == 0:
            scorer.choose_path(chunk)
        for (row, _), found in zip(chunk, scorer.rewards(chunk), strict=True):
            stream.write(json_line(with_rewards(row, found.rewards, found.single)))
            unscored += sum(reward is None for reward in found.rewards)
        stream.flush()
        count += len(chunk)
    return count, unscored


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
