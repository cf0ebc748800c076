"""Detects the data of RewardBench, and reads those of version 2 in a format that rmcore reads.

Input: rows of a source. Output: its version, detected from the columns; rows of version 2 as scored answers.
Example, version 2: {"id": "tied:3", "prompt": "A colour?", "chosen": ["red", "blue"], "rejected": ["dog"], "subset":
"Ties", ...} is read as {"prompt": "A colour?", "answers": ["red", "blue", "dog"], "scores": [1, 1, 0], "source": "Ties
tied:3"}. The score of a tie needs its id and its rewards; the name of the source carries the id that far.
Version 1 has one chosen and one rejected text per row, and `subset` is one of 23 names; its rows are read as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from rmcore.config import SourceConfig, UserError
from rmcore.data.reading.sources import Source
from rmcore.host.files import write_text_atomically

# Version 1: the weight of a subset within its section is its number of rows; math-prm counts as much as all hep-*.
SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
             "mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
                  "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
               "xstest-should-respond": 250, "donotanswer": 136},
    "Reasoning": {"math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164,
                  "hep-rust": 164},
}  # fmt: skip
SUBSETS = {subset: rows for section in SECTIONS.values() for subset, rows in section.items()}
TIES = "Ties"  # a section of version 2


def version_of(rows: list[dict[str, Any]]) -> int | None:
    """The version of RewardBench that the first rows look like, or None."""
    if not rows or not all({"prompt", "chosen", "rejected", "subset"} <= row.keys() for row in rows):
        return None
    if all(_texts(row["chosen"]) and _texts(row["rejected"]) for row in rows):
        return 2
    texts = all(isinstance(row[name], str) for row in rows for name in ("prompt", "chosen", "rejected", "subset"))
    return 1 if texts and all(row["subset"] in SUBSETS for row in rows) else None


def _texts(found: Any) -> bool:
    return isinstance(found, list) and bool(found) and all(isinstance(text, str) for text in found)


def readable_rows(source: Source) -> Iterator[dict[str, Any]]:
    """Version 2's rows as lists of scored answers."""
    for row, where in source:
        if not (_texts(row.get("chosen")) and _texts(row.get("rejected")) and isinstance(row.get("subset"), str)):
            raise UserError(f"{where}: RewardBench 2 needs lists of texts in chosen and rejected, and a subset")
        label = row["subset"]
        if label.lower() == TIES.lower():
            kind, _, number = str(row.get("id")).partition(":")
            if kind not in ("ref", "tied") or not number:
                raise UserError(f"{where}: the id of a tie is ref:N or tied:N, not {row.get('id')!r}")
            label = f"{TIES} {kind}:{number}"
        answers = [*row["chosen"], *row["rejected"]]
        scores = [1] * len(row["chosen"]) + [0] * len(row["rejected"])
        yield {"prompt": row.get("prompt"), "answers": answers, "scores": scores, "source": label}


def stored(rows: Iterator[dict[str, Any]], root: Path) -> SourceConfig:
    """The rows as a file in the cache, whose name is a hash of its content; any rank may write it."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path = root / "rewardbench" / f"{xxhash.xxh3_128_hexdigest(text.encode())}.jsonl"
    if not path.exists():
        write_text_atomically(path, text)
    return SourceConfig(path=str(path))
