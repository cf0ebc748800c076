"""Tokenises rendered texts, each common beginning once, and counts oddities of special tokens.

Input: texts.
Output: int32 arrays, exactly the ids that the tokenizer gives for each whole text.
Example: Llama's tokenizer itself puts <s> in front, so " hi" and "<s> hi" both become [1, 7251]: one BOS, never two.

The texts of one comparison begin alike. The words of byte-level BPE never cross a space between a printable ASCII
character and an ASCII letter. So the common beginning, up to such a space, is encoded once and joined with each rest:
the same ids for about half the work. Other tokenizers get whole texts.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from rmcore.data.formats.transcripts import common_length

# The words of Llama 3, Qwen 2 and related models. As in GPT-2's pattern (which `ByteLevel` has built in), no
# alternative continues from a printable character into a space, and a space before a letter always begins a word.
_CONTRACTIONS, _REST = "(?i:'s|'t|'re|'ve|'m|'ll|'d)", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD_PATTERNS = {rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}|{_REST}" for digits in ("", "{1,3}")}
_TRIES = 64  # spaces tried, from the end of the common beginning, before whole texts are encoded


class TextEncoder:
    """Rendered texts -> ids, in batches; counts oddities of special tokens.

    No special tokens are added, with one exception: if the tokenizer itself puts BOS in front of a text, each text gets
    exactly one BOS, also if the template has written it. The template writes EOS.
    `ends`: tokens at which an answer may end, besides EOS (for a chat model the end of an assistant's turn).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, ends: Iterable[str] = ()) -> None:
        stored = plain_backend_json(tokenizer)
        self._backend = plain_backend(stored)
        bare, full = self._backend.encode("a", add_special_tokens=False).ids, self._backend.encode("a").ids
        bos = tokenizer.bos_token_id
        self.bos: int | None = bos if bos is not None and full[:1] == [bos] != bare[:1] else None
        self._bos_id, self._eos = bos, (str(tokenizer.eos_token), *ends)
        # The longest name first, because one special token may begin with another.
        names = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} | set(
            tokenizer.all_special_tokens
        )
        self._special = re.compile("|".join(re.escape(n) for n in sorted(names, key=len, reverse=True)) or r"(?!)")
        self.joins = words_end_at_spaces(stored)
        self.counts: Counter[str] = Counter()
        self.spelled: Counter[str] = Counter()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text. The Rust side uses all cores unless TOKENIZERS_PARALLELISM forbids it."""
        return [self._with_bos(ids) for ids in self._encode(texts)]

    def encode_comparisons(self, comparisons: Sequence[tuple[str, Sequence[str]]]) -> list[list[np.ndarray]]:
        """For each (prompt text, full text of each answer) the ids of all of them, first those of the prompt."""
        pieces: list[str] = []
        for prompt, answers in comparisons:
            cut = common_cut(prompt, answers) if self.joins else 0
            pieces += [prompt[:cut], prompt[cut:], *(answer[cut:] for answer in answers)]
        ids = iter(self._encode(pieces))
        made = []
        for _, answers in comparisons:
            head = next(ids)
            made.append([self._with_bos(np.concatenate([head, next(ids)])) for _ in range(1 + len(answers))])
        return made

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        different = dict.fromkeys(texts, 0)  # neighbouring rows often have the same prompt
        encodings = self._backend.encode_batch_fast(list(different), add_special_tokens=False)
        lists = [encoding.ids for encoding in encodings]
        lengths = list(map(len, lists))
        flat = np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=sum(lengths))
        arrays = np.split(flat, np.cumsum(lengths[:-1])) if lists else []
        of_text: dict[str, np.ndarray] = dict(zip(different, arrays, strict=True))
        return [of_text[text] for text in texts]

    def _with_bos(self, ids: np.ndarray) -> np.ndarray:
        if self.bos is None or (len(ids) and ids[0] == self.bos):
            return ids
        return np.concatenate([np.array([self.bos], dtype=np.int32), ids])

    def count_answer(self, text: str, ids: np.ndarray) -> None:
        """Counts doubled BOS, and missing or doubled EOS, of one full text. White space may follow EOS."""
        self.counts["answers"] += 1
        if len(ids) > 1 and ids[0] == ids[1] == self._bos_id:
            self.counts["doubled BOS"] += 1
        ended = text[-200:].rstrip()
        last = next((end for end in self._eos if ended.endswith(end)), None)
        if last is None:
            self.counts["missing EOS"] += 1
        elif ended[: -len(last)].rstrip().endswith(last):
            self.counts["doubled EOS"] += 1

    def count_content(self, contents: Iterable[str]) -> None:
        """Counts special tokens in the data's own text of one comparison; the tokenizer turns each into that token."""
        found = [name for text in contents for name in self._special.findall(text)]
        if found:
            self.counts["rows that spell a special token"] += 1
            self.spelled.update(found)

    def warnings(self) -> list[str]:
        """One sentence per kind of oddity."""
        return oddities(self.counts, self.spelled)


