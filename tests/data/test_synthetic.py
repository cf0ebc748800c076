"""The embedded task: answers are at chance without the prompt, splits share no prompt, the tokenizer loses no byte."""

from collections import Counter

import numpy as np
import pytest

from rmcore.config import UserError
from rmcore.data.synthetic import (
    EOS,
    MAX_POSITIONS,
    SPLIT_ROWS,
    TASKS,
    byte_tokenizer,
    synthetic_rows,
)
from rmcore.model.synthetic_model import synthetic_model_config

ROWS = 4096


@pytest.fixture(scope="module")
def rows():
    return synthetic_rows(ROWS, 0, "train")


def test_rows_depend_on_the_arguments_alone(rows):
    assert synthetic_rows(50, 0, "train") == rows[:50]
    assert synthetic_rows(50, 1, "train") != rows[:50]
    with pytest.raises(UserError, match="train, test"):
        synthetic_rows(1, 0, "validation")


def test_no_prompt_is_in_both_splits_at_any_seed(rows):
    test = {row["prompt"] for seed in range(4) for row in synthetic_rows(SPLIT_ROWS["test"], seed, "test")}
    train = {row["prompt"] for row in rows} | {row["prompt"] for row in synthetic_rows(ROWS, 1, "train")}
    assert len(test) > 100 and not test & train
    for source in TASKS:
        assert sum(row["source"] == source for row in rows) > ROWS / 4


def facts(prompt):
    """The right answer, read from the prompt by another program than the one that wrote it."""
    words = prompt.replace(".", "").replace("?", "").split()
    if " came before " in prompt:
        return words[0] if words[-1] == "first" else words[3]
    return words[3] if "What colour" in prompt else words[0]


def test_chosen_is_what_the_prompt_says_and_rejected_is_not(rows):
    for row in rows:
        right = facts(row["prompt"])
        assert right in row["chosen"].replace(".", "").split()
        assert right not in row["rejected"].replace(".", "").split()
        rest = row["chosen"].replace(right, "?")
        assert row["rejected"].startswith(rest.split("?")[0]) and row["rejected"].endswith(rest.split("?")[1])


# A guess at random is right on half of 4,096 rows with a standard error of 0.0078. The best of some 60 rules looked at
# lies above one half by luck alone: 4.5 standard errors (0.035) leave a chance of 4e-4 that the best does.
LUCK = 4.5 * 0.5 / ROWS**0.5


def test_length_and_single_characters_are_at_chance(rows):
    characters = sorted({c for row in rows for c in row["chosen"] + row["rejected"]})
    rules = {"length": len, **{c: (lambda text, c=c: text.count(c)) for c in characters}}
    for name, rule in rules.items():
        signs = [np.sign(rule(row["chosen"]) - rule(row["rejected"])) for row in rows]
        assert abs(np.mean(signs)) / 2 < LUCK, name  # a tie is right half of the time


def test_no_weighing_of_answer_words_beats_chance(rows):
    words = sorted({word for row in rows for word in (row["chosen"] + row["rejected"]).split()})
    place = {word: i for i, word in enumerate(words)}
    differences = np.zeros((ROWS, len(words)))
    for i, row in enumerate(rows):
        for side, sign in (("chosen", 1), ("rejected", -1)):
            for word in row[side].split():
                differences[i, place[word]] += sign
    weights = np.zeros(len(words))
    half = ROWS // 2
    for _ in range(300):  # logistic regression on the first half: Bradley-Terry on a bag of words
        weights += differences[:half].T @ (1 / (1 + np.exp(differences[:half] @ weights))) / half * 4
    score = differences[half:] @ weights
    # half of the rows: sqrt(2) times the standard error above
    assert np.mean(score > 0) + np.mean(score == 0) / 2 < 0.5 + 4.5 * 0.5 / half**0.5


def test_both_answers_of_a_word_are_as_likely(rows):
    chosen, rejected = (Counter(row[side] for row in rows) for side in ("chosen", "rejected"))
    assert set(chosen) == set(rejected)
    for answer in chosen:  # the difference of two counts has a variance of at most their sum
        assert abs(chosen[answer] - rejected[answer]) < 4.5 * (chosen[answer] + rejected[answer]) ** 0.5


def test_the_byte_tokenizer_is_one_token_a_byte_and_reversible(tmp_path):
    tokenizer = byte_tokenizer()
    text = "".join(map(chr, [*range(0x20), *range(0x7F, 0x800, 3), 0x2603, 0x1F600])) + "  a\n\n b "
    ids = tokenizer(text)["input_ids"]
    assert ids == [3 + byte for byte in text.encode()]
    assert tokenizer.decode(ids) == text
    assert tokenizer(f"a{EOS}")["input_ids"] == [3 + ord("a"), tokenizer.eos_token_id]
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == ids and again.pad_token == tokenizer.pad_token and again.is_fast


def test_the_model_config_fits_the_tokenizer_and_survives_saving(tmp_path):
    from transformers import AutoConfig

    config, tokenizer = synthetic_model_config(), byte_tokenizer()
    assert config.vocab_size >= len(tokenizer) and config.vocab_size % 8 == 0
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (
        tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id
    )  # fmt: skip
    assert tokenizer.model_max_length == config.max_position_embeddings == MAX_POSITIONS
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict().keys() >= {"model_type"}
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == config.hidden_size
