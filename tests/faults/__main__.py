"""python -m tests.faults: all faults against real processes, more than an hour; the tests next to this file run less.

python -m tests.faults --table                 the 32 rows of the fault matrix: fault, expected, seen
python -m tests.faults --table 7 12            some rows
python -m tests.faults --kills 100 --seed 1    kill -9, signals, lost consoles and full disks at random points, resumed
python -m tests.faults --damages 500 --seed 1  random damage to checkpoint files
python -m tests.faults                         all of it
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import rows_input as fault_rows_input
from tests.faults import rows_run as fault_rows_run
from tests.faults.campaign import damages, kills

ROWS = {int(row.__name__[-2:]): row for row in (*fault_rows_run.ROWS, *fault_rows_input.ROWS)}

EXPECTED = {
    1: "whole job ends within seconds; resume is bit-identical",
    2: "newest verified checkpoint is used; identical",
    3: "saved at the boundary, status preempted, exit 3",
    4: "all exit at the timeout; the message has rank, step and phase",
    5: "no failure; the log reports the rank",
    6: "all stop; the first traceback is shown, once",
    7: "the message has needed and free space, the last checkpoint is kept; checked at the start",
    8: "warning with the reason, quarantine, fall back",
    9: "stop; never silently restart at zero",
    10: "swept, no collision",
    11: "exit 2 at the start",
    12: "in use by pid on host since",
    13: "works, same trajectory to fp32 rounding",
    14: "diff shown; data, seed, batch, model, loss refused unless allowed",
    15: "fingerprint error",
    16: "all ranks skip together, tensors are listed, stop after k, good checkpoint kept",
    17: "file:line and reason",
    18: "row and value",
    19: "need, found, and the key to set",
    20: "clear text",
    21: "table of drop reasons",
    22: "dropped and counted; the prefix case trains",
    23: "policy, counts",
    24: "a padding token of its own; parity after export",
    25: "error or warning with the key",
    26: "all errors at once with their places",
    27: "not in the cache, and what to do",
    28: "each row once, whatever the world size",
    29: "resumes by itself, logs the attempt",
    30: "one prepares, the others wait",
    31: "the message has the tokens; smaller if configured",
    32: "clear text; nothing is trained from random weights",
}


def table(folder: Path, numbers: list[int]) -> bool:
    """Run rows and print what happened. Returns whether all rows were as expected."""
    good = True
    for number in numbers or sorted(ROWS):
        began = time.monotonic()
        place = folder / f"row-{number:02d}"
        try:
            seen = ROWS[number](place)
        except BaseException as error:  # a skipped row is not a success here
            seen, good = f"NOT AS EXPECTED: {str(error)[-2000:]}", False
        print(f"{number:2}  {(ROWS[number].__doc__ or '').strip()}\n    expected  {EXPECTED[number]}")
        print(f"    seen      {seen}  ({time.monotonic() - began:.0f} s)", flush=True)
        shutil.rmtree(place, ignore_errors=True)
    return good


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--table", nargs="*", type=int, metavar="ROW")
    parser.add_argument("--kills", type=int, metavar="CASES")
    parser.add_argument("--damages", type=int, metavar="CASES")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args(argv)
    if options.table is None and options.kills is None and options.damages is None:
        options.table, options.kills, options.damages = [], 100, 500
    folder = Path(tempfile.mkdtemp(prefix="rmcore-faults-"))
    os.environ["RMCORE_CACHE"] = str(folder / "cache")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    good = True
    try:
        if options.table is not None:
            good = table(folder, options.table)
        if options.kills:
            print(f"seed {options.seed}", flush=True)
            print(f"{kills(folder / 'kills', options.kills, options.seed, _say)} resumes are right", flush=True)
        if options.damages:
            print(f"seed {options.seed}", flush=True)
            damages(folder / "damages", options.damages, options.seed, _say)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if good else 1


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