def oddities(counts: Counter[str], spelled: Counter[str]) -> list[str]:
    """One sentence per kind of oddity that a `TextEncoder` has counted."""
    lines = []
    for kind in ("doubled BOS", "missing EOS", "doubled EOS"):
        if counts[kind]:
            lines.append(f"{kind} in {counts[kind]:,} of {counts['answers']:,} answers: check data.template")
    if spelled:
        names = ", ".join(f"{name} {count:,} times" for name, count in spelled.most_common(5))
        rows = counts["rows that spell a special token"]
        lines.append(f"the text of {rows:,} rows contains special tokens, which it becomes: {names}")
    return lines


def plain_backend_json(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The tokenizer.json of the Rust tokenizer, without the padding and truncation that earlier calls may have set."""
    stored: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return stored | {"padding": None, "truncation": None}


def plain_backend(stored: dict[str, Any]) -> Tokenizer:
    """A Rust tokenizer of its own that neither pads nor truncates, from `plain_backend_json`."""
    return Tokenizer.from_str(json.dumps(stored, ensure_ascii=False))


def words_end_at_spaces(backend: dict[str, Any]) -> bool:
    """True if the ids of a text are those of its two parts, cut as `common_cut` cuts. `backend`: a tokenizer.json.

    True for BPE over the words of GPT-2, Llama 3 or Qwen, with no normalizer except NFC, if no added token contains a
    space or swallows the space next to it. False for everything else, where it is not known.
    """
    normalizer, words, model = backend["normalizer"], backend["pre_tokenizer"], backend["model"]
    if model["type"] != "BPE" or model.get("dropout") or (normalizer is not None and normalizer["type"] != "NFC"):
        return False
    for token in backend["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"] or re.search(r"\S\s", token["content"]):
            return False
    steps = [] if words is None else words["pretokenizers"] if words["type"] == "Sequence" else [words]
    cuts_words = False
    for step in steps:
        if step["type"] == "ByteLevel":
            cuts_words |= step.get("use_regex", True)
        elif step["type"] == "Split":
            if step["pattern"].get("Regex") not in WORD_PATTERNS or step["behavior"] != "Isolated" or step["invert"]:
                return False
            cuts_words = True
        elif step["type"] != "Digits":
            return False
    return cuts_words


def common_cut(prompt: str, answers: Sequence[str]) -> int:
    """The last place up to which all texts agree and after which each continues with a space and an ASCII letter. A
    printable ASCII character precedes it. The prompt may also end there. 0 if there is no such place."""
    first = answers[0]
    limit = common_length(prompt, first)
    for other in answers[1:]:
        limit = min(limit, common_length(first[:limit], other))
    place = limit + 1
    for _ in range(_TRIES):
        place = first.rfind(" ", 1, place)
        if place < 0:
            return 0
        behind = "!" <= first[place - 1] <= "~" and (len(prompt) == place or _opens_word(prompt, place))
        if behind and all(_opens_word(answer, place) for answer in answers):
            return place
    return 0


def _opens_word(text: str, place: int) -> bool:
    following = text[place + 1 : place + 2]
    return text[place : place + 1] == " " and following.isascii() and following.isalpha()
