"""Reads the rows of `rmcore score` and writes them with their rewards.

Input: a path. Output: (row, where) as a stream; and a file of the same rows in the same order with rewards.
Example: rows.parquet with columns prompt, answers -> ({"prompt": "2+2?", "answers": ["4", "5"]}, "rows.parquet row 1");
written with {"rewards": [1.25, -0.5], "single": False}: the same columns and types, and rewards (list of double) and
best (int64).
"""

from __future__ import annotations

import gzip
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from rmcore.config import UserError
from rmcore.data.reading.files import suffix
from rmcore.data.reading.text_rows import MOST_ROW, TOO_LONG, csv_rows, json_line_rows, json_rows

PlacedRow = tuple[dict[str, Any], str]  # (row, "FILE:LINE")
Result = Mapping[str, Any]  # {"rewards": [...], "single": ...} of a row

CHUNK_ROWS = 1024  # most rows that are packed together, and whose rewards are one part on disk
CHUNK_CHARACTERS = 2_000_000  # a chunk of long rows ends earlier, after about this many characters
TABLE_ROWS = 1000  # rows per batch between Parquet and Python
READERS = {".jsonl": json_line_rows, ".ndjson": json_line_rows, ".json": json_rows, ".csv": csv_rows}
REWARD, REWARDS, BEST, MARGIN = "reward", "rewards", "best", "reward_margin"
_COLUMNS = {
    REWARD: pyarrow.float64(),
    REWARDS: pyarrow.list_(pyarrow.float64()),
    BEST: pyarrow.int64(),
    MARGIN: pyarrow.float64(),
}


def check_input(path: Path) -> None:
    """Raises UserError for a file that does not exist, or of a kind that rmcore score does not read."""
    if suffix(path) not in (*READERS, ".parquet"):
        raise UserError(f"{path}: rmcore score reads {', '.join(READERS)} (.gz or .zst after it) and .parquet")
    if not path.is_file():
        raise UserError(f"{path}: no such file")


def check_output(path: Path) -> None:
    """Raises UserError for a kind of file that rmcore score does not write, or a directory that cannot be made."""
    if suffix(path) in (".csv", ".arrow") or (suffix(path) == ".parquet" and path.suffix != ".parquet"):
        raise UserError(f"{path}: rmcore score writes JSON lines (.jsonl, also .gz or .zst) and .parquet")
    if path.is_dir():
        raise UserError(f"{path} is a directory: give a file in it")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made: {error.strerror}") from None


def read_rows(path: Path | None) -> Iterator[PlacedRow]:
    """The rows of a file, or of standard input (None), as a stream. Raises UserError for what is not a row."""
    if path is None:
        yield from _standard_rows()
    elif suffix(path) == ".parquet":
        count = itertools.count(1)
        for batch in _parquet_batches(path):
            for row in batch.to_pylist():
                yield row, f"{path} row {next(count)}"
    else:
        for text, where in READERS[str(suffix(path))](path):
            yield json.loads(text), where


def _standard_rows() -> Iterator[PlacedRow]:
    for number, line in enumerate(iter(lambda: sys.stdin.buffer.readline(MOST_ROW + 1), b""), start=1):
        where = f"standard input:{number}"
        if len(line) > MOST_ROW:
            raise UserError(f"{where}: {TOO_LONG}")
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise UserError(f"{where}: not JSON: {error}") from None
        if row is not None:
            if not isinstance(row, dict):
                raise UserError(f"{where}: each row must be a JSON object, not {line[:60]!r}")
            yield row, where


def _parquet_batches(path: Path) -> Iterator[pyarrow.RecordBatch]:
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            yield from table.iter_batches(batch_size=TABLE_ROWS)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file, or damaged: {str(error).splitlines()[0]}") from None


def chunks(rows: Iterable[PlacedRow]) -> Iterator[list[PlacedRow]]:
    """Rows in lists of at most CHUNK_ROWS rows or about CHUNK_CHARACTERS characters."""
    chunk: list[PlacedRow] = []
    characters = 0
    for row, where in rows:
        chunk.append((row, where))
        characters += sum(len(value) if isinstance(value, str) else len(str(value)) for value in row.values())
        if len(chunk) >= CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def with_rewards(
    row: Mapping[str, Any], rewards: list[float | None], single: bool, pair: bool = False
) -> dict[str, Any]:
    """The row with `reward`, or with `rewards` and `best` (the first of the highest; null if all are null).

    A pair also gets `reward_margin`, the reward of the chosen answer minus that of the rejected one.
    """
    if single:
        return {**row, REWARD: rewards[0]}
    known = [reward for reward in rewards if reward is not None]
    scored = {**row, REWARDS: rewards, BEST: rewards.index(max(known)) if known else None}
    if pair:
        scored[MARGIN] = known[0] - known[1] if len(known) == 2 else None
    return scored


