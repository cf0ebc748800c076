"""Every kind of source is read without loss, and every error in a file raises one message with its place."""

import gzip
import json
import re
import shutil
import socket
import time
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy
import pyarrow
import pyarrow.parquet
import pytest

from rmcore.config import SourceConfig, UserError
from rmcore.data.formats.comparison import comparison_from_row, detect_format
from rmcore.data.reading.sources import Source, load_sources
from rmcore.data.reading.text_rows import json_rows
from tests.harness.paths import SHARED, needs_shared
from tests.harness.schema_rows import SCHEMAS, schema_rows, write_schema_rows

ROWS = [{"prompt": f"p{i} é", "chosen": f"c{i}\n", "rejected": [None, "r", ""][i % 3]} for i in range(700)]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def load(tmp_path: Path):
    def load_one(
        path: Path | str, *, seed: int = 1, limit: int | None = None, key: str = "data.train", **config: Any
    ) -> Source:
        configs = [SourceConfig(path=str(path), **config)]
        return load_sources(configs, seed=seed, limit=limit, cache_dir=tmp_path / "cache", key=key)[0]

    return load_one


def place(source: Source, number: int) -> str:
    """The place of row `number`, as messages give it."""
    return next(source.rows([number]))[1]


def rows_of(source: Source) -> list[dict[str, Any]]:
    return [row for row, _ in source]


def compressed(path: Path, kind: str) -> Path:
    target = path.with_name(path.name + kind)
    if kind == ".gz":
        target.write_bytes(gzip.compress(path.read_bytes()))
    else:
        with pyarrow.OSFile(str(target), "wb") as file, pyarrow.CompressedOutputStream(file, "zstd") as stream:
            stream.write(path.read_bytes())
    return target


@pytest.mark.parametrize("kind", ["", ".gz", ".zst"])
def test_json_lines_plain_and_compressed(kind: str, tmp_path: Path, load) -> None:
    file = jsonl(tmp_path / "rows.jsonl", ROWS)
    source = load(compressed(file, kind) if kind else file)
    assert rows_of(source) == ROWS and len(source) == 700
    assert next(source.rows([301]))[0] == ROWS[301] and source.head() == ROWS[:20]
    assert [where for _, where in source] == [f"{file}{kind}:{i + 1}" for i in range(700)]
    assert place(source, 699) == f"{file}{kind}:700"
    assert source.label == "rows"


def test_blank_lines_are_passed_over_and_lines_still_counted(tmp_path: Path, load) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"chosen": "a", "rejected": "b"}\r\n\n  \n{"chosen": "c", "rejected": null}')
    assert list(load(file)) == [
        ({"chosen": "a", "rejected": "b"}, f"{file}:1"),
        ({"chosen": "c", "rejected": None}, f"{file}:4"),
    ]


def test_types_may_change_from_row_to_row(tmp_path: Path, load) -> None:
    rows = [
        {"chosen": None},
        {"chosen": [{"role": "user", "content": "x", "n": 1}]},
        {"chosen": "x", "b": {"c": [1, "2"]}},
    ]
    assert rows_of(load(jsonl(tmp_path / "a.jsonl", rows))) == rows


def test_other_kinds_of_files_hold_the_same_rows(tmp_path: Path, load) -> None:
    turns = schema_rows("ultrafeedback_binarized", 30, seed=0)
    needed = [{k: v for k, v in row.items() if k != "prompt_id"} for row in turns]
    (tmp_path / "a.json").write_text(json.dumps(turns, indent=1), encoding="utf-8")
    jsonl(tmp_path / "lines.json", turns)
    write_schema_rows("ultrafeedback_binarized", tmp_path / "a.parquet", 30, seed=0)
    table = pyarrow.Table.from_pylist(turns)
    with pyarrow.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    with pyarrow.ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as writer:
        writer.write_table(table)
    datasets.Dataset.from_list(turns).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(turns)}).save_to_disk(tmp_path / "split")
    for name in ("a.json", "lines.json"):
        assert rows_of(load(tmp_path / name)) == turns
    for name in ("a.parquet", "file.arrow", "stream.arrow", "saved", "split"):
        source = load(tmp_path / name)
        assert rows_of(source) == needed, name
        assert place(source, 8) == f"{tmp_path / name} row 9"
    assert place(load(tmp_path / "a.json"), 8) == f"{tmp_path / 'a.json'} row 9"


