"""JSON lines, JSON arrays and CSV, plain or compressed -> checked rows, each with its place.

Enters: a file. Leaves: (the row as the text of a JSON object, where) for each row, read as a stream, arrays too.
Example: the file a.jsonl with the one line {"chosen": "x"} -> ('{"chosen": "x"}', "a.jsonl:1").
Whatever is wrong with the file is a UserError that opens with FILE:LINE.
"""

import codecs
import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow

from rmcore.config import UserError

_MAGIC = {
    b"PAR1": "a parquet file",
    b"ARRO": "an arrow file",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK": "zip",
}
_PIECE = 1 << 20  # bytes of an array read at a time
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


def json_line_rows(file: Path) -> Iterator[tuple[str, str]]:
    """(JSON text, where) a line; blank lines are passed over."""
    for number, line in enumerate(_lines(file), start=1):
        where = f"{file}:{number}"
        text = _decoded(line, where).strip()
        if text:
            _check_object(_parsed(text, where), text, where)
            yield text, where


def json_rows(file: Path) -> Iterator[tuple[str, str]]:
    """A .json file is one array of objects, or JSON lines all the same."""
    if not _first_characters(file).startswith("["):
        yield from json_line_rows(file)
        return
    for number, value in enumerate(_array_values(file), start=1):
        where = f"{file} row {number}"
        row = json.dumps(value, ensure_ascii=True)
        _check_object(value, row, where)
        yield row, where


def _first_characters(file: Path) -> str:
    return next((text.lstrip() for text in _texts(file) if text.strip()), "")


class _ArrayText:
    """The part of an array's text that is not yet read, and where in the file it begins."""

    def __init__(self, file: Path) -> None:
        self._file, self._texts = file, _texts(file)
        self._text, self._at, self._line, self._column = "", 0, 1, 1

    def next_sign(self) -> str:
        """The next character that is no white space, which stays; "" at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self) -> None:
        self._at += 1

    def value(self) -> Any:
        """The JSON value that begins here: a number only ends where something else is seen."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._more():
                    self._at = error.pos
                    raise self.error(error.msg) from None
                continue
            except (ValueError, RecursionError) as error:
                raise self.error(str(error)) from None
            if end == len(self._text) and self._more():
                continue
            self._at = end
            return value

    def error(self, message: str) -> UserError:
        line, column = self._place(self._at)
        at = f"column {column}" if line == 1 else f"line {line}, column {column}"
        return UserError(f"{self._file}: not JSON: {message} at {at}: {self._text[self._at : self._at + 60]!r}")

    def _place(self, at: int) -> tuple[int, int]:
        lines = self._text.count("\n", 0, at)
        return self._line + lines, at - self._text.rfind("\n", 0, at) if lines else self._column + at

    def _more(self) -> bool:
        """Forgets what was read and appends as much again as is left, so that a long value is tried a few times."""
        parts: list[str] = []
        wanted = len(self._text) - self._at + 1
        while sum(map(len, parts)) < wanted and (text := next(self._texts, "")):
            parts.append(text)
        if parts:
            self._line, self._column = self._place(self._at)
            self._text, self._at = "".join([self._text[self._at :], *parts]), 0
        return bool(parts)


def _array_values(file: Path) -> Iterator[Any]:
    """The values of one JSON array, one after the other; what is behind them is not held."""
    text = _ArrayText(file)
    text.next_sign()
    text.skip()  # [
    if text.next_sign() == "]":
        text.skip()
    else:
        while True:
            text.next_sign()
            yield text.value()
            sign = text.next_sign()
            if sign not in (",", "]"):
                raise text.error("Expecting ',' delimiter")
            text.skip()
            if sign == "]":
                break
    if text.next_sign():
        raise text.error("Extra data")


def csv_rows(file: Path) -> Iterator[tuple[str, str]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default, 128 KiB a cell, is too short for long answers
    lines = (_decoded(line, f"{file}:{number}") for number, line in enumerate(_lines(file), start=1))
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            where, line = f"{file}:{line}", reader.line_num + 1
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
        raise UserError(f"{where}: the header names {twice!r} twice")
    sign = next((sign for sign in ("\t", ";", "|") if len(names) == 1 and sign in names[0]), None)
    if sign is not None:
        raise UserError(f"{where}: the cells seem to be separated by {sign!r}; they must be separated by commas")
    return names


def _lines(file: Path) -> Iterator[bytes]:
    """Decompressed lines. Raises UserError on a file that is not text or does not decompress."""
    number = 0
    try:
        with _opened(file) as stream:
            for number, line in enumerate(stream, start=1):
                yield _checked_head(line, file) if number == 1 else line
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{file}:{number + 1}: cannot be read: {error}") from None


def _texts(file: Path) -> Iterator[str]:
    """Decompressed text in pieces, for what has no lines. Raises UserError as `_lines` does."""
    decoder, done = codecs.getincrementaldecoder("utf-8-sig")(), 0
    try:
        with _opened(file) as stream:
            while piece := stream.read(_PIECE):
                if text := decoder.decode(_checked_head(piece, file) if not done else piece):
                    yield text
                done += len(piece)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text: {error.reason} behind byte {done:,}") from None
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{file}: cannot be read behind byte {done:,}: {error}") from None


def _checked_head(head: bytes, file: Path) -> bytes:
    """The first bytes of a file, without a byte order mark."""
    what = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "binary")
    if what != "binary" or b"\0" in head[:4096]:
        raise UserError(f"{file}:1: not text: it looks like {what}; the name must say what the file is")
    return head.removeprefix(b"\xef\xbb\xbf")


def _opened(file: Path) -> io.BufferedReader:
    if file.name.lower().endswith(".gz"):
        return io.BufferedReader(gzip.open(file))
    if file.name.lower().endswith(".zst"):
        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))
    return open(file, "rb")


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
        raise UserError(f"{where}: not JSON: {error.msg} at {at}: {text[:60]!r}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON that can be read: {error}") from None


def _check_object(value: Any, text: str, where: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{where}: each row must be a JSON object, not {text[:60]!r}")
    if re.search(r"\\u[dD][89a-fA-F]", text):  # only an escape can spell a lone surrogate in UTF-8 text
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = str(error.object)[error.start]
            raise UserError(
                f"{where}: a lone surrogate (\\u{ord(half):04x}): half a character, which is not text"
            ) from None
