"""`rmcore score MODEL IN -o OUT`: adds rewards to the rows of a file.

Input: a reward model's directory and rows (JSON lines, JSON, CSV, also .gz or .zst, Parquet, or `-`: standard input),
each in one of these forms:
    {"prompt": text or turns, "answers": [text or turns, ...]}   -> "rewards", one per answer, and "best" (0-based)
    {"prompt": ..., "answer": ...}                               -> "reward"
    {"chosen": ..., "rejected": ...}, with or without "prompt"   -> "rewards" (chosen, rejected), "best" and their
                                                                    difference "reward_margin"
    {"messages": [turns]}                                        -> "reward"
    {"text": rendered text}, {"texts": [...]}                    -> "reward"; "rewards" and "best"
Output: the same rows in the same order with those keys added, as JSON lines (also .gz or .zst) or Parquet; `-`:
standard output. `responses` and `completions` may be used in place of `answers`. The reward of a text that is longer
than the model's positions is null.
`system`, `tools`, `documents` and `chat_template_kwargs` of a row reach the chat template, as in training.
Example: {"prompt": "2+2?", "answers": ["4", "5"]} -> {..., "rewards": [1.25, -0.5], "best": 0}.

Rows are read as a stream and scored in chunks that depend only on the rows. Each prompt of a chunk is computed once for
all its answers, without padding. Rank r of R (torchrun) scores the chunks r, r + R, ... Each finished chunk is a file
in OUT.parts: a restart scores only the missing chunks, on any number of ranks, and OUT is the same to the byte.
"""

from __future__ import annotations

import argparse
import sys

from rmcore.host.command import run_command
from rmcore.host.terminal import print_text

PATIENCE = 7 * 24 * 3600.0  # seconds that a rank waits for the others to finish their chunks


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 1 failed while running, 2 refused (model, rows, files)."""
    parser = argparse.ArgumentParser(
        prog="rmcore score",
        description="Rewards of texts: a prompt with any number of answers, or whole texts.",
        epilog="Rows: prompt and answers (or answer), chosen and rejected, messages, text or texts. "
        "Under torchrun each rank scores its share. To continue a stopped run, give the same command again.",
    )
    parser.add_argument("model", metavar="MODEL", help="directory or hub id of a reward model")
    parser.add_argument(
        "rows", metavar="IN", help="rows: .jsonl, .json, .csv (also .gz, .zst), .parquet, or -: JSON lines from stdin"
    )
    parser.add_argument(
        "-o",
        "--out",
        metavar="OUT",
        required=True,
        help="the rows with their rewards: JSON lines (also .gz, .zst), .parquet, or -: stdout",
    )
    parser.add_argument(
        "--normalise", action="store_true", help="normalise by the mean and deviation stored in MODEL/config.json"
    )
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="data.template=..., parallel.precision=fp32, ..."
    )
    given = parser.parse_intermixed_args(argv)
    from rmcore.parallel.world import running_world
    from rmcore.scoring.score import score

    def work() -> None:
        with running_world(PATIENCE) as world:
            count, unscored = score(world, given.model, given.rows, given.out, given.overrides, given.normalise)
        if world.is_main:
            note = f"; {unscored:,} texts exceed the model's positions and have no reward" if unscored else ""
            stream = sys.stderr if given.out == "-" else sys.stdout
            print_text(f"{count:,} rows written to {given.out}{note}", stream)

    return run_command("rmcore score", work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
