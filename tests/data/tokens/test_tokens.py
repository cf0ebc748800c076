"""Compares limits, prefixes and special tokens with plain Python; tests the cache with races, kills and damage."""

import io
import json
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from rmcore.config import UserError, load_config
from rmcore.data.drop_reasons import ANSWER_TOO_LONG, EMPTY, IDENTICAL, PROMPT_TOO_LONG, TEXT_TOO_LONG
from rmcore.data.inspection.first_example import show_first_example, token_texts
from rmcore.data.inspection.statistics import statistics
from rmcore.data.synthetic import BOS, EOS, PAD, byte_tokenizer
from rmcore.data.tokens.cache import CacheWriter, open_or_build
from rmcore.data.tokens.comparisons import ARRAYS, EncodedRow, lay_out
from rmcore.data.tokens.encoder import TextEncoder
from rmcore.data.tokens.limits import LengthLimits, apply_limits, in_memory
from rmcore.data.tokens.ragged_arrays import common_prefix_lengths
from rmcore.data.tokens.tokenizer import fix_padding, load_tokenizer, tokenizer_fingerprint
from rmcore.evaluation.arrays import pair_arrays
from tests.harness.paths import ROOT, SHARED, needs_shared

# --- rows -> arrays --------------------------------------------------------------------------------------------------


def ids(*values):
    return np.array(values, dtype=np.int32)


def common_prefix(texts):
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False))]


def make_row(prompt, tails, pairs=((0, 1),), spans=False):
    """`spans`: the last prompt token merges with the answer, so the text differs from the prompt at its last token."""
    texts = [[*prompt[:-1], 90, *tail] if spans and prompt else [*prompt, *tail] for tail in tails]
    return EncodedRow(
        prompt=ids(*prompt),
        answers=[ids(*text) for text in texts],
        pairs=list(pairs),
        margin=[float(i) for i in range(len(pairs))],
        weight=[1.0 + i for i in range(len(pairs))],
        source_index=len(prompt) % 3,
        prompt_hash=len(prompt),
    )


@st.composite
def rows(draw):
    answers = draw(st.integers(2, 4))
    token = st.integers(3, 5)  # few tokens: common prefixes, identical answers and prefixes of each other are frequent
    prompt = draw(st.lists(token, max_size=6))
    tails = draw(st.lists(st.lists(token, max_size=5), min_size=answers, max_size=answers))
    pair = st.tuples(st.integers(0, answers - 1), st.integers(0, answers - 1)).filter(lambda p: p[0] != p[1])
    return make_row(prompt, tails, draw(st.lists(pair, min_size=1, max_size=3, unique=True)), draw(st.booleans()))


def expected(row, limits):
    """The specification on Python lists, row by row: (reason, None) or (None, (prompt length, pairs))."""
    prompt, texts = row.prompt.tolist(), [answer.tolist() for answer in row.answers]
    if any(not text for text in texts):
        return EMPTY, None
    over_prompt = 0 if limits.max_prompt_tokens is None else len(prompt) - limits.max_prompt_tokens
    over_text = max(len(text) for text in texts) - limits.max_tokens
    if over_prompt > 0 or over_text > 0:
        if not limits.truncate_left:
            return (PROMPT_TOO_LONG if over_prompt > 0 else TEXT_TOO_LONG), None
        for _ in range(max(over_prompt, over_text)):  # one token after the other, the oldest first
            at = limits.keep_first
            if any(len(sequence) <= at for sequence in [prompt, *texts]):
                return ANSWER_TOO_LONG, None
            if any(text[: at + 1] != prompt[: at + 1] for text in texts):
                return ANSWER_TOO_LONG, None
            for sequence in [prompt, *texts]:
                del sequence[at]
        if any(not text for text in texts):
            return EMPTY, None
    pairs = [
        (texts[a], texts[b], m, g)
        for (a, b), m, g in zip(row.pairs, row.margin, row.weight, strict=True)
        if texts[a] != texts[b]
    ]
    if not pairs:
        return IDENTICAL, None
    return None, (len(prompt), pairs)


limits = st.builds(
    LengthLimits,
    max_tokens=st.integers(1, 12),
    max_prompt_tokens=st.none() | st.integers(1, 6),
    truncate_left=st.booleans(),
    keep_first=st.integers(0, 1),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(rows(), max_size=8), limits)
