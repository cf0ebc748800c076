"""Makes the embedded task, path `synthetic`: preference pairs with a known right answer, and a byte tokenizer.

Input: a number of rows, a seed, a split.
Output: rows in TRL's explicit-prompt format. Example:
    {"prompt": "Anna came before Ben on Friday. Who was last?", "chosen": " Ben was.", "rejected": " Anna was.",
     "source": "order"}

The task cannot be solved without the prompt: right and wrong answers are drawn from the same distribution, so lengths,
single characters and bags of answer words are at chance. A prompt belongs to one split only, for every seed.
"""

import random
import zlib

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rmcore.config import UserError

COLOURS = ("red", "blue", "green", "white", "yellow", "purple", "pink", "cyan")
THINGS = (
    *("lamp", "coat", "door", "chair", "van", "hat", "jug", "kite"),
    *("mug", "sofa", "rug", "box", "tent", "piano", "urn", "fork"),
)
NAMES = ("Anna", "Ben", "Carl", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivan", "Jo", "Kim", "Leo")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

SPLIT_ROWS = {"train": 4096, "test": 512}  # rows of each split of the path `synthetic`
TEST_SHARE = 8  # one prompt of eight belongs to `test`
EOS, BOS, PAD = "<eos>", "<bos>", "<pad>"
MAX_POSITIONS = 512


def _colour(rng: random.Random) -> tuple[str, str, str]:
    """Which colour has the thing?"""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    right, wrong = rng.sample(COLOURS, 2)
    return f"{name} has a {right} {thing}. What colour is the {thing}?", f" It is {right}.", f" It is {wrong}."


def _owner(rng: random.Random) -> tuple[str, str, str]:
    """Who has the thing?"""
    thing, colour = rng.choice(THINGS), rng.choice(COLOURS)
    right, wrong = rng.sample(NAMES, 2)
    return f"{right} has the {colour} {thing}. Who has the {thing}?", f" {right} has it.", f" {wrong} has it."


def _order(rng: random.Random) -> tuple[str, str, str]:
    """Who was first, or last? The prompt has both names; the last word of the question decides."""
    (first, last), day = rng.sample(NAMES, 2), rng.choice(DAYS)
    asked, right, wrong = rng.choice((("first", first, last), ("last", last, first)))
    return f"{first} came before {last} on {day}. Who was {asked}?", f" {right} was.", f" {wrong} was."


TASKS = {"colour": _colour, "owner": _owner, "order": _order}


def synthetic_rows(rows: int, seed: int, split: str) -> list[dict[str, str]]:
    """`rows` rows of `split` ("train" or "test"), the same for the same arguments. No prompt is in both splits.

    `source` is the sub-task: colour, owner or order. Raises UserError for another split.
    """
    if split not in SPLIT_ROWS:
        raise UserError(f"the synthetic data has the splits {', '.join(SPLIT_ROWS)}; there is no {split!r}")
    rng = random.Random(f"rmcore synthetic {split} {seed}")
    made: list[dict[str, str]] = []
    while len(made) < rows:
        source = rng.choice(tuple(TASKS))
        prompt, chosen, rejected = TASKS[source](rng)
        if (zlib.crc32(prompt.encode()) % TEST_SHARE == 0) == (split == "test"):
            made.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "source": source})
    return made


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: ids 0-2 are <pad>, <eos>, <bos>, and byte b is 3 + b; 259 in all. It adds no BOS."""
    specials = [PAD, EOS, BOS]
    vocabulary = {token: i for i, token in enumerate([*specials, *_byte_alphabet()])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE uses for each byte, in the order of the bytes (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]
