"""Reads and checks single fields of a row: text, numbers, records, JSON in a cell. Chat turns are read by turns.py.

Input: a row (a dict), the name of a column, and the place of the row.
Output: the value, in the one form that all other code works with. A wrong value raises a UserError with the place.
Example: number({"margin": "1.5"}, "margin", "f.csv:7") -> 1.5; with None in the column it raises
UserError("f.csv:7: margin is null").
"""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rmcore.config import UserError

LARGEST = 3.4028234663852886e38  # in fp32, in which labels are stored


def value(row: Mapping[str, Any], name: str, where: str) -> Any:
    """The value of a column that must be present and not null."""
    if row.get(name) is None:
        raise UserError(f"{where}: {name} is " + ("null" if name in row else f"missing; found {listed(list(row))}"))
    return row[name]


def text(row: Mapping[str, Any], name: str, where: str) -> str:
    found = value(row, name, where)
    if not isinstance(found, str):
        raise UserError(f"{where}: {name} must be text, as in the first rows, not {short(found)}")
    return found


def parsed(found: str, name: str, where: str) -> Any:
    """The value of JSON text in a cell."""
    try:
        return json.loads(found)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: {name} must be JSON text, not {short(found)}") from None


def records(found: Any) -> Any:
    """One turn as a list of one, a record of lists as a list of records; everything else as it is."""
    if not isinstance(found, Mapping):
        return found
    if found and all(isinstance(column, list) for column in found.values()):
        if len(set(map(len, found.values()))) == 1:
            return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
        return found
    return [found]


def number(row: Mapping[str, Any], name: str, where: str) -> float:
    """A finite number, or text that is one (in a CSV file every cell is text)."""
    return number_of(value(row, name, where), name, where)


def number_of(found: Any, name: str, where: str) -> float:
    result = math.nan
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        result = math.nan if isinstance(found, bool) else float(found)
    if not math.isfinite(result):
        raise UserError(f"{where}: {name} must be a finite number, not {short(found)}")
    if abs(result) > LARGEST:
        raise UserError(f"{where}: {name} is too large for fp32: {short(found)}")
    return result


def probability(row: Mapping[str, Any], name: str, where: str) -> float:
    result = number(row, name, where)
    if not 0.0 <= result <= 1.0:
        raise UserError(f"{where}: {name} must be a probability from 0 to 1, not {short(row[name])}")
    return result


def kind_of(found: Any) -> str | None:
    """`text`, `turns` (of chat), or None for neither. `found` is not null."""
    if isinstance(found, str):
        return "text"
    return "turns" if isinstance(found, list | Mapping) else None


def listed(names: Sequence[Any]) -> str:
    """Names of columns for an error, at most 12 of them."""
    shown = ", ".join(printable(str(name), 40) for name in names[:12])
    return f"{shown}, ... ({len(names)} columns)" if len(names) > 12 else shown or "no columns"


def short(found: Any) -> str:
    """A value for an error: control characters and lone surrogates escaped, at most 80 characters."""
    shown = repr(found).encode("utf-8", "backslashreplace").decode("utf-8")
    return shown if len(shown) <= 80 else f"{shown[:76]} ..."


def printable(found: str, most: int = 80) -> str:
    """A name from the data, for tables and errors: no control characters, no lone surrogates, not too long."""
    shown = "".join(c if c.isprintable() else " " for c in found[: most + 1]).strip()
    return shown if len(found) <= most else f"{shown[: most - 4]} ..."