def test_arrays_equal_the_specification_row_by_row(batch, limit):
    wanted = [expected(row, limit) for row in batch]
    data = in_memory(batch, limit)
    kept = [content for reason, content in wanted if reason is None]
    reasons = [reason for reason, _ in wanted if reason is not None]
    assert data.report["dropped"] == {reason: reasons.count(reason) for reason in set(reasons)}
    assert len(data) == data.report["kept"] == len(batch) - len(reasons) == len(kept)
    for number, (prompt_length, pairs) in enumerate(kept):
        item = data.comparison(number)
        texts = [item.text(answer).tolist() for answer in range(len(item.tails))]
        got = [
            (texts[a], texts[b], m, g)
            for (a, b), m, g in zip(item.pairs.tolist(), item.margin, item.weight, strict=True)
        ]
        assert got == pairs
        assert {answer for pair in item.pairs.tolist() for answer in pair} == set(range(len(texts)))
        assert item.prefix.tolist() == common_prefix(texts)
        assert data.prompt_length[number] == prompt_length
        assert data.tokens_N[number] == len(item.prefix) + sum(map(len, item.tails))
        assert data.logical_tokens_N[number] == sum(map(len, texts))
        assert data.pairs_N[number] == len(pairs)
        assert data.weight_N[number] == pytest.approx(sum(g for *_, g in pairs))
        start = data.answer_offset[number]
        assert data.text_length_A[start : start + len(texts)].tolist() == list(map(len, texts))
    assert data.token_offset[-1] == len(data.tokens) and data.answer_offset[-1] == len(data.tail_length)


def test_limits_are_inclusive():
    row = [4, 4, 4], [[5], [6, 6]]
    assert len(in_memory([make_row(*row)], LengthLimits(5, 3))) == 1
    assert in_memory([make_row(*row)], LengthLimits(4, 3)).report["dropped"] == {TEXT_TOO_LONG: 1}
    assert in_memory([make_row(*row)], LengthLimits(5, 2)).report["dropped"] == {PROMPT_TOO_LONG: 1}


def test_truncation_keeps_the_head_and_both_answers():
    row = make_row([1, 2, 3, 4], [[7, 8], [9]])
    item = in_memory([row], LengthLimits(4, None, True, keep_first=1)).comparison(0)
    assert item.prefix.tolist() == [1, 4] and [tail.tolist() for tail in item.tails] == [[7, 8], [9]]


def test_an_answer_that_is_a_prefix_of_the_other_has_a_tail_of_length_zero():
    item = in_memory([make_row([1, 2], [[3], [3, 4]])], LengthLimits(9)).comparison(0)
    assert item.prefix.tolist() == [1, 2, 3] and [len(tail) for tail in item.tails] == [0, 1]


def test_a_comparison_outside_the_data_is_an_error():
    data = in_memory([make_row([1], [[3], [4]])], LengthLimits(9))
    for number in (1, -1):
        with pytest.raises(IndexError):
            data.comparison(number)


def test_a_prompt_that_is_longer_than_the_common_prefix_counts_as_far_as_the_texts_share_it():
    """The rendered prompt ends in a cue (tokens 4 5) of which the texts share 4 only; a third answer ends with it."""
    prompt, texts = [1, 2, 3, 4, 5], [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8, 9], [1, 2, 3, 4]]
    row = EncodedRow(ids(*prompt), [ids(*text) for text in texts], [(0, 1), (0, 2)], [0.0] * 2, [1.0] * 2)
    data = in_memory([row], LengthLimits(9))
    assert (data.prompt_length.tolist(), data.prefix_length.tolist()) == ([5], [4])
    assert data.answer_length_A.tolist() == [2, 3, 0]
    lengths = statistics(data)["lengths"]
    assert (lengths["chosen"]["mean"], lengths["rejected"]["mean"]) == (2.0, 1.5)
    evaluated = pair_arrays(data, np.zeros(3))
    assert evaluated.chosen_length_P.tolist() == [2, 2] and evaluated.rejected_length_P.tolist() == [3, 0]


