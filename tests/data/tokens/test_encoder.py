"""Encoding the common beginning of a comparison's texts only once gives the ids of each whole text."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rmcore.data.formats.transcripts import common_length
from rmcore.data.synthetic import byte_tokenizer
from rmcore.data.tokens.encoder import WORD_PATTERNS, TextEncoder, common_cut
from tests.harness.paths import SHARED, needs_shared

CORPUS = [
    "the cat sat on the mat. It's   the dog's mat, isn't it?\n\nUser: no 12345 dogs!",
    "a\n b\r\nthe  the\tthe é",
] * 9


def trained(pre_tokenizer, normalizer=None, added=()):
    """A byte-level BPE with real merges over CORPUS, and those words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    backend.add_special_tokens(["<eos>", "<|user|>", *added])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def split(pattern):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False, use_regex=True)])
JOINING = {
    "gpt2": trained(pre_tokenizers.ByteLevel(False)),
    "neox": trained(pre_tokenizers.ByteLevel(False), normalizers.NFC(), ["  ", "   "]),
    "digits": trained(DIGITS),
    **{f"words {number}": trained(split(pattern)) for number, pattern in enumerate(sorted(WORD_PATTERNS))},
}
PIECES = st.sampled_from(
    [" ", "  ", "\n", "\n\n", "\t", "the", " the", " cat", "cat", "s", "'s", " 's", "'S", "1", "123", ".", "?!", " .",
     "é", "e\u0301", "\u0301", " \u0301", "\u00a0", "\u3000", "字", "<eos>", "<|user|>", "User:", " User", "\x00",
     "\U0001f600", "_"]
)  # fmt: skip
TEXT = st.lists(PIECES, max_size=12).map("".join)


@pytest.mark.parametrize("name", JOINING)
@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT, st.lists(TEXT, min_size=1, max_size=4)), min_size=1, max_size=3))
def test_joined_ids_are_those_of_whole_texts(name, drawn):
    encoder = TextEncoder(JOINING[name])
    assert encoder.joins
    comparisons = [(head + tail, [head + answer for answer in answers]) for head, tail, answers in drawn]
    for (prompt, answers), got in zip(comparisons, encoder.encode_comparisons(comparisons), strict=True):
        assert [ids.tolist() for ids in got] == [ids.tolist() for ids in encoder.encode([prompt, *answers])]


def test_what_is_not_shown_to_join_is_encoded_whole():
    byte_level = pre_tokenizers.ByteLevel(False)
    for tokenizer in (
        trained(pre_tokenizers.Metaspace()),
        trained(byte_level, normalizers.NFKC()),
        trained(byte_level, None, [AddedToken("<x>", rstrip=True)]),
        trained(byte_level, None, [AddedToken("<x>", lstrip=True)]),
        trained(byte_level, None, ["two words"]),
        trained(split(r"\w+ \w+|.")),
        byte_tokenizer(),  # one word from end to end
    ):
        encoder = TextEncoder(tokenizer)
        assert not encoder.joins
        got = encoder.encode_comparisons([("the cat", ["the cat sat", "the cat is"])])[0]
        assert [a.tolist() for a in got] == [
            a.tolist() for a in encoder.encode(["the cat", "the cat sat", "the cat is"])
        ]


def test_where_texts_are_cut():
    assert common_cut("a cat", ["a cat sat", "a cat is"]) == 5  # the prompt ends where the answers go on
    assert common_cut("a cat ", ["a cat sat", "a cat is"]) == 1  # "a cat" + " sat", but the prompt ends with a space
    assert common_cut("x", ["a cat", "a dog"]) == 0
    assert common_cut("a  cat", ["a  cat b", "a  cat c"]) == 6
    assert common_cut("", ["", ""]) == 0


@given(st.text(alphabet="ab", max_size=9), st.text(alphabet="ab", max_size=9))
def test_common_length(a, b):
    wanted = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_length(a, b) == wanted


@needs_shared
def test_real_rows_with_a_real_tokenizer():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(SHARED / "data/20B_tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|padding|>"
    )
    encoder = TextEncoder(tokenizer)
    assert encoder.joins
    comparisons = []
    for name in ("hh_harmless_base", "pandalm_test", "rmbench_no_math"):
        with gzip.open(SHARED / f"data/pairs/{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line, _ in zip(lines, range(300), strict=False)]
        comparisons += [(r["prompt"], [r["prompt"] + r[side] + "<|endoftext|>" for side in ("chosen", "rejected")])
                        for r in rows]  # fmt: skip
    shared = sum(common_cut(*one) > 0 for one in comparisons)
    assert shared > len(comparisons) / 2  # else this test shows little
    for (prompt, answers), got in zip(comparisons, encoder.encode_comparisons(comparisons), strict=True):
        assert [ids.tolist() for ids in got] == tokenizer([prompt, *answers], add_special_tokens=False)["input_ids"]
