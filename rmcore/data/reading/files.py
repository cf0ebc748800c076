"""Reads local files into one memory-mapped Arrow file of rows, each with the place that it came from.

Input: a path (file, directory, glob) and the name of a split.
Output: a `datasets.Dataset`, a hash of the files' bytes, and the memory map, whose pages can be given back.
Example: pairs.jsonl with 3 lines -> 3 rows {"__where__": "pairs.jsonl:1", "__json__": '{"chosen": ...}'}, ...

JSON and CSV rows are kept as JSON text, not as columns: types may change from row to row (null here, a list there), and
the reader of a field reports a wrong type with file and line. Parquet and Arrow rows keep their columns, in the types
that fit all files: a column that a file lacks is null in its rows. Memory does not grow with the rows (except for a
JSON array, see text_rows.py).
"""

import difflib
import glob
import mmap
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet
import xxhash
from datasets import Dataset
from datasets.table import InMemoryTable

from rmcore.config import UserError
from rmcore.data.formats.fields import printable
from rmcore.data.formats.row_format import needed_columns
from rmcore.data.reading.text_rows import MOST_ROW, TOO_LONG, csv_rows, json_line_rows, json_rows
from rmcore.host.model_directory import refuse_lfs_pointer

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


def read_files(
    files: list[Path], cache_dir: Path, columns: Mapping[str, str] | None = None
) -> tuple[Dataset, str, mmap.mmap]:
    """-> (rows of all files in order, memory-mapped from `cache_dir`; hash of the files' bytes; the map).

    `columns` (rmcore's names -> those of the data): only the columns that a comparison then reads must fit in all
    files, and others that do not fit are left out. Without it, all columns must fit.

    Raises UserError: "FILE:LINE: reason" for the first malformed row, if columns do not fit, or without any row.
    """
    for file in files:
        refuse_lfs_pointer(file)
    content = hash_files(files)
    schema, left_out = _common_schema(files, columns)
    # The rows contain the files' names.
    names = xxhash.xxh3_64_hexdigest("\0".join([*map(str, files), *left_out]).encode())
    target = cache_dir / f"rows-v2-{content}-{names}.arrow"
    try:
        if not target.exists():
            cache_dir.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(f".tmp-{uuid.uuid4().hex}")  # several hosts may share the directory
            try:
                _write(files, schema, partial)
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


def _common_schema(files: list[Path], columns: Mapping[str, str] | None) -> tuple[pyarrow.Schema, list[str]]:
    """-> (the columns of all files, each in a type that fits all of them; the names of columns that are left out)."""
    schemas = [_schema_of(file) for file in files]
    if all(schema.equals(schemas[0]) for schema in schemas):
        return schemas[0], []
    for file, schema in zip(files, schemas, strict=True):
        if (JSON in schema.names) != (JSON in schemas[0].names):
            raise UserError(f"{file} and {files[0]} are of different kinds; list the files as separate sources")
    found = list(dict.fromkeys(name for schema in schemas for name in schema.names if name != WHERE))
    needed = found if columns is None else needed_columns(found, columns)
    fields, left_out = [], []
    for name in found:
        holders = [
            (file, schema.field(name).type) for file, schema in zip(files, schemas, strict=True) if name in schema.names
        ]
        kind = _common_type([kind for _, kind in holders])
        if kind is not None:
            fields.append(pyarrow.field(name, kind))
        elif name not in needed:
            left_out.append(name)
        else:
            first, expected = next((file, kind) for file, kind in holders if kind != pyarrow.null())
            file, other = next((file, kind) for file, kind in holders if _common_type([expected, kind]) is None)
            raise UserError(
                f"{file}: column {printable(name)} is of type {other}, but of type {expected} in {first}; list the "
                "files as separate sources, or convert one of them"
            )
    return pyarrow.schema([*fields, schemas[0].field(WHERE)]), left_out


def _common_type(kinds: list[pyarrow.DataType]) -> pyarrow.DataType | None:
    """The type to which all of them can be converted without loss; null fits any type."""
    try:
        plain = [kind.value_type if pyarrow.types.is_dictionary(kind) else kind for kind in kinds]
        one_column = [pyarrow.schema([("column", kind)]) for kind in plain]
        return pyarrow.unify_schemas(one_column, promote_options="permissive").field(0).type
    except pyarrow.ArrowException:
        return None