def test_csv_cells_are_text(tmp_path: Path, load) -> None:
    file = tmp_path / "a.csv"
    file.write_text('prompt,chosen,rejected,margin\n"one\ntwo","a ""b""",,1.5\nNA,12,null,2\n', encoding="utf-8")
    assert list(load(file)) == [
        ({"prompt": "one\ntwo", "chosen": 'a "b"', "rejected": "", "margin": "1.5"}, f"{file}:2"),
        ({"prompt": "NA", "chosen": "12", "rejected": "null", "margin": "2"}, f"{file}:4"),
    ]
    file.write_text("chosen,rejected\na,b\nc\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.csv:3: 1 cells, but the header has 2"):
        load(file)
    file.write_text('chosen,rejected\na,"b\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.csv:2: not CSV: "):
        load(file)


def test_a_header_that_loses_cells_is_refused(tmp_path: Path, load) -> None:
    file = tmp_path / "a.csv"
    file.write_text("prompt,chosen,rejected,chosen\na,b,c,d\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.csv:1: the header has 'chosen' twice"):
        load(file)
    for sign, shown in (("\t", r"'\\t'"), (";", "';'")):
        file.write_text(f"chosen{sign}rejected\na{sign}b\n", encoding="utf-8")
        with pytest.raises(UserError, match=rf"a\.csv:1: the cells seem to be separated by {shown}"):
            load(file)


def test_a_json_array_gives_the_rows_and_the_errors_of_json_loads(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    rows = [{"a": "é\n\U0001f600", "b": [1, -12.5e3, None]}, {}, {"a": {"b": "x" * 50}}]
    for text in (
        "[]",
        " [ ] \n",
        *(json.dumps(rows, indent=i, ensure_ascii=a) for i in (None, 2) for a in (True, False)),
    ):
        file.write_text(f"\ufeff{text}", encoding="utf-8")
        assert [json.loads(row) for row, _ in json_rows(file)] == json.loads(text)
    whole = json.dumps(rows, indent=2)
    for text in (*(whole[:end] for end in range(1, len(whole), 7)), f"{whole} x", whole.replace("},", "}", 1), "[{},]"):
        with pytest.raises(json.JSONDecodeError) as expected:
            json.loads(text)
        fault = expected.value
        at = f"column {fault.colno}" if fault.lineno == 1 else f"line {fault.lineno}, column {fault.colno}"
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=re.escape(f"{file}: not JSON: {fault.msg} at {at}: ")):
            list(json_rows(file))
    for content, wanted in (
        (b'[\n{"a": "\xff"}]', r":2: not UTF-8 text: byte 0xff at column 8"),
        (b"[" * 100_000, ": not JSON: "),
        (b"[3]", " row 1: each"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"^{file}{wanted}"):
            list(json_rows(file))


def test_a_json_array_takes_a_few_times_its_size(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"chosen": str(i) * 200, "rejected": ""} for i in range(10_000, 30_000)], indent=1))
    size = file.stat().st_size
    assert size > 20e6
    tracemalloc.start()
    assert sum(1 for _ in json_rows(file)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * size


GOOD = b'{"chosen": "a", "rejected": "b"}\n'
FAULTS = {
    "cut line": (GOOD + b'{"chosen": "a", "rej', r":2: not JSON: Unterminated string starting at at column 17"),
    "not an object": (GOOD + b"[1, 2]\n", r":2: each row must be a JSON object, not '\[1, 2\]'"),
    "lone surrogate": (GOOD + GOOD + rb'{"chosen": "a \ud83d", "rejected": "b"}', r":3: a lone surrogate \(\\ud83d\)"),
    "not UTF-8": (GOOD + b'{"chosen": "\xe9"}\n', r":2: not UTF-8 text: byte 0xe9 at column 13"),
    "binary": (b"\x7fELF\0\0\0", r":1: not text: it looks like binary"),
    "gzip under another name": (gzip.compress(GOOD), r":1: not text: it looks like gzip"),
    "deep": (b"[" * 100_000, r":1: not JSON"),
    "empty": (b"", r": no rows: the file is empty"),
    "blank": (b"\n \n", r": no rows: the file is empty"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_malformed_file_is_named_with_its_line(fault: str, tmp_path: Path, load) -> None:
    content, message = FAULTS[fault]
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{file}{message}") as error:
        load(file)
    assert len(str(error.value)) < 400 + len(str(file))
    assert not list((tmp_path / "cache").glob("*.tmp*")), "a half-written cache was left behind"
    file.write_bytes(GOOD)
    assert len(load(file)) == 1


WRAPPED = [{"prompt": "p é", "chosen": "c", "rejected": "r"}, {"prompt": "q", "chosen": [], "rejected": {}}]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_json_documents_of_any_layout_hold_the_same_rows(name: str, tmp_path: Path, load) -> None:
    documents = [
        {"version": "1", "data": WRAPPED},
        {"train": WRAPPED, "info": {"by": "x"}, "splits": ["train"]},
        WRAPPED,
    ]
    texts = [json.dumps(document, indent=indent) for document in documents for indent in (None, 1)]
    texts.append("\n".join(json.dumps(row, indent=2) for row in WRAPPED))  # as jq writes rows
    texts.append("".join(json.dumps(row) + "\n\n" for row in WRAPPED))
    for text in texts:
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
        source = load(tmp_path / name)
        assert rows_of(source) == WRAPPED, text
        assert place(source, 1) in (f"{tmp_path / name} row 2", f"{tmp_path / name}:3")


LISTS = {"prompt": "x", "chosen": ["a", "b"], "rejected": ["c"]}  # as in RewardBench 2


@pytest.mark.parametrize("indent", [None, 1])
def test_a_single_row_is_no_wrapper(indent: int | None, tmp_path: Path, load) -> None:
    turn = {"role": "user", "content": "x"}
    for row in ({"chosen": [turn], "rejected": [turn, turn]}, {"messages": [turn], "extra": [turn]}, {"a": 1}, LISTS):
        (tmp_path / "a.json").write_text(json.dumps(row, indent=indent), encoding="utf-8")
        assert rows_of(load(tmp_path / "a.json")) == [row]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"train": [{"a": 1}], "test": [{"a": 2}]},
            r": several lists of rows \('train', 'test'\); write each to its own",
        ),
        ({"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]}, ": holds columns, not rows; .*records"),
        ({"chosen": {"0": "a"}, "rejected": {"0": "b"}}, ": holds columns, not rows; .*records"),
    ],
)
def test_documents_that_are_no_rows_are_refused(document: Any, message: str, tmp_path: Path, load) -> None:
    for indent in (None, 1):
        (tmp_path / "a.json").write_text(json.dumps(document, indent=indent), encoding="utf-8")
        with pytest.raises(UserError, match=f"^{tmp_path / 'a.json'}{message}"):
            load(tmp_path / "a.json")


def test_a_damaged_document_is_named_with_its_place(tmp_path: Path, load) -> None:
    file = tmp_path / "a.jsonl"
    for text, place in (
        ('{\n"a": 1,\n"b" 2}\n', ": not JSON: .* at line 3, column 5"),
        ("{\n", ": not JSON"),
        ("[\n{}", ": not JSON"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=f"^{file}{place}"):
            load(file)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv"])
def test_other_encodings_are_read_by_their_byte_order_mark(encoding: str, kind: str, tmp_path: Path, load) -> None:
    rows = [{"chosen": "é \U0001f600", "rejected": "\u0a0d"}, {"chosen": "b", "rejected": "c"}]
    text = {
        "json": json.dumps({"data": rows}, ensure_ascii=False),
        "csv": "chosen,rejected\r\n" + "".join(f"{row['chosen']},{row['rejected']}\r\n" for row in rows),
    }.get(kind, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    content = ("\ufeff" * encoding.endswith("e") + text).encode(encoding)
    file = tmp_path / f"a.{kind}"
    file.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    assert rows_of(load(file)) == rows


def test_utf_16_that_cannot_be_read_is_explained(tmp_path: Path, load) -> None:
    file = tmp_path / "a.jsonl"
    line = '{"chosen": "a", "rejected": "b"}\n'
    for content, message in (
        (line.encode("utf-16-le"), ":1: UTF-16 text without a byte order mark: convert it to UTF-8"),
        (line.encode("utf-16-be"), ":1: UTF-16 text without a byte order mark: convert it to UTF-8"),
        (line.encode("utf-16") + b"\x00\xd8", ":2: cannot be read: "),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"^{file}{message}"):
            load(file)


def test_a_surrogate_pair_is_a_character(tmp_path: Path, load) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(rb'{"chosen": "\ud83d\ude00", "rejected": "\\ud83d"}')
    assert rows_of(load(file)) == [{"chosen": "\U0001f600", "rejected": "\\ud83d"}]


@pytest.mark.parametrize("kind", [".gz", ".zst"])
def test_damaged_archives(kind: str, tmp_path: Path, load) -> None:
    whole = compressed(jsonl(tmp_path / "a.jsonl", ROWS), kind)
    content = whole.read_bytes()
    for damaged in (content[: len(content) // 2], b"no archive at all"):
        whole.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"^{whole}:\d+: cannot be read: "):
            load(whole)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_shards_need_only_fit_in_the_columns_that_are_read(kind: str, tmp_path: Path, load) -> None:
    """Shards of one data set often differ: a column is null in one, missing, in another order or of another width."""
    shards = [
        {"prompt": ["p0"], "chosen": ["c0"], "rejected": ["r0"], "margin": [1], "note": ["text"], "source": [None]},
        {"rejected": ["r1"], "chosen": ["c1"], "prompt": ["p1"], "margin": [0.5], "note": [7], "source": ["web"]},
        {"prompt": pyarrow.array(["p2"]).dictionary_encode(), "chosen": ["c2"], "rejected": ["r2"]},
    ]
    for number, shard in enumerate(shards):
        table, file = pyarrow.table(shard), tmp_path / "shards" / f"{number}.{kind}"
        file.parent.mkdir(exist_ok=True)
        if kind == "parquet":
            pyarrow.parquet.write_table(table, file)
        else:
            with pyarrow.ipc.new_file(str(file), table.schema) as writer:
                writer.write_table(table)
    rows = rows_of(load(tmp_path / "shards"))
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in rows] == [
        (f"p{n}", f"c{n}", f"r{n}") for n in range(3)
    ]
    assert [row["margin"] for row in rows] == [1.0, 0.5, None] and [row["source"] for row in rows] == [
        None,
        "web",
        None,
    ]
    assert all("note" not in row for row in rows)


def test_damaged_and_differing_tables(tmp_path: Path, load) -> None:
    file = tmp_path / "a.parquet"
    write_schema_rows("ultrafeedback_binarized", file, 10, seed=0)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match=rf"^{file}: damaged, or not in the parquet format"):
        load(file)
    (tmp_path / "b.arrow").write_bytes(b"nonsense" * 9)
    with pytest.raises(UserError, match=r"b\.arrow: damaged, or not in the arrow format"):
        load(tmp_path / "b.arrow")
    pyarrow.parquet.write_table(pyarrow.table({"chosen": ["a"], "rejected": ["b"]}), tmp_path / "x1.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"chosen": ["a"], "rejected": [1]}), tmp_path / "x2.parquet")
    with pytest.raises(UserError, match=r"x2\.parquet: column rejected is of type int64, but of type string in .*x1\."):
        load(tmp_path / "x?.parquet")
    (tmp_path / "x2.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n')
    with pytest.raises(UserError, match=r"x2\.jsonl and .*x1\.parquet are of different kinds"):
        load(tmp_path / "x[12].*[lt]")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"data\.train\.path: cannot read the saved data set"):
        load(tmp_path / "saved")


def test_missing_and_unreadable_paths(tmp_path: Path, load, monkeypatch) -> None:
    jsonl(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(
        UserError,
        match=r"data\.train\.path: no such file or directory: .*pair\.jsonl \(did you mean .*pairs\.jsonl\?\)",
    ):
        load(tmp_path / "pair.jsonl")
    with pytest.raises(UserError, match=r"no such file or directory: no_such_here\.jsonl"):
        load("no_such_here.jsonl")
    with pytest.raises(UserError, match=r"no such file or directory: .*\*\.parquet"):
        load(tmp_path / "*.parquet")
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match=r"cannot read .*notes\.md: the name must end in \.jsonl, "):
        load(tmp_path / "notes.md")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no file in .*empty ends in \.jsonl"):
        load(tmp_path / "empty")

    def locked(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "locked")  # nothing is locked for root, who may run this

    with (
        monkeypatch.context() as patched,
        pytest.raises(UserError, match=r"data\.train\.path: cannot look through .*:"),
    ):
        patched.setattr(Path, "rglob", locked)
        load(tmp_path / "empty")


def test_splits_of_local_files(tmp_path: Path, load) -> None:
    file = jsonl(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(UserError) as error:
        load(file, split="validation", key="data.eval")
    assert str(error.value) == (
        f"data.eval.split: split 'validation' not in {file}, which has only 'train'; set data.eval.split=train, "
        "data.eval_fraction to hold rows out, or data.eval.path"
    )
    assert len(load(jsonl(tmp_path / "hh.test.jsonl", ROWS[:9]), split="test")) == 9
    assert rows_of(load(file, split="train[:10%]")) == ROWS[:70]
    assert rows_of(load(file, split="train[690:]")) == ROWS[690:]
    with pytest.raises(UserError, match=r"data\.train: the split train\[5:5\] of .* has no rows"):
        load(file, split="train[5:5]")
    with pytest.raises(UserError, match=r"data\.train\.split: cannot read 'train\['"):
        load(file, split="train[")
    with pytest.raises(UserError, match=r"data\.train\.split: cannot read 'train\[a:\]'"):
        load(file, split="train[a:]")


def test_splits_are_joined_with_a_plus(tmp_path: Path, load) -> None:
    root = tmp_path / "set"
    jsonl(root / "train.jsonl", ROWS[:10])
    jsonl(root / "test.jsonl", ROWS[10:20])
    both = load(root, split="train[:30%] + test[8:]")
    assert rows_of(both) == ROWS[:3] + ROWS[18:20] and place(both, 4) == f"{root}/test.jsonl:10"
    assert rows_of(load(root, split="train+test")) == ROWS[:20]
    assert len({load(root, split=s).fingerprint for s in ("train", "train+test", "test+train")}) == 3
    datasets.DatasetDict(
        {
            name: datasets.Dataset.from_list([{"chosen": value, "rejected": "x"}])
            for name, value in (("a", "y"), ("b", 1))
        }
    ).save_to_disk(tmp_path / "differ")
    with pytest.raises(UserError, match=r"data\.train\.split: a\+b: columns differ"):
        load(tmp_path / "differ", split="a+b")


def test_splits_of_directories(tmp_path: Path, load) -> None:
    root = tmp_path / "set"
    jsonl(root / "data" / "train-00000-of-00002.jsonl", ROWS[:5])
    jsonl(root / "data" / "train-00001-of-00002.jsonl", ROWS[5:9])
    jsonl(root / "data" / "test_prefs-00000-of-00001.jsonl", ROWS[9:12])
    jsonl(root / "dev" / "x.jsonl", ROWS[12:13])
    (root / "dataset_infos.json").write_text("{}")
    (root / "README.md").write_text("card")
    jsonl(root / ".cache" / "train.jsonl", ROWS)
    assert rows_of(load(root)) == ROWS[:9]
    assert rows_of(load(root, split="test_prefs")) == ROWS[9:12]
    assert rows_of(load(root, split="dev")) == ROWS[12:13]
    assert load(root).label == "set"
    assert rows_of(load(f"{root}/**/*.jsonl", split="test_prefs")) == ROWS[9:12]
    with pytest.raises(
        UserError, match=r"no file in .*set has the split 'validation' in its name; there are data/test_prefs-0"
    ):
        load(root, split="validation")
    other = tmp_path / "other"
    jsonl(other / "a.jsonl", ROWS[:2])
    assert rows_of(load(other)) == ROWS[:2]
    jsonl(other / "test.jsonl", ROWS[2:4])
    with pytest.raises(UserError, match=r"has the split 'train' in its name.*; a glob reads all its files as train"):
        load(other)
    assert rows_of(load(other / "*.jsonl")) == ROWS[:4]
    with pytest.raises(UserError, match=r"split 'test' not in .*split, which has train"):
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[:3])}).save_to_disk(tmp_path / "split")
        load(tmp_path / "split", split="test")
    with pytest.raises(UserError, match=r"split 'test' not in .*whole, which was saved without splits"):
        datasets.Dataset.from_list(ROWS[:3]).save_to_disk(tmp_path / "whole")
        load(tmp_path / "whole", split="test")


def test_amounts_depend_on_seed_and_content_alone(tmp_path: Path, load) -> None:
    rows = [{"chosen": str(i), "rejected": "x"} for i in range(100)]
    file = jsonl(tmp_path / "a.jsonl", rows)
    moved = jsonl(tmp_path / "elsewhere" / "b.jsonl", rows)

    def taken(path: Path = file, **options: Any) -> list[int]:
        return [int(row["chosen"]) for row in rows_of(load(path, **options))]

    assert len(taken(amount=10)) == 10 and taken(amount=0.1) == taken(amount=10) == taken(moved, amount=10)
    assert taken(amount=10) == sorted(set(taken(amount=10))) != taken(amount=10, seed=2)
    assert set(taken(amount=10)) < set(taken(amount=30)) and taken(amount=100) == list(range(100))
    assert len(taken(amount=0.001)) == 1
    with pytest.raises(UserError, match=r"data\.train\.amount=101 is more than the 100 rows of .*; .* \(1\.01\)"):
        taken(amount=101)
    source = load(file, amount=2.5)
    assert sorted(int(row["chosen"]) for row in rows_of(source)) == sorted([*range(100)] * 2 + taken(amount=50))


def test_limit_is_shared_in_proportion(tmp_path: Path) -> None:
    files = [jsonl(tmp_path / f"{n}.jsonl", ROWS[:n]) for n in (600, 300, 1)]
    configs = [SourceConfig(path=str(file)) for file in files]

    def lengths(limit: int | None) -> list[int]:
        return [len(s) for s in load_sources(configs, seed=1, limit=limit, cache_dir=tmp_path / "cache")]

    assert lengths(None) == lengths(1000) == [600, 300, 1]
    assert lengths(100) == [67, 33]
    assert sum(lengths(1)) == 1
    sources = load_sources(configs, seed=1, limit=100, cache_dir=tmp_path / "cache")
    assert rows_of(sources[0]) == ROWS[:67]
    assert [s.key for s in sources] == ["data.train[0]", "data.train[1]"]
    twice = load_sources([configs[0]] * 2, seed=1, limit=None, cache_dir=tmp_path / "cache")
    assert [s.label for s in twice] == ["600", "600:1"]


def test_fingerprint_follows_the_content_and_the_choice(tmp_path: Path, load) -> None:
    file = jsonl(tmp_path / "a.jsonl", ROWS)
    copy = jsonl(tmp_path / "copy" / "c.jsonl", ROWS)
    first = load(file).fingerprint
    assert load(file).fingerprint == load(copy).fingerprint == first
    assert place(load(copy), 0) == f"{copy}:1"
    changed = jsonl(tmp_path / "d.jsonl", [*ROWS[:-1], {**ROWS[-1], "chosen": "!"}])
    others = [
        load(changed),
        load(file, amount=10),
        load(file, amount=10, seed=2),
        load(file, limit=10),
        load(file, split="train[:99%]"),
        load(file, columns={"chosen": "rejected"}),
    ]
    assert len({first, *(source.fingerprint for source in others)}) == 7
    jsonl(file, ROWS[:-1])
    assert load(file).fingerprint != first and len(load(file)) == 699


def test_the_cache_is_written_once_and_memory_mapped(tmp_path: Path, load) -> None:
    source = load(jsonl(tmp_path / "a.jsonl", ROWS))
    (cached,) = (tmp_path / "cache").iterdir()
    before = cached.stat().st_mtime_ns
    assert [len(pages) for pages in source._maps] == [cached.stat().st_size]
    assert rows_of(load(tmp_path / "a.jsonl")) == ROWS and cached.stat().st_mtime_ns == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the cache .*; set data\.cache"):
        config = SourceConfig(path=str(tmp_path / "a.jsonl"))
        load_sources([config], seed=1, limit=None, cache_dir=tmp_path / "file" / "cache")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_reading_rows_keeps_no_memory(tmp_path: Path, load) -> None:
    """60 MB of rows are read in order, then out of order: only a few reads of the mapped file stay in memory."""

    def mapped() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) / 1000

    source = load(jsonl(tmp_path / "a.jsonl", [{"chosen": str(i) * 1000, "rejected": ""} for i in range(10000, 22000)]))
    assert sum(map(len, source._maps)) > 60e6
    before, most = mapped(), 0.0
    for number, (row, _) in enumerate(source):
        assert row["chosen"].startswith(str(10000 + number))
        most = max(most, mapped()) if number % 1000 == 0 else most
    backwards = numpy.arange(len(source))[::-1]
    for number, (row, _) in zip(backwards, source.rows(backwards), strict=True):
        assert row["chosen"].startswith(str(10000 + number))
        most = max(most, mapped()) if number % 1000 == 0 else most
    # 16 reads of 256 rows of 5 kB are 21 MB; the rest is for pages read around them and libraries loaded meanwhile.
    assert most - before < 40


