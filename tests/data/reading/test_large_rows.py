"""Rows larger than any model reads, and small compressed files that hold gigabytes: one message, little memory.

Each file is read in a process of its own under RLIMIT_AS.
"""

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rmcore.config import UserError
from rmcore.data.reading import text_rows
from rmcore.data.reading.files import read_files
from rmcore.scoring.files import read_rows
from tests.harness.paths import ROOT

BOMB = 1_500_000_000  # bytes
CHILD = """
import resource, sys
from pathlib import Path
from rmcore.config import UserError
from rmcore.data.reading.files import read_files
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20),) * 2)
try:
    read_files([Path(sys.argv[1])], Path(sys.argv[2]))
except UserError as error:
    print(error)
"""


def bomb(file: Path, before: bytes, block: bytes, count: int) -> None:
    """A compressed file of `before` and `count` blocks. The block is compressed once: both formats may be joined."""
    compress = gzip.compress if file.suffix == ".gz" else pyarrow.Codec("zstd").compress
    file.write_bytes(bytes(compress(before)) + bytes(compress(block)) * count)


@pytest.mark.parametrize(
    ("name", "before", "filling", "message"),
    [
        ("a.jsonl.gz", b'{"a": 1}\n{"chosen": "', b"a", r":2: cannot be read: a row of more than 32 MiB"),
        ("a.jsonl.zst", b'{"chosen": "', b"a", r":1: cannot be read: a row of more than 32 MiB"),
        ("a.json.gz", b'[{"chosen": "', b"a", r":1: cannot be read: a JSON array is parsed as a whole"),
        ("a.csv.gz", b'a,b\n1,"', b"a" * 999 + b"\n", r":2: a row of more than 32 MiB.* is a quotation mark missing"),
        ("b.csv.gz", b"a,b\n1,", b"a", r":2: cannot be read: a row of more than 32 MiB"),
    ],
)
def test_a_small_file_with_a_gigabyte_is_one_message(
    tmp_path: Path, name: str, before: bytes, filling: bytes, message: str
) -> None:
    file, block = tmp_path / name, filling * (10_000_000 // len(filling))
    bomb(file, before, block, BOMB // len(block))
    assert file.stat().st_size < 8 << 20
    room = "from rmcore.data.reading import text_rows\ntext_rows.available_memory = lambda: 1e9\n"
    code = room + CHILD if name == "a.json.gz" else CHILD
    done = subprocess.run(
        [sys.executable, "-c", code, str(file), str(tmp_path / "cache")],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(file)) and done.stdout.count("\n") == 1
    with pytest.raises(UserError, match=message):
        raise UserError(done.stdout)


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rows, "MOST_ROW", 1000)
    monkeypatch.setattr("rmcore.data.reading.files.MOST_ROW", 1000)
    monkeypatch.setattr("rmcore.scoring.files.MOST_ROW", 1000)


ROWS = [{"chosen": "a", "rejected": "b"}, {"chosen": "a" * 900, "rejected": "b"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"])
@pytest.mark.parametrize("large", [False, True])
def test_the_limit_is_on_rows_not_on_files(tmp_path: Path, small_limit: None, name: str, large: bool) -> None:
    rows = [*ROWS * 5, {"chosen": "a" * 1100, "rejected": "b"}, ROWS[0]] if large else ROWS * 50
    file = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif name.endswith(".json"):
        file.write_text(json.dumps(rows))
    elif name.endswith(".csv"):
        file.write_text("chosen,rejected\n" + "".join(f"{row['chosen']},{row['rejected']}\n" for row in rows))
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    for read in (lambda: len(read_files([file], tmp_path / "cache")[0]), lambda: len(list(read_rows(file)))):
        if not large:
            assert read() == 100
        elif name != "a.parquet" or "read_files" in read.__code__.co_names:
            place = {"a.json": " row 11: ", "a.parquet": " row 11: ", "a.csv": ":12: "}.get(name, ":11: ")
            with pytest.raises(UserError, match=f"{file}{place}.*a row of more than"):
                read()


def test_standard_input_has_the_same_limit(small_limit: None, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in [*ROWS, {"text": "a" * 1100}])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    with pytest.raises(UserError, match="standard input:3: a row of more than"):
        list(read_rows(None))


@pytest.mark.slow
def test_many_large_rows_are_not_held_together(tmp_path: Path) -> None:
    """30 rows of 10 MB: a batch holds a few of them."""
    bomb(tmp_path / "rows.jsonl.gz", b"", b'{"chosen": "' + b"a" * 10_000_000 + b'"}\n', 30)
    code = CHILD + "print('read')"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "rows.jsonl.gz"), str(tmp_path / "cache")],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.stdout == "read\n", done.stderr
