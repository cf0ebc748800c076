"""Loads the rows of hub data sets, local files or the synthetic task, in the configured amounts.

Input: the sources of data.train (or data.eval), the seed of the run, data.limit.
Output: one Source per source in the config.
Example: {path: hh.jsonl, amount: 0.5} with 1,900 rows in the file -> 950 rows in file order, the same ones for the same
seed. Iterating yields ({"prompt": ..., "chosen": ..., "rejected": ...}, "hh.jsonl:12").
"""

import itertools
import json
import mmap
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy
import pyarrow
import xxhash

from rmcore.config import SourceConfig, UserError
from rmcore.data.formats.row_format import needed_columns
from rmcore.data.formats.turns import prose
from rmcore.data.reading.files import (
    COMPRESSIONS,
    JSON,
    SUFFIXES,
    WHERE,
    find_files,
    give_back,
    hash_files,
    looks_local,
    read_files,
)
from rmcore.data.reading.keep import Kept, keep_rows
from rmcore.data.synthetic import SPLIT_ROWS, synthetic_rows
from rmcore.host.hub_access import offline_if_unreachable
from rmcore.host.imports import imported, source_hash

_HEAD = 20  # rows that detect_format looks at
_ROWS_A_READ = 256
_READS_MAPPED = 16  # after so many reads the pages that were read are given back


@dataclass(frozen=True)
class Source:
    """Rows of one data set. Only the numbers of the chosen rows are in memory; the rows are read from disk."""

    label: str  # short name, for metrics by source
    origin: str  # what the user wrote, for messages
    key: str  # the config key where the user wrote it: data.train, or data.train[1] in a list
    fingerprint: str  # of the content, the split, the chosen rows and the column names
    columns: Mapping[str, str]  # our name -> theirs
    _rows: datasets.Dataset = field(repr=False)
    _index: numpy.ndarray = field(repr=False)  # int64, row numbers of _rows
    _maps: tuple[mmap.mmap, ...] = field(default=(), repr=False)  # the memory of _rows, if they come from our cache
    keep: str | None = None  # the expression that selected the rows
    dropped: tuple[tuple[str, int], ...] = ()  # (reason, rows) that it did not select
    _format: Callable[[dict[str, Any]], Any] | None = field(default=None, repr=False)  # data.*.format

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Yields (row, where) of every chosen row; where = "FILE:LINE", "FILE row N" or "ORIGIN row N", from 1."""
        return self.rows(range(len(self)))

    def rows(self, numbers: Sequence[int] | numpy.ndarray) -> Iterator[tuple[dict[str, Any], str]]:
        """Yields (row, where) of the chosen rows with these numbers, in the order of `numbers`."""
        for start in range(0, len(numbers), _ROWS_A_READ):
            yield from self._read(numbers[start : start + _ROWS_A_READ])
            if start // _ROWS_A_READ % _READS_MAPPED == 0:
                for pages in self._maps:
                    give_back(pages)

    @property
    def stored(self) -> numpy.ndarray:
        """int64 [rows]: the stored row of each chosen row. An amount above 1 takes stored rows several times."""
        return self._index

    def head(self) -> list[dict[str, Any]]:
        """The first rows, for detect_format."""
        return [row for row, _ in self._read(range(min(_HEAD, len(self))))]

    def _read(self, numbers: Sequence[int] | numpy.ndarray) -> list[tuple[dict[str, Any], str]]:
        index = [int(self._index[number]) for number in numbers]
        columns = self._rows[index]
        where = columns.pop(WHERE, None) or [f"{self.origin} row {number + 1}" for number in index]
        rows: Iterator[dict[str, Any]]
        if JSON in columns:
            rows = map(json.loads, columns[JSON])
        else:
            rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return [(self._formatted(row, place), place) for row, place in zip(rows, where, strict=True)]

    def _formatted(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        """The row by the user's function, if there is one. Raises UserError if that fails or gives no row."""
        if self._format is None:
            return row
        try:
            made = self._format(row)
        except Exception as error:
            raise UserError(
                f"{where}: {self.key}.format failed: {type(error).__name__}: {_first_line(error)}"
            ) from error
        if not isinstance(made, Mapping):
            raise UserError(f"{where}: {self.key}.format must return a row (a dict), not {type(made).__name__}")
        return dict(made)