def _write(files: list[Path], schema: pyarrow.Schema, target: Path) -> None:
    """Writes one Arrow stream with the record batches of all files, converted to the common columns."""
    with pyarrow.OSFile(str(target), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for file in files:
            for batch in _batches(file):
                writer.write_batch(batch if batch.schema.equals(schema) else _converted(batch, schema, file))


def _converted(batch: pyarrow.RecordBatch, schema: pyarrow.Schema, file: Path) -> pyarrow.RecordBatch:
    try:
        columns = [
            batch.column(field.name).cast(field.type)
            if field.name in batch.schema.names
            else pyarrow.nulls(batch.num_rows, field.type)
            for field in schema
        ]
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: cannot convert its columns to those of the other files: {reason}") from None
    return pyarrow.RecordBatch.from_arrays(columns, schema=schema)


def _schema_of(file: Path) -> pyarrow.Schema:
    """The columns of the batches of a file."""
    kind = suffix(file)
    if kind not in (".parquet", ".arrow"):
        return _json_batch([]).schema
    with _damage_explained(file, kind):
        if kind == ".parquet":
            with pyarrow.parquet.ParquetFile(file) as table:
                return table.schema_arrow.append(pyarrow.field(WHERE, pyarrow.string()))
        with pyarrow.memory_map(str(file)) as source:
            return _arrow_reader(source).schema.append(pyarrow.field(WHERE, pyarrow.string()))


def _batches(file: Path) -> Iterator[pyarrow.RecordBatch]:
    kind = suffix(file)
    if kind in (".parquet", ".arrow"):
        yield from _table_batches(file, kind)
        return
    read = {".csv": csv_rows, ".json": json_rows}.get(str(kind), json_line_rows)
    rows: list[tuple[str, str]] = []
    size = 0
    for row in read(file):
        rows.append(row)
        size += len(row[0])
        if len(rows) == _ROWS_A_BATCH or size >= MOST_ROW:
            yield _json_batch(rows)
            rows, size = [], 0
    if rows:
        yield _json_batch(rows)


def _json_batch(rows: list[tuple[str, str]]) -> pyarrow.RecordBatch:
    columns = [pyarrow.array([row[i] for row in rows], pyarrow.string()) for i in (0, 1)]
    return pyarrow.RecordBatch.from_arrays(columns, [JSON, WHERE])


def _table_batches(file: Path, kind: str) -> Iterator[pyarrow.RecordBatch]:
    count = 0
    with _damage_explained(file, kind):
        for batch in _parquet_batches(file) if kind == ".parquet" else _arrow_batches(file):
            if batch.nbytes > MOST_ROW:
                _check_sizes(batch, file, count)
            where = pyarrow.array([f"{file} row {count + i + 1}" for i in range(batch.num_rows)], pyarrow.string())
            count += batch.num_rows
            yield batch.append_column(WHERE, where)


def _check_sizes(batch: pyarrow.RecordBatch, file: Path, before: int) -> None:
    """Raises UserError for a row that is too large; `before`: rows of the file before this batch."""
    for number in range(batch.num_rows):
        if batch.slice(number, 1).nbytes > MOST_ROW:
            raise UserError(f"{file} row {before + number + 1}: {TOO_LONG}")


@contextmanager
def _damage_explained(file: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: damaged, or not in the {kind[1:]} format: {str(error).splitlines()[0]}") from None


def _parquet_batches(file: Path) -> Iterator[pyarrow.RecordBatch]:
    with pyarrow.parquet.ParquetFile(file) as table:
        yield from table.iter_batches(batch_size=_ROWS_A_BATCH)


def _arrow_batches(file: Path) -> Iterator[pyarrow.RecordBatch]:
    with pyarrow.memory_map(str(file)) as source:
        reader = _arrow_reader(source)
        if isinstance(reader, pyarrow.RecordBatchFileReader):
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from reader


def _arrow_reader(source: pyarrow.MemoryMappedFile) -> pyarrow.RecordBatchFileReader | pyarrow.RecordBatchStreamReader:
    """A reader of either layout of Arrow: the file format (begins with its magic), the stream format of `datasets`."""
    is_file_format = source.read(5) == b"ARROW"
    source.seek(0)
    return pyarrow.ipc.open_file(source) if is_file_format else pyarrow.ipc.open_stream(source)


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