def test_common_prefix_lengths_of_real_sizes():
    rng = np.random.default_rng(0)
    flat = rng.integers(0, 2, 5000).astype(np.int32)
    a, b = rng.integers(0, 4900, 300), rng.integers(0, 4900, 300)
    longest = rng.integers(0, 100, 300)
    got = common_prefix_lengths(flat, a, b, longest)
    wanted = [len(common_prefix([flat[i : i + n].tolist(), flat[j : j + n].tolist()]))
              for i, j, n in zip(a, b, longest, strict=True)]  # fmt: skip
    assert got.tolist() == wanted


# --- texts -> ids ----------------------------------------------------------------------------------------------------


def bos_adding_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)]
    )
    return tokenizer


def test_bos_is_put_in_front_exactly_once_where_the_tokenizer_puts_it():
    encoder = TextEncoder(bos_adding_tokenizer())
    bos = encoder.bos
    assert bos == byte_tokenizer().bos_token_id
    bare, written, twice, empty = encoder.encode(["a", f"{BOS}a", f"{BOS}{BOS}a", ""])
    assert bare.tolist() == written.tolist() == [bos, 3 + ord("a")]
    assert twice.tolist() == [bos, bos, 3 + ord("a")] and empty.tolist() == [bos]
    encoder.count_answer(f"{BOS}{BOS}a{EOS}", twice)
    assert encoder.counts["doubled BOS"] == 1 and "doubled BOS in 1 of 1 answers" in encoder.warnings()[0]


def test_a_tokenizer_that_adds_nothing_is_left_alone():
    encoder = TextEncoder(byte_tokenizer())
    assert encoder.bos is None and encoder.encode(["a", ""])[1].tolist() == []


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        (f"a{EOS}", {}),
        (f"a{EOS}\n", {}),  # zephyr: the newline after EOS is the template's
        ("a", {"missing EOS": 1}),
        (f"a{EOS}{EOS}", {"doubled EOS": 1}),
        (f"a{EOS}\n{EOS}\n", {"doubled EOS": 1}),
        (f"{EOS}a", {"missing EOS": 1}),
    ],
)
def test_missing_and_doubled_eos_are_counted(text, counted):
    encoder = TextEncoder(byte_tokenizer())
    encoder.count_answer(text, encoder.encode([text])[0])
    assert {k: v for k, v in encoder.counts.items() if v and k != "answers"} == counted
    assert len(encoder.warnings()) == len(counted)


def test_text_that_spells_special_tokens_is_counted_by_row_and_token():
    encoder = TextEncoder(byte_tokenizer())
    encoder.count_content([f"say {EOS} and {EOS}", f"{PAD}"])
    encoder.count_content(["nothing < here", "<eo s>"])
    assert encoder.spelled == {EOS: 2, PAD: 1}
    (line,) = encoder.warnings()
    assert "1 rows" in line and f"{EOS} 2 times" in line


@needs_shared
def test_ids_equal_transformers_whatever_the_tokenizer_was_used_for_before():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(SHARED / "data/20B_tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|padding|>"
    )
    lines = (SHARED / "data/ci/hh_helpful_64.jsonl").read_text().splitlines()
    texts = [json.loads(line)["prompt"] + json.loads(line)["chosen"] + "<|endoftext|>" for line in lines]
    plain = tokenizer(texts, add_special_tokens=False)["input_ids"]
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(texts, padding=True, truncation=True, max_length=7)  # leaves padding and truncation switched on in Rust
    assert tokenizer.backend_tokenizer.truncation is not None  # else this test shows nothing
    assert [array.tolist() for array in TextEncoder(tokenizer).encode(texts)] == plain
    assert tokenizer_fingerprint(tokenizer) == before


# --- the padding token -----------------------------------------------------------------------------------------------


