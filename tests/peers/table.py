"""The results of peers as rows: written by tests/peers/NAME.py, printed as a table by launch/peers.sh.

Input: `python -m tests.peers.table FILE ...`, files of JSON lines. Output: a table on standard output.
Example of a row: {"client": "TRL GRPOTrainer", "version": "1.16.0", "compared": "rewards of 48 completions",
"largest_difference": 2.4e-07}. Without a number the difference is null: `compared` says what was seen.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEADS = ("client", "version", "compared", "largest difference")


def write_rows(workdir: str | Path, peer: str, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to WORKDIR/PEER.jsonl."""
    with open(Path(workdir) / f"{peer}.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def row(client: str, version: str, compared: str, difference: float | None) -> dict[str, Any]:
    return {"client": client, "version": version, "compared": compared, "largest_difference": difference}


def difference_of(row: dict[str, Any]) -> float | None:
    """The largest difference of a row; null where there is no number to compare."""
    return row.get("largest_difference", row.get("difference"))


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [HEADS]
    for one in rows:
        difference = difference_of(one)
        shown = "-" if difference is None else f"{difference:.1e}"
        cells.append((str(one["client"]), str(one["version"]), str(one["compared"]), shown))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells)


if __name__ == "__main__":
    found = [Path(name) for name in sys.argv[1:]]
    lines = [line for path in found if path.is_file() for line in path.read_text(encoding="utf-8").splitlines()]
    print(as_table([json.loads(line) for line in lines]))
