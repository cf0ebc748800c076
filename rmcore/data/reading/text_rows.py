"""Reads JSON lines, JSON documents and CSV files, plain or compressed, and checks every row.

Input: a file, in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.
Output: for each row (the row as the text of a JSON object, its place). JSON lines and CSV are read as streams.
Example: the file a.jsonl with the one line {"chosen": "x"} -> ('{"chosen": "x"}', "a.jsonl:1").

A JSON document is an array of rows, an object with one such array ({"data": [...]}), or objects that span lines. It is
parsed as a whole, so it takes a few times the size of the file in memory.

A file that cannot be read raises a UserError that begins with FILE:LINE, or with FILE and contains line and column.
"""

import codecs
import csv
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow

from rmcore.config import UserError
from rmcore.data.formats.row_format import ALIASES, LAYOUTS
from rmcore.host.memory import available_memory

_MAGIC = {
    b"PAR1": "a parquet file",
    b"ARRO": "an arrow file",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK": "zip",
}
_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
# Keys that only a row has, not an object around the rows.
_ROW_KEYS = {"prompt", "messages", "conversations", "text", "texts"}
_ROW_KEYS |= {name for fields in LAYOUTS.values() for ours in fields for name in (ours, *ALIASES[ours])}


MOST_ROW = 32 << 20  # bytes of a row; far beyond what any model reads, and little enough to be parsed
TOO_LONG = f"a row of more than {MOST_ROW >> 20} MiB, which no model can read"
PARSED = 25  # a JSON array takes up to this many times its size in memory


def json_line_rows(file: Path) -> Iterator[tuple[str, str]]:
    """Yields (JSON text, where) of each line; blank lines are skipped. A file with a JSON document gives its rows."""
    only: tuple[Any, str, str] | None = None  # the first row, until there is a second one
    count = 0
    for number, line in enumerate(_lines(file), start=1):
        where = f"{file}:{number}"
        text = _decoded(line, where).strip()
        if not text:
            continue
        count += 1
        if count == 1 and _goes_on(text):
            yield from _document_rows(file)
            return
        value = _parsed(text, where)
        if count == 1 and isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            yield from _document_rows(file)
            return
        _check_object(value, text, where)
        if count == 1:
            only = value, text, where
            continue
        if count == 2 and only is not None:
            yield only[1:]
        yield text, where
    if count == 1 and only is not None:
        yield from [only[1:]] if (rows := _rows_inside(only[0], file)) is None else _numbered(rows, file)


def json_rows(file: Path) -> Iterator[tuple[str, str]]:
    """Yields (JSON text, where) of each row of a .json file: a document, or JSON lines all the same."""
    lines = (_decoded(line, f"{file}:{number}") for number, line in enumerate(_lines(file), start=1))
    if next((line.lstrip() for line in lines if line.strip()), "").startswith("["):
        yield from _document_rows(file)
    else:
        yield from json_line_rows(file)


