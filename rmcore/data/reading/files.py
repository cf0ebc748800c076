"""Reads local files into one memory-mapped Arrow file of rows, each with the place that it came from.

Input: a path (file, directory, glob) and the name of a split.
Output: a `datasets.Dataset`, a hash of the files' bytes, and the memory map, whose pages can be given back.
Example: pairs.jsonl with 3 lines -> 3 rows {"__where__": "pairs.jsonl:1", "__json__": '{"chosen": ...}'}, ...

JSON and CSV rows are kept as JSON text, not as columns: types may change from row to row (null here, a list there), and
the reader of a field reports a wrong type with file and line. Parquet and Arrow rows keep their columns. Memory does
not grow with the rows (except for a JSON array, see text_rows.py).
"""

import difflib
import glob
import mmap
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import xxhash
from datasets import Dataset
from datasets.table import InMemoryTable

from rmcore.config import UserError
from rmcore.data.reading.text_rows import csv_rows, json_line_rows, json_rows

WHERE, JSON = "__where__", "__json__"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".zst")
_ROWS_A_BATCH = 1000
_SPLIT_WORDS = ("train", "test", "validation", "valid", "val", "dev", "eval")
_NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")


def looks_local(path: str) -> bool:
    """True if `path` can only be meant as a local path, so that a typo is not looked up on the hub."""
    return (
        os.path.exists(path)
        or path.startswith(("/", ".", "~"))
        or path.count("/") > 1
        or suffix(Path(path)) is not None
        or any(sign in path for sign in "*?[\\")
    )