def json_line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass") + b"\n"


def write_scored(target: Path, source: Path, results: Iterable[Result]) -> None:
    """Write the rows of `source`, each with its result. `results` is iterated more than once.

    Raises UserError if there are more or fewer results than rows: the file has changed meanwhile.
    """
    try:
        if suffix(target) == ".parquet":
            _write_parquet(target, source, results)
            return
        with _opened(target) as stream:
            for row in _joined(read_rows(source), results):
                stream.write(json_line(row))
    except _Changed:
        raise UserError(f"{source} has changed while it was scored: run the command again") from None


class _Changed(Exception):
    """The number of rows differs from that of the results."""


def _joined(rows: Iterable[PlacedRow], results: Iterable[Result]) -> Iterator[dict[str, Any]]:
    for placed, result in itertools.zip_longest(rows, results):
        if placed is None or result is None:
            raise _Changed
        yield with_rewards(placed[0], result["rewards"], result["single"], result.get("pair", False))


def _opened(path: Path) -> BinaryIO:
    """The file, open for writing, compressed by its ending; without a date, so that equal rows give equal bytes."""
    if path.name.endswith(".gz"):
        return gzip.GzipFile(path, "wb", compresslevel=6, mtime=0)  # type: ignore[return-value]
    if path.name.endswith(".zst"):
        return pyarrow.CompressedOutputStream(str(path), "zstd")
    return open(path, "wb")


def _write_parquet(target: Path, source: Path, results: Iterable[Result]) -> None:
    forms = {bool(result["single"]) for result in results}
    added = [name for name, single in ((REWARD, True), (REWARDS, False), (BEST, False)) if single in forms]
    added += [MARGIN] if any(result.get("pair", False) for result in results) else []
    schema = _schema(source)
    kept = [field for field in schema if field.name not in added]
    whole = pyarrow.schema([*kept, *(pyarrow.field(name, _COLUMNS[name]) for name in added)])
    with pyarrow.parquet.ParquetWriter(target, whole) as writer:
        for batch in _scored_batches(source, results, kept, added):
            writer.write_batch(batch)


def _schema(source: Path) -> pyarrow.Schema:
    """The columns of a file of rows; for JSON and CSV the union of the columns of all rows."""
    if suffix(source) == ".parquet":
        return pyarrow.parquet.read_schema(source).remove_metadata()
    try:
        found = [_table(rows).schema for rows in _batches(row for row, _ in read_rows(source))]
        return pyarrow.unify_schemas(found or [pyarrow.schema([])], promote_options="permissive")
    except pyarrow.ArrowException as error:
        raise _not_a_table(source, error) from None


def _table(rows: list[dict[str, Any]], columns: list[pyarrow.Field] | None = None) -> pyarrow.RecordBatch:
    kind = None if columns is None else pyarrow.struct(columns)
    return pyarrow.RecordBatch.from_struct_array(pyarrow.array(rows, kind))


def _batches(rows: Iterable[Any]) -> Iterator[list[Any]]:
    source = iter(rows)
    while batch := list(itertools.islice(source, TABLE_ROWS)):
        yield batch


def _scored_batches(
    source: Path, results: Iterable[Result], kept: list[pyarrow.Field], added: list[str]
) -> Iterator[pyarrow.RecordBatch]:
    rest = iter(results)
    if suffix(source) == ".parquet":
        tables = (batch.select([field.name for field in kept]) for batch in _parquet_batches(source))
    else:
        tables = (_converted(rows, kept, source) for rows in _batches(row for row, _ in read_rows(source)))
    for table in tables:
        found = list(itertools.islice(rest, table.num_rows))
        if len(found) < table.num_rows:
            raise _Changed
        rows = [with_rewards({}, r["rewards"], r["single"], r.get("pair", False)) for r in found]
        columns = [pyarrow.array([row.get(name) for row in rows], _COLUMNS[name]) for name in added]
        whole = [*kept, *(pyarrow.field(name, _COLUMNS[name]) for name in added)]
        yield pyarrow.RecordBatch.from_arrays([*table.columns, *columns], schema=pyarrow.schema(whole))
    if next(rest, None) is not None:
        raise _Changed


def _converted(rows: list[dict[str, Any]], kept: list[pyarrow.Field], source: Path) -> pyarrow.RecordBatch:
    try:
        return _table(rows, kept)
    except pyarrow.ArrowException as error:
        raise _not_a_table(source, error) from None


def _not_a_table(source: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(f"{source}: its rows cannot be a Parquet table ({reason}); write JSON lines: -o OUT.jsonl")