def tokenizer_with(vocabulary, byte_fallback=False, **special):
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, [], byte_fallback=byte_fallback))
    backend.add_special_tokens([t for t in vocabulary if t.startswith(("<", "["))])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.mark.parametrize(
    ("vocabulary", "fallback", "special", "token", "action"),
    [
        (["a", "</s>", "<mine>"], False, {"eos_token": "</s>", "pad_token": "<mine>"}, "<mine>", "kept"),
        (["a", "</s>", "<|padding|>"], False, {"eos_token": "</s>"}, "<|padding|>", "reserved"),
        (["a", "</s>", "[PAD]"], False, {"eos_token": "</s>", "pad_token": "</s>"}, "[PAD]", "reserved"),
        (["a", "</s>", "<|user|>", "<|reserved_special_token_4|>", "<|reserved_special_token_9|>"], False,
         {"eos_token": "</s>"}, "<|reserved_special_token_4|>", "reserved"),
        (["a", "</s>", "<unk>"], True, {"eos_token": "</s>", "unk_token": "<unk>"}, "<unk>", "unknown"),
        # without the byte fallback a text can become <unk>; markers of a template are no padding either
        (["a", "</s>", "<unk>", "<|user|>"], False, {"eos_token": "</s>", "unk_token": "<unk>"}, "<pad>", "added"),
        (["a", "</s>"], True, {"eos_token": "</s>", "unk_token": "</s>", "pad_token": "</s>"}, "<pad>", "added"),
    ],
)  # fmt: skip
def test_padding_token_differs_from_eos(vocabulary, fallback, special, token, action):
    tokenizer = tokenizer_with(vocabulary, fallback, **special)
    report = fix_padding(tokenizer)
    assert (report.token, report.action, tokenizer.pad_token) == (token, action, token)
    assert report.token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == len(vocabulary) + (action == "added")
    assert token in str(report)
    again = fix_padding(tokenizer)
    assert again.action == "kept" and again.token_id == report.token_id


def config_for(name, *more):
    return load_config(None, [f"model.name={name}", "data.train.path=synthetic", *more])


@needs_shared
def test_a_real_tokenizer_whose_padding_is_its_eos():
    said = []
    tokenizer = load_tokenizer(config_for(SHARED / "data/stories260k"), said.append)
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.eos_token_id) == ("<unk>", 0, 2)
    assert len(tokenizer) == 512 and len(said) == 1 and "<unk>" in said[0]
    assert 0 not in TextEncoder(tokenizer).encode(["any text, \u2603 and \U0001f600 too"])[0]


def test_a_tokenizer_that_cannot_be_loaded_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="there is no such directory"):
        load_tokenizer(config_for(tmp_path / "nowhere"))
    byte_tokenizer().save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut/tokenizer.json"
    file.write_bytes(file.read_bytes()[:999])
    with pytest.raises(UserError, match=r"cannot load its tokenizer.*Check that the directory"):
        load_tokenizer(config_for(tmp_path / "cut"))
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(UserError, match="no EOS token"):
        load_tokenizer(config_for(tmp_path / "endless"))


# --- the cache -------------------------------------------------------------------------------------------------------

# What a process of its own runs: builds or reads the entry `key`, and prints what it got.
CHILD = """
import sys
from pathlib import Path
import numpy as np
from rmcore.data.tokens.cache import open_or_build
from rmcore.data.tokens.comparisons import EncodedRow, lay_out

def chunk(start, count):
    made = []
    for i in range(start, start + count):
        text = np.arange(i % 7 + 1, dtype=np.int32)
        made.append(EncodedRow(text, [np.append(text, 8), np.append(text, [9, i])], [(0, 1)], [0.5], [1.0]))
    return lay_out(made)

def build(writer):
    print("building", flush=True)
    for start in range(0, 60, 20):
        writer.write(chunk(start, 20))
        if start == 20 and "--stop" in sys.argv:
            for file in writer._files.values():
                file.flush()
            print("half", flush=True)
            sys.stdin.read()  # until killed
    writer.finish(["a"], {"rows": 60})

data = open_or_build(Path(sys.argv[1]), "key", build, "test data")
print("got", data.fingerprint, len(data), int(data.tokens.sum()), flush=True)
"""