def suffix(path: Path) -> str | None:
    """`.jsonl` for a.jsonl and a.jsonl.gz; None for a kind of file that cannot be read."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    found = os.path.splitext(name)[1]
    return found if found in SUFFIXES else None


def find_files(path: str, split: str, key: str) -> list[Path]:
    """The files of a split at a path, sorted. Raises UserError if there are no files, or none of this split.

    The split of a file is in its name (test.jsonl, test-00000-of-00002.parquet, test/part.csv), or else `train`.
    """
    is_directory = os.path.isdir(path)
    if is_directory:
        try:
            files = sorted(f for f in Path(path).rglob("*") if suffix(f) and f.is_file() and _is_data(f, path))
        except OSError as error:
            raise UserError(f"{key}.path: cannot look through {path}: {error}") from None
    else:
        files = [Path(path)] if os.path.exists(path) else sorted(map(Path, glob.glob(path, recursive=True)))
    if not files:
        raise UserError(f"{key}.path: {_nothing_at(path)}")
    unknown = next((f for f in files if suffix(f) is None), None)
    if unknown is not None:
        kinds = f"{', '.join(SUFFIXES)} ({' or '.join(COMPRESSIONS)} after it)"
        raise UserError(f"{key}.path: cannot read {unknown}: the name must end in {kinds}")
    names = {f: str(f.relative_to(path)) if is_directory else f.name for f in files}
    of_split = [f for f in files if _names_split(names[f], split)]
    if of_split:
        return of_split
    if not is_directory and len(files) == 1 and split != "train":
        other = ", data.eval_fraction to hold rows out, or data.eval.path" if key.startswith("data.eval") else ""
        raise UserError(
            f"{key}.split: split {split!r} not in {path}, which has only 'train'; set {key}.split=train{other}"
        )
    # In a directory, test.jsonl must not become training data unnoticed; a glob or a file was chosen by the user.
    if split != "train" or (is_directory and any(_names_split(n, w) for n in names.values() for w in _SPLIT_WORDS)):
        shown = ", ".join(list(names.values())[:8])
        hint = "; a glob reads all its files as train" if split == "train" else ""
        raise UserError(f"{key}.split: no file in {path} has the split {split!r} in its name; there are {shown}{hint}")
    return files


def read_files(files: list[Path], cache_dir: Path) -> tuple[Dataset, str, mmap.mmap]:
    """-> (rows of all files in order, memory-mapped from `cache_dir`; hash of the files' bytes; the map).

    Raises UserError: "FILE:LINE: reason" for the first malformed row, or if there is no row.
    """
    content = hash_files(files)
    names = xxhash.xxh3_64_hexdigest("\0".join(map(str, files)).encode())  # the rows contain the files' names
    target = cache_dir / f"rows-v1-{content}-{names}.arrow"
    try:
        if not target.exists():
            cache_dir.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(f".tmp-{uuid.uuid4().hex}")  # several hosts may share the directory
            try:
                _write(files, partial)
                os.replace(partial, target)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the cache {target}: {error.strerror or error}; set data.cache") from None
    with open(target, "rb") as stream:
        pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    table = InMemoryTable(pyarrow.ipc.open_stream(pages).read_all())  # despite the name, its buffers are mapped pages
    if len(table) == 0:
        raise UserError(
            f"{files[0] if len(files) == 1 else f'{files[0]} and {len(files) - 1} more'}: no rows: the file is empty"
        )
    return Dataset(table, fingerprint=content), content, pages


def give_back(pages: mmap.mmap) -> None:
    """Releases the pages that were read, which would count as memory of the process; they can be read again."""
    if hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


def hash_files(files: list[Path]) -> str:
    """xxh3 (128 bit) of the bytes of all files, in order."""
    digest = xxhash.xxh3_128()
    for file in files:
        try:
            with open(file, "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from None
    return digest.hexdigest()


def _write(files: list[Path], target: Path) -> None:
    """Writes one Arrow stream with the record batches of all files; the first batch decides the columns."""
    writer = None
    with pyarrow.OSFile(str(target), "wb") as sink:
        for file in files:
            for batch in _batches(file):
                if writer is None:
                    schema = batch.schema
                    writer = pyarrow.ipc.new_stream(sink, schema)
                elif not batch.schema.equals(schema):
                    raise UserError(
                        f"{file}: columns {batch.schema.names[:-1]} do not fit those of {files[0]}, "
                        f"{schema.names[:-1]}, in name or type; list the files as separate sources"
                    )
                writer.write_batch(batch)
        if writer is None:
            writer = pyarrow.ipc.new_stream(sink, _json_batch([]).schema)
        writer.close()


def _batches(file: Path) -> Iterator[pyarrow.RecordBatch]:
    kind = suffix(file)
    if kind in (".parquet", ".arrow"):
        yield from _table_batches(file, kind)
        return
    read = {".csv": csv_rows, ".json": json_rows}.get(str(kind), json_line_rows)
    rows: list[tuple[str, str]] = []
    for row in read(file):
        rows.append(row)
        if len(rows) == _ROWS_A_BATCH:
            yield _json_batch(rows)
            rows = []
    if rows:
        yield _json_batch(rows)


def _json_batch(rows: list[tuple[str, str]]) -> pyarrow.RecordBatch:
    columns = [pyarrow.array([row[i] for row in rows], pyarrow.string()) for i in (0, 1)]
    return pyarrow.RecordBatch.from_arrays(columns, [JSON, WHERE])


def _table_batches(file: Path, kind: str) -> Iterator[pyarrow.RecordBatch]:
    count = 0
    try:
        for batch in _parquet_batches(file) if kind == ".parquet" else _arrow_batches(file):
            where = pyarrow.array([f"{file} row {count + i + 1}" for i in range(batch.num_rows)], pyarrow.string())
            count += batch.num_rows
            yield batch.append_column(WHERE, where)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: damaged, or not in the {kind[1:]} format: {str(error).splitlines()[0]}") from None


def _parquet_batches(file: Path) -> Iterator[pyarrow.RecordBatch]:
    with pyarrow.parquet.ParquetFile(file) as table:
        yield from table.iter_batches(batch_size=_ROWS_A_BATCH)


def _arrow_batches(file: Path) -> Iterator[pyarrow.RecordBatch]:
    """Reads both layouts of Arrow: the file format (begins with its magic) and the stream format of `datasets`."""
    with pyarrow.memory_map(str(file)) as source:
        is_file_format = source.read(5) == b"ARROW"
        source.seek(0)
        if is_file_format:
            reader = pyarrow.ipc.open_file(source)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from pyarrow.ipc.open_stream(source)


def _is_data(file: Path, root: str) -> bool:
    """True for files that are not hidden and do not describe a data set or a model."""
    return file.name not in _NOT_ROWS and not any(part.startswith((".", "_")) for part in file.relative_to(root).parts)


def _names_split(name: str, split: str) -> bool:
    return re.search(rf"(^|[-_./ ]){re.escape(split)}([-_./ \d]|$)", name) is not None


def _nothing_at(path: str) -> str:
    if os.path.isdir(path):
        return f"no file in {path} ends in {', '.join(SUFFIXES)}"
    parent = Path(path).parent
    siblings = [f.name for f in parent.iterdir()] if parent.is_dir() else []
    guess = difflib.get_close_matches(Path(path).name, siblings, n=1)
    hint = (
        f" (did you mean {parent / guess[0]}?)"
        if guess
        else ""
        if siblings
        else f" ({parent} is empty or does not exist)"
    )
    return f"no such file or directory: {path}{hint}"