def load_sources(
    configs: Sequence[SourceConfig],
    *,
    seed: int,
    limit: int | None,
    cache_dir: Path,
    key: str = "data.train",
    numbers: Sequence[int] | None = None,
    whole: bool = False,
    also: Collection[str] = (),
) -> list[Source]:
    """One Source per config, with the split, `keep`, `amount` and `limit` applied.

    amount: a whole number takes that many rows, a fraction that share of the rows (above 1 it repeats rows). Which rows
    are taken depends only on `seed` and the content. limit: at most so many rows over all sources, in proportion, the
    first ones of each. cache_dir: rows of local files are cached there as Arrow. numbers: the places of the configs in
    the list at `key`; None: they are the whole list. whole: rows with all columns, not only those that a comparison
    needs or reports. also: further columns that are read.
    Raises UserError for a source that cannot be read.
    """
    sources: list[Source] = []
    places = [key] if numbers is None and len(configs) == 1 else [f"{key}[{n}]" for n in numbers or range(len(configs))]
    for number, (place, config) in enumerate(zip(places, configs, strict=True)):
        source = _load(config, seed, cache_dir, place, whole, also)
        if any(other.label == source.label for other in sources):
            source = replace(source, label=f"{source.label}:{number}")
        sources.append(source)
    total = sum(map(len, sources))
    if limit is None or limit >= total:
        return sources
    ends = [round(limit * end / total) for end in numpy.cumsum([0, *map(len, sources)]).tolist()]
    shares = [end - start for start, end in itertools.pairwise(ends)]
    return [_chosen(source, source._index[:share]) for source, share in zip(sources, shares, strict=True) if share]


def _load(config: SourceConfig, seed: int, cache_dir: Path, key: str, whole: bool, also: Collection[str]) -> Source:
    format = None if config.format is None else imported(config.format, f"{key}.format")
    whole = whole or format is not None  # it may read any column
    columns = None if whole else config.columns
    parts = [_split(config, part.strip(), columns, seed, cache_dir, key) for part in config.split.split("+")]
    firsts = itertools.accumulate((len(part.rows) for part in parts), initial=0)
    index = numpy.concatenate([part.index + first for part, first in zip(parts, firsts, strict=False)])
    if len(index) == 0:
        raise UserError(f"{key}: the split {config.split} of {config.path} has no rows")
    try:
        rows = parts[0].rows if len(parts) == 1 else datasets.concatenate_datasets([part.rows for part in parts])
    except ValueError as error:
        raise UserError(f"{key}.split: {config.split}: columns differ: {_first_line(error)}") from None
    kept = Kept(index) if config.keep is None else keep_rows(rows, index, config.keep, config.path, key)
    contents = [part.content for part in parts]
    content = contents[0] if len(parts) == 1 else xxhash.xxh3_128_hexdigest("".join(contents).encode())
    source = Source(
        label=_label(config.path),
        origin=config.path,
        key=key,
        fingerprint=content if format is None else content + source_hash(format),
        columns=config.columns,
        _rows=rows if whole else _needed(rows, config.columns, also),
        _index=kept.rows,
        keep=config.keep,
        dropped=kept.dropped,
        _maps=tuple(pages for part in parts for pages in part.maps),
        _format=format,
    )
    return _chosen(source, _taken(kept.rows, config, seed, content, key))


@dataclass(frozen=True)
class _Split:
    """All rows of one split, their hash, and the numbers of the rows in its slice (`train[:10%]`)."""

    rows: datasets.Dataset
    content: str
    maps: tuple[mmap.mmap, ...]
    index: numpy.ndarray


def _split(
    config: SourceConfig, spec: str, columns: Mapping[str, str] | None, seed: int, cache_dir: Path, key: str
) -> _Split:
    split, bracket, slice_ = spec.partition("[")
    maps: list[mmap.mmap] = []
    if config.path == "synthetic":
        rows, content = _synthetic(config, split, seed)
    elif looks_local(config.path):
        rows, content, maps = _local(config.path, split, columns, cache_dir, key)
    else:
        rows, content = _hub(config, split, key)
    try:
        instruction = datasets.ReadInstruction.from_spec(f"rows{bracket}{slice_}")
        pieces = [(piece.from_, piece.to) for piece in instruction.to_absolute({"rows": len(rows)})]
    except (ValueError, AssertionError) as error:
        raise UserError(f"{key}.split: cannot read {config.split!r}: {error}") from None
    index = numpy.concatenate([numpy.arange(*piece, dtype=numpy.int64) for piece in pieces])
    return _Split(rows, content, tuple(maps), index)


def _label(path: str) -> str:
    """`hh` for data/hh.jsonl.gz, `helpful` for helpful/*.parquet, `name` for the hub data set org/name."""
    named = [part for part in Path(path).absolute().parts if "*" not in part]
    return re.sub(rf"({'|'.join(map(re.escape, (*SUFFIXES, *COMPRESSIONS)))})+$", "", named[-1])


def _needed(rows: datasets.Dataset, columns: Mapping[str, str], also: Collection[str]) -> datasets.Dataset:
    """Removes the columns that no comparison reads, but keeps those with text, so that a comparison can report them."""
    if JSON in rows.column_names:
        return rows
    needed = needed_columns([name for name in rows.column_names if name != WHERE], columns)
    kept = [name for name in rows.column_names if name in (WHERE, *also) or _holds_prose(rows, name)]
    return rows.select_columns(list(dict.fromkeys([*needed, *kept])))


def _holds_prose(rows: datasets.Dataset, name: str) -> bool:
    """Whether some of the first values of a column look like content."""
    column = rows.data.column(name)
    if not _may_hold_text(column.type):
        return False
    found: list[Any] = []
    for chunk in column.chunks:
        found += chunk.drop_null()[: _HEAD - len(found)].to_pylist()
        if len(found) >= _HEAD:
            break
    return bool(prose(found))


