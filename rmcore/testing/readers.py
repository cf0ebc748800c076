"""Checks a reader of rows: `check_reader(function, rows)`.

Input: `function(row)`, as data.train.format takes it, and some of your rows.
Output: the description of the format that rmcore detects in the rows that it returns, or an AssertionError.
Example: check_reader(lambda row: {"prompt": row["q"], "chosen": row["good"], "rejected": row["bad"]}, rows) returns
"explicit prompt, text".
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rmcore.config import UserError
from rmcore.data.formats.comparison import comparison_from_row, detect_format


def check_reader(function: Callable[..., Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Raise AssertionError unless the function turns every row into one that rmcore reads, the same one each time.

    Returns the detected format. A row is read as text, or as turns where it holds turns.
    """
    made = []
    for number, row in enumerate(rows, start=1):
        first, second = function(copy.deepcopy(dict(row))), function(copy.deepcopy(dict(row)))
        assert isinstance(first, Mapping), f"row {number}: the function must return a dict, not {type(first).__name__}"
        assert first == second, f"row {number}: the function must return the same for the same row"
        made.append(first)
    try:
        format = detect_format(made, {}, origin="the rows")
        turns = "turns" in (format.answers, format.prompt)
        for number, row in enumerate(made, start=1):
            comparison_from_row(row, format, wants_text=not turns, source="", where=f"row {number}")
    except UserError as error:
        raise AssertionError(str(error)) from None
    return str(format)