def child(root, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(root), *arguments],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def lines_of(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out.split("\n")[:-1]


def test_of_many_processes_one_builds_and_all_read_the_same(tmp_path):
    outputs = [lines_of(process) for process in [child(tmp_path) for _ in range(5)]]
    assert sum(lines.count("building") for lines in outputs) == 1
    assert len({lines[-1] for lines in outputs}) == 1 and " 60 " in outputs[0][-1]
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == ["key", "key.owner"]


def test_a_builder_killed_half_way_leaves_nothing_that_is_read(tmp_path):
    first = child(tmp_path, "--stop")
    assert [first.stdout.readline() for _ in range(2)] == ["building\n", "half\n"]
    waiter = child(tmp_path)  # waits on the lock that the first still holds, or comes after it: either way it builds
    assert [path for path in tmp_path.glob("key.building-*") if (path / "tokens.npy").stat().st_size > 128]
    assert not (tmp_path / "key").exists()
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    built = lines_of(waiter)
    assert built[0] == "building" and " 60 " in built[-1]
    assert not list(tmp_path.glob("key.building-*"))
    assert lines_of(child(tmp_path)) == built[1:]


def test_who_is_waited_for_is_said(tmp_path, monkeypatch):
    first = child(tmp_path, "--stop")
    assert [first.stdout.readline() for _ in range(2)] == ["building\n", "half\n"]
    said = []

    class KillAtTheFirstLine(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())
            os.kill(first.pid, signal.SIGKILL)

    monkeypatch.setattr("rmcore.data.tokens.cache.WAIT_SECONDS", 0.01)
    handler = KillAtTheFirstLine()
    logging.getLogger("rmcore.data.tokens.cache").addHandler(handler)
    try:
        data = open_or_build(tmp_path, "key", builder([], []), "the data")
    finally:
        logging.getLogger("rmcore.data.tokens.cache").removeHandler(handler)
        first.communicate()
    assert len(data) == 50 and f"waiting for process {first.pid} on " in said[0] and "prepare the data" in said[0]


def some_rows(count, seed=0):
    rng = random.Random(seed)
    draw = lambda most: [rng.randint(3, 6) for _ in range(rng.randint(0, most))]  # noqa: E731
    return [make_row([1, *draw(5)], [[*draw(5), 7], [*draw(5), 8]]) for _ in range(count)]


def builder(cuts, calls):
    """Writes the same 50 rows in the chunks that `cuts` makes."""

    def build(writer: CacheWriter) -> None:
        calls.append(1)
        all_rows = some_rows(50)
        for start, end in zip([0, *cuts], [*cuts, 50], strict=True):
            kept, _ = apply_limits(all_rows[start:end], LengthLimits(99))
            writer.write(lay_out(kept))
        writer.finish(["x", "y", "z"], {"rows": 50})

    return build


def test_what_is_read_is_what_was_written_in_whatever_chunks(tmp_path):
    calls = []
    one = open_or_build(tmp_path, "one", builder([], calls), "data")
    many = open_or_build(tmp_path, "many", builder([1, 1, 17, 49], calls), "data")
    memory = in_memory(some_rows(50), LengthLimits(99))
    assert one.fingerprint == many.fingerprint and len(one.fingerprint) == 32
    for name in ("tokens", "token_offset", "answer_offset", "pair_offset", "prefix_length", "tail_length", "winner",
                 "loser", "margin", "weight", "prompt_length", "source_index", "prompt_hash"):  # fmt: skip
        for other in (many, memory):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
            assert getattr(one, name).dtype == getattr(other, name).dtype
    assert isinstance(one.tokens.base, np.memmap) and one.sources == ["x", "y", "z"]
    again = open_or_build(tmp_path, "one", builder([], calls), "data")
    assert len(calls) == 2 and again.fingerprint == one.fingerprint


def test_the_bytes_of_format_3_are_pinned(tmp_path):
    """The fingerprint hashes the bytes of all arrays in order; this one was made before the labels had a table."""
    generator = np.random.default_rng(3)

    def build(writer: CacheWriter) -> None:
        made = []
        for number in range(20):
            texts = [generator.integers(0, 4, generator.integers(1, 9)).astype(np.int32) for _ in range(4)]
            pairs, ties = [(0, 1), (3, 2), (1, 3)][: number % 4], [(0, 2), (1, 2)][: number % 3]
            made.append(
                EncodedRow(
                    texts[0][:2],
                    texts,
                    pairs,
                    [0.1 * number] * len(pairs),
                    [1 / 3] * len(pairs),
                    number % 2,
                    2**63 + number,
                    ties=ties,
                    tie_weight=[0.7] * len(ties),
                    scores=[0.5, -1.0, 2.0, number / 7] if number % 2 else (),
                )
            )
        kept, _ = apply_limits(made, LengthLimits(99))
        writer.write(lay_out(kept))
        writer.finish(["a", "b"], {"rows": 20})

    data = open_or_build(tmp_path, "key", build, "data")
    assert data.fingerprint == "0055ff0994cf7cc373146eb19394661d"
    assert sorted(path.stem for path in (tmp_path / "key").glob("*.npy")) == sorted(ARRAYS)
    assert len(ARRAYS) == 18


def cut(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "array cut": lambda entry: cut(entry / "tokens.npy", 0.9),
    "array empty": lambda entry: cut(entry / "winner.npy", 0),
    "array gone": lambda entry: (entry / "margin.npy").unlink(),
    "meta gone": lambda entry: (entry / "meta.json").unlink(),
    "meta cut": lambda entry: cut(entry / "meta.json", 0.5),
    "meta not an object": lambda entry: (entry / "meta.json").write_text("[]"),
    "other format": lambda entry: (entry / "meta.json").write_text('{"format_version": 0}'),
    "header changed": lambda entry: (entry / "winner.npy").write_bytes(
        (entry / "winner.npy").read_bytes().replace(b"<i4", b"<f4")
    ),
    "bit flipped": lambda entry: flip(entry / "tokens.npy", -5),
    "margin changed": lambda entry: flip(entry / "margin.npy", -1),
    "offsets changed": lambda entry: (entry / "pair_offset.npy").write_bytes(
        (entry / "pair_offset.npy").read_bytes()[:-8] + b"\x07" + 7 * b"\x00"
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_built_anew_with_one_warning(tmp_path, caplog, damage):
    calls = []
    before = open_or_build(tmp_path, "key", builder([], calls), "the data")
    DAMAGE[damage](tmp_path / "key")
    after = open_or_build(tmp_path, "key", builder([], calls), "the data")
    assert len(calls) == 2 and after.fingerprint == before.fingerprint and len(after) == len(before)
    (warning,) = caplog.messages
    assert "damaged" in warning and "the data" in warning
    assert open_or_build(tmp_path, "key", builder([], calls), "the data") and len(calls) == 2


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def build(writer):
        writer.write(lay_out(some_rows(3)))
        raise UserError("row 4 is bad")

    with pytest.raises(UserError, match="row 4"):
        open_or_build(tmp_path, "key", build, "data")
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_cache_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache: cannot write .*file"):
        open_or_build(tmp_path / "file/cache", "key", builder([], []), "data")


# --- the first example -----------------------------------------------------------------------------------------------


def example(answers):
    encoder = TextEncoder(byte_tokenizer())
    texts = encoder.encode(["Hi", *(f"Hi{answer}" for answer in answers)])
    return in_memory([EncodedRow(texts[0], texts[1:], [(0, 1)], [0.0], [1.0])], LengthLimits(99)).comparison(0)


def shown(comparison, **options):
    file = io.StringIO()
    show_first_example(comparison, byte_tokenizer(), Console(file=file, width=40, **options))
    return file.getvalue()


def test_the_first_example_in_a_log_file_marks_the_scored_tokens():
    text = shown(example([f" yes{EOS}\n", f" no\x1b[31m{EOS}\n"]))
    assert "shared by both, 3 tokens: Hi \n" in text  # the space is common too
    assert f"chosen, 5 tokens: yes{EOS}[[\\n]]\n" in text  # zephyr's newline is what is scored
    assert f"no\\x1b[31m{EOS}[[\\n]]" in text and "\x1b" not in text
    assert "scored tokens: chosen '\\n' (id 13), rejected '\\n' (id 13)" in text


def test_the_first_example_on_a_terminal_alternates_colours():
    text = shown(example([f"A{EOS}", f"BC{EOS}"]), force_terminal=True, color_system="standard")
    assert "\x1b[2;36mH\x1b[0m\x1b[2;33mi\x1b[0m" in text  # dim cyan, dim yellow
    assert "\x1b[36mA\x1b[0m" in text and f"\x1b[1;30;42m{EOS}" in text and f"\x1b[1;37;41m{EOS}" in text


def test_an_answer_that_is_a_prefix_is_marked_in_the_shared_part():
    text = shown(example(["a", "ab"]))
    assert "shared by both, 3 tokens: Hi[[a]]" in text and "chosen, 0 tokens: \n" in text and "[[b]]" in text


@needs_shared
def test_token_texts_join_to_the_text():
    tokenizer = load_tokenizer(config_for(SHARED / "data/stories260k"))
    text = "One day, Tim saw a big dog.</s>"
    assert "".join(token_texts(tokenizer(text)["input_ids"], tokenizer)) == text