def _may_hold_text(kind: pyarrow.DataType) -> bool:
    """True for text, and for lists and records with text; False for numbers and for anything with bytes."""
    if pyarrow.types.is_struct(kind):
        inner = [kind.field(number).type for number in range(kind.num_fields)]
        return any(map(_may_hold_text, inner)) and not any(map(pyarrow.types.is_binary, inner))
    if isinstance(kind, pyarrow.ListType | pyarrow.LargeListType):
        return _may_hold_text(kind.value_type)
    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def _chosen(source: Source, index: numpy.ndarray) -> Source:
    """The same source with other rows. Its fingerprint depends on the content, the columns and these rows."""
    digest = xxhash.xxh3_128(json.dumps([source.fingerprint, sorted(source.columns.items())]).encode())
    digest.update(numpy.ascontiguousarray(index, dtype="<i8").tobytes())
    return replace(source, fingerprint=digest.hexdigest(), _index=index)


def _taken(index: numpy.ndarray, config: SourceConfig, seed: int, content: str, key: str) -> numpy.ndarray:
    """`amount` of the rows, in file order. A larger amount includes the rows of a smaller one."""
    if config.amount is None:
        return index
    count = config.amount if isinstance(config.amount, int) else max(1, round(config.amount * len(index)))
    if isinstance(config.amount, int) and count > len(index):
        raise UserError(
            f"{key}.amount={count} is more than the {len(index)} rows of {config.path}; "
            f"a fraction above 1 repeats rows ({count / len(index):.2f})"
        )
    whole, rest = divmod(count, len(index))
    order = numpy.random.default_rng([seed, int(content[:8], 16)]).permutation(len(index))
    return numpy.concatenate([*[index] * whole, index[numpy.sort(order[:rest])]])


def _synthetic(config: SourceConfig, split: str, seed: int) -> tuple[datasets.Dataset, str]:
    count = config.amount if isinstance(config.amount, int) else SPLIT_ROWS.get(split, 1)
    rows = synthetic_rows(count, seed, split)
    return datasets.Dataset.from_list(rows), xxhash.xxh3_128_hexdigest(json.dumps(rows).encode())


def _local(
    path: str, split: str, columns: Mapping[str, str] | None, cache_dir: Path, key: str
) -> tuple[datasets.Dataset, str, list[mmap.mmap]]:
    directory = Path(path)
    saved = [directory / name for name in ("dataset_dict.json", "state.json")]
    if not any(file.exists() for file in saved):
        rows, content, pages = read_files(find_files(path, split, key), cache_dir, columns)
        return rows, content, [pages]
    try:
        loaded = datasets.load_from_disk(str(directory))
    except Exception as error:  # datasets, pyarrow and json raise errors of their own for a damaged directory
        raise UserError(f"{key}.path: cannot read the saved data set {path}: {_first_line(error)}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise UserError(f"{key}.split: split {split!r} not in {path}, which has {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    elif split not in ("train", str(loaded.split)):
        raise UserError(
            f"{key}.split: split {split!r} not in {path}, which was saved without splits; leave the key out"
        )
    return loaded, _content_of(loaded), []


def _content_of(rows: datasets.Dataset) -> str:
    """Hash of the Arrow files of a data set: the same for the same rows, on any machine and at any time."""
    files = [Path(file["filename"]) for file in rows.cache_files]
    return hash_files(files) if files else xxhash.xxh3_128_hexdigest(rows._fingerprint.encode())


def _hub(config: SourceConfig, split: str, key: str) -> tuple[datasets.Dataset, str]:
    what = " ".join(filter(None, [config.path, config.name, config.revision and f"at {config.revision}"]))
    with offline_if_unreachable() as reason:
        try:
            rows = datasets.load_dataset(config.path, config.name, split=split, revision=config.revision)
        except datasets.exceptions.DatasetNotFoundError:
            raise UserError(
                f"{key}.path: {config.path} is neither a file here nor a data set on the hub that you may read "
                "(if it is private or gated: hf auth login)"
            ) from None
        except Exception as error:  # datasets, fsspec and the hub client raise some twenty kinds of errors
            if reason is None:
                raise UserError(f"{key}: cannot load the hub data set {what}: {_first_line(error)}") from None
            if isinstance(error, ValueError) and "split" in str(error):
                raise UserError(f"{key}.split: {what}: {_first_line(error)}") from None
            raise UserError(
                f"{key}.path: not in the cache: {what} ({reason}). Where there is a connection, fetch it with "
                f"`python -c \"import datasets; datasets.load_dataset('{config.path}')\"` and the same HF_HOME, "
                "or give the path of local files"
            ) from None
    cached = Path(rows.cache_files[0]["filename"]).parent.name if rows.cache_files else ""
    pinned = re.fullmatch(r"[0-9a-f]{40}", config.revision or "")
    if reason is not None and pinned and cached != config.revision:
        # Offline, `datasets` returns whatever revision is in its cache.
        raise UserError(f"{key}.revision: not in the cache: {what} ({reason}); the cache holds revision {cached}")
    return rows, _content_of(rows)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