def test_the_embedded_task(load) -> None:
    train, test = load("synthetic"), load("synthetic", split="test", amount=40)
    assert len(train) > len(test) == 40 and train.label == "synthetic"
    format = detect_format(train.head(), train.columns, origin=train.origin)
    prompts = [
        {comparison_from_row(row, format, wants_text=True, source="x", where=where).prompt_key for row, where in source}
        for source in (train, test)
    ]
    assert prompts[0].isdisjoint(prompts[1])
    assert load("synthetic").fingerprint == train.fingerprint != load("synthetic", seed=2).fingerprint
    with pytest.raises(UserError, match="validation"):
        load("synthetic", split="validation")


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch) -> Path:
    """No hub (a local port on which nobody listens), and a cache with org/tiny at revision aaa..."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    rows = schema_rows("sentiment-trl-style", 12, seed=0)
    made = tmp_path / "hf" / "org___tiny" / "default" / "0.0.0" / ("a" * 40)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    built = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "p.parquet"), split="train", cache_dir=str(tmp_path / "built")
    )
    shutil.copytree(Path(built.cache_files[0]["filename"]).parent, made)
    (made / "parquet-train.arrow").rename(made / "tiny-train.arrow")
    info = json.loads((made / "dataset_info.json").read_text())
    (made / "dataset_info.json").write_text(json.dumps({**info, "dataset_name": "tiny", "config_name": "default"}))
    return made


def test_a_hub_data_set_is_read_from_the_cache_when_the_hub_is_away(offline_hub: Path, load) -> None:
    started = time.monotonic()
    source = load("org/tiny", amount=5, revision="a" * 40)
    assert len(source) == 5 and source.label == "tiny"
    assert rows_of(load("org/tiny")) == schema_rows("sentiment-trl-style", 12, seed=0)
    assert place(load("org/tiny"), 3) == "org/tiny row 4"
    # One load in the hub client's own retries takes 20 s and more; these are four, each a refused connection.
    assert time.monotonic() - started < 10
    assert not huggingface_hub.constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize("switch", ["unreachable", "HF_HUB_OFFLINE"])
def test_what_is_not_in_the_cache_is_named(switch: str, offline_hub: Path, load, monkeypatch) -> None:
    if switch == "HF_HUB_OFFLINE":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    reason = "offline mode is on" if switch == "HF_HUB_OFFLINE" else r"the hub cannot be reached: 127\.0\.0\.1"
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"data\.train\.path: not in the cache: org/none \({reason}.*fetch it with"):
        load("org/none")
    with pytest.raises(UserError, match=r"not in the cache: org/tiny other"):
        load("org/tiny", name="other")
    with pytest.raises(UserError, match=r'data\.train\.split: org/tiny: Unknown split "test"'):
        load("org/tiny", split="test")
    with pytest.raises(UserError, match=r"data\.train\.revision: not in the cache: .*the cache holds revision aaaa"):
        load("org/tiny", revision="b" * 40)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_published_schemas_from_files(name: str, suffix: str, tmp_path: Path, load) -> None:
    write_schema_rows(name, tmp_path / f"train{suffix}", 20, seed=1)
    source = load(tmp_path)
    format = detect_format(source.head(), source.columns, origin=source.origin)
    for (row, where), written in zip(source, schema_rows(name, 20, seed=1), strict=True):
        comparison = comparison_from_row(row, format, wants_text=False, source="x", where=where)
        assert [*comparison.prompt, *comparison.answers[0]] == written["chosen"]


@needs_shared
def test_every_real_file_is_read_whole(load) -> None:
    counts = {
        "hh_harmless_base": 1873,
        "hh_helpful_base": 1900,
        "tldr_gpt4_judged": 1000,
        "pandalm_test": 782,
        "mtbench_human": 193,
    }
    counts |= {"judgebench": 619, "rmbench_no_math": 2367, "llamafactory_dpo_en": 295, "openinstruct_sample": 100}
    for name, count in counts.items():
        file = SHARED / "data" / "pairs" / f"{name}.jsonl.gz"
        source = load(file)
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            assert rows_of(source) == [json.loads(line) for line in lines]
        assert len(source) == count and place(source, count - 1) == f"{file}:{count}"