def _goes_on(line: str) -> bool:
    """Whether the first line of a file is only the beginning of an object or an array."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return line[0] in "[{" and error.pos >= len(line)
    except (ValueError, RecursionError):
        pass
    return False


def _document_rows(file: Path) -> Iterator[tuple[str, str]]:
    """The rows of a file that is parsed as a whole: an array, an object around one, or objects over several lines."""
    text = "".join(_decoded(line, f"{file}:{number}") for number, line in enumerate(_lines(file), start=1))
    values = None if text.lstrip().startswith("[") else _objects(text)
    if values is None:
        value = _parsed(text, str(file))
        values = value if isinstance(value, list) else [value]
    elif len(values) == 1 and (rows := _rows_inside(values[0], file)) is not None:
        values = rows
    del text
    yield from _numbered(values, file)


def _objects(text: str) -> list[Any] | None:
    """The JSON values that follow each other in a text, None if it is not JSON."""
    decoder, place, values = json.JSONDecoder(), 0, []
    try:
        while place < len(text):
            if text[place].isspace():
                place += 1
                continue
            value, place = decoder.raw_decode(text, place)
            values.append(value)
    except (ValueError, RecursionError):
        return None
    return values


def _rows_inside(value: Any, file: Path) -> list[Any] | None:
    """The rows in an object such as {"version": 1, "data": [...]}; None for an object that is a row."""
    if not isinstance(value, dict):
        return None
    column = value.get("chosen")
    if column and all(isinstance(inner, list | dict) for inner in value.values()):
        texts = all(isinstance(item, str) for item in column) if isinstance(column, list) else "0" in column
        if texts:
            raise UserError(f"{file}: holds columns, not rows; write one object per row (pandas: orient='records')")
    if _ROW_KEYS & value.keys():
        return None
    lists = [key for key, inner in value.items() if isinstance(inner, list) and inner and isinstance(inner[0], dict)]
    if len(lists) > 1:
        raise UserError(
            f"{file}: several lists of rows ({', '.join(map(repr, lists[:8]))}); write each to its own file"
        )
    return value[lists[0]] if lists else None


def _numbered(values: list[Any], file: Path) -> Iterator[tuple[str, str]]:
    for number, value in enumerate(values, start=1):
        where = f"{file} row {number}"
        row = json.dumps(value, ensure_ascii=True)
        _check_object(value, row, where)
        yield row, where


def csv_rows(file: Path) -> Iterator[tuple[str, str]]:
    """Yields (JSON text, where) of each row under the header; every cell is text, and blank lines are skipped."""
    csv.field_size_limit(MOST_ROW)  # the default, 128 KiB a cell, is too short for long answers
    line, size = 1, 0  # first line of the row that is being read, and its bytes so far

    def lines() -> Iterator[str]:
        nonlocal size
        for number, text in enumerate(_lines(file), start=1):
            size += len(text)
            if size > MOST_ROW:
                raise UserError(f"{file}:{line}: {TOO_LONG}; is a quotation mark missing?")
            yield _decoded(text, f"{file}:{number}")

    reader = csv.reader(lines(), strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            where, line, size = f"{file}:{line}", reader.line_num + 1, 0
            if header is None:
                header = _checked_header(cells, where)
            elif len(cells) == len(header):
                yield json.dumps(dict(zip(header, cells, strict=True))), where
            elif cells:
                raise UserError(f"{where}: {len(cells)} cells, but the header has {len(header)}")
    except csv.Error as error:
        raise UserError(f"{file}:{line}: not CSV: {error}") from None


def _checked_header(names: list[str], where: str) -> list[str]:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: the header has {twice!r} twice")
    sign = next((sign for sign in ("\t", ";", "|") if len(names) == 1 and sign in names[0]), None)
    if sign is not None:
        raise UserError(f"{where}: the cells seem to be separated by {sign!r}; they must be separated by commas")
    return names


def _lines(file: Path) -> Iterator[bytes]:
    """Yields decompressed lines. Raises UserError for a file that is not text or does not decompress."""
    number = 0
    try:
        with _opened(file) as stream:
            for number, line in enumerate(_in_utf8(stream), start=1):
                yield _checked_head(line, file) if number == 1 else line
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{file}:{number + 1}: cannot be read: {error}") from None


def _in_utf8(stream: io.BufferedReader) -> Iterable[bytes]:
    """The lines of a stream in UTF-8; those of another encoding of Unicode if a byte order mark says which."""
    head = stream.peek(4)[:4]
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    if encoding is None:
        return stream
    return (line.encode("utf-8") for line in io.TextIOWrapper(stream, encoding, newline="\n"))


def _checked_head(head: bytes, file: Path) -> bytes:
    """The first line of a file, without a byte order mark. Raises UserError if it does not look like text."""
    what = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "binary")
    half = max(head[:400:2].count(0), head[1:400:2].count(0))
    if what == "binary" and len(head) > 8 and half > 0.9 * len(head[:400:2]):
        raise UserError(f"{file}:1: UTF-16 text without a byte order mark: convert it to UTF-8 (iconv -f UTF-16LE)")
    if what != "binary" or b"\0" in head[:4096]:
        raise UserError(f"{file}:1: not text: it looks like {what}; the suffix of the name must match the content")
    return head.removeprefix(b"\xef\xbb\xbf")


def _opened(file: Path) -> io.BufferedReader:
    if file.name.lower().endswith(".gz"):
        return io.BufferedReader(_Bounded(gzip.open(file)))
    if file.name.lower().endswith(".zst"):
        return io.BufferedReader(_Bounded(pyarrow.input_stream(str(file), compression="zstd")))
    return io.BufferedReader(_Bounded(open(file, "rb")))


class _Bounded(io.RawIOBase):
    """A stream that raises ValueError for a line of more than MOST_ROW bytes: 1.5 MB of gzip can hold one of 1.5 GB.

    A file that begins with a bracket is parsed as a whole. It may be a single line, but must fit into memory.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._in_line, self._total, self._is_array = 0, 0, False
        self._room = available_memory()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._stream.read(len(buffer))
        buffer[: len(piece)] = piece
        if not self._total:
            self._is_array = piece.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
        self._total += len(piece)
        end = piece.rfind(b"\n")
        self._in_line = self._in_line + len(piece) if end < 0 else len(piece) - end - 1
        if self._is_array and PARSED * self._total > self._room:
            size = f"{self._total / 1e9:.3g} GB or more"
            raise ValueError(f"a JSON array is parsed as a whole, and {size} do not fit into memory: use JSON lines")
        if self._in_line > MOST_ROW and not self._is_array:
            raise ValueError(TOO_LONG)
        return len(piece)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 text: byte 0x{line[error.start]:02x} at column {error.start + 1}"
        ) from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        around = text[max(0, error.pos - 20) : error.pos + 40]
        raise UserError(f"{where}: not JSON: {error.msg} at {at}: {around!r}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None


def _check_object(value: Any, text: str, where: str) -> None:
    if len(text) > MOST_ROW:
        raise UserError(f"{where}: {TOO_LONG}")
    if not isinstance(value, dict):
        raise UserError(f"{where}: each row must be a JSON object, not {text[:60]!r}")
    if re.search(r"\\u[dD][89a-fA-F]", text):  # in UTF-8 text, a lone surrogate can only be written as an escape
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = str(error.object)[error.start]
            raise UserError(
                f"{where}: a lone surrogate (\\u{ord(half):04x}): half a character, which is not text"
            ) from None
