"""Selects rows by an expression over their columns, such as `reward_margin > 0`.

Input: the rows of a source, and the expression of its key `keep`: an expression of Jinja, which runs in
rmcore's sandbox, within its budget of work.
Output: the numbers of the rows for which it is true, and how many others there are, by reason.
Example: reward_margin 1.5, -0.2 and null with `reward_margin > 0` -> the first row is kept, one is not wanted, and one
has no value.
"""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import datasets
import jinja2
import jinja2.meta
import numpy

from rmcore.config import UserError
from rmcore.data.drop_reasons import NO_VALUE, NOT_KEPT
from rmcore.data.formats.fields import listed, short
from rmcore.data.reading.files import JSON, WHERE
from rmcore.data.sandbox import Sandbox, bounded

_ROWS_A_READ = 4096
_LONGEST = 10_000  # characters of an expression


class Kept(NamedTuple):
    """`rows`: the kept rows among those given. `dropped`: (reason, rows)."""

    rows: numpy.ndarray
    dropped: tuple[tuple[str, int], ...] = ()


def keep_rows(rows: datasets.Dataset, index: numpy.ndarray, expression: str, origin: str, key: str) -> Kept:
    """The rows among `index` for which the expression is true. A row in which a column that it reads is null is not
    kept if the expression cannot be computed without it.

    Raises UserError, which begins with `key`.keep: the expression is wrong, reads a column that does not exist, cannot
    be computed for a row, is not true or false, or is true for no row.
    """
    place = f"{key}.keep"
    if len(expression) > _LONGEST:
        raise UserError(f"{place} has {len(expression):,} characters; at most {_LONGEST:,} are read")
    environment = Sandbox(undefined=jinja2.StrictUndefined)
    environment.globals = {}
    try:
        with bounded({}):
            compute = environment.compile_expression(expression, undefined_to_none=False)
            names = jinja2.meta.find_undeclared_variables(environment.parse("{{ " + expression + " }}"))
    except Exception as error:  # also what Python raises for its length or depth, and the sandbox for its work
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{place}: {short(expression)} is not an expression: {reason}") from None
    unknown = set(names)
    kept: list[int] = []
    dropped: Counter[str] = Counter()
    for number, row, where in _read(rows, index, names, origin):
        unknown -= row.keys()
        values = {name: row.get(name) for name in names}
        try:
            with bounded(values):
                wanted = compute(**values)
        except Exception as error:  # whatever Python raises for these values, and the sandbox for what is not allowed
            if None in values.values() and isinstance(error, TypeError):
                dropped[NO_VALUE] += 1
                continue
            shown = ", ".join(f"{name} is {short(value)}" for name, value in sorted(values.items()))
            raise UserError(f"{place}: {expression!r} cannot be computed for {where} ({shown}): {error}") from None
        if not isinstance(wanted, bool):
            raise UserError(f"{place}: {expression!r} must be true or false, not {short(wanted)} ({where})")
        if wanted:
            kept.append(number)
        else:
            dropped[NOT_KEPT] += 1
    if unknown:
        known = [name for name in rows.column_names if name not in (WHERE, JSON)] or list(json.loads(rows[0][JSON]))
        raise UserError(f"{place}: {expression!r} reads {min(unknown)}, which no row has; found {listed(known)}")
    if not kept:
        raise UserError(f"{place}: {expression!r} is true for no row of {origin}")
    return Kept(numpy.array(kept, dtype=numpy.int64), tuple(dropped.most_common()))


def _read(
    rows: datasets.Dataset, index: numpy.ndarray, names: set[str], origin: str
) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Yields (number, the columns that are needed, where) of each row."""
    wanted = (WHERE, JSON) if JSON in rows.column_names else (WHERE, *names)
    table = rows.select_columns([name for name in rows.column_names if name in wanted])
    if not table.column_names:  # no column has such a name
        return
    for start in range(0, len(index), _ROWS_A_READ):
        numbers = index[start : start + _ROWS_A_READ].tolist()
        columns = table[numbers]
        places = columns.pop(WHERE, None) or [f"{origin} row {number + 1}" for number in numbers]
        if JSON in columns:
            found = [json.loads(text) for text in columns[JSON]]
        else:
            found = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        yield from zip(numbers, found or [{} for _ in numbers], places, strict=True)
