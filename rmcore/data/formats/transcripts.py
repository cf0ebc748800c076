"""Prompts and answers, as text or as chat turns, whatever mix of both a row holds.

In: the raw prompt and the K raw answers of one row. Out: a prompt and K continuations of it.
Example: "\\n\\nHuman: Hi\\n\\nAssistant:" with the answers " Hello" and " No" -> turns [user "Hi"] and
([assistant "Hello"], [assistant "No"]).

What HH calls a transcript is text of "\\n\\nHuman: ..." and "\\n\\nAssistant: ..." turns, whole or cut into prompt and
answers. Answers that repeat the prompt at their head are cut where they part.
"""

import re
from collections.abc import Sequence
from typing import Any

from rmcore.data.formats.fields import Turns

CUE = "\n\nAssistant:"
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_ROLE = {"Human": "user", "Assistant": "assistant"}
_LAST_WORD_BACKWARDS = re.compile(r"\S*")


def is_transcript(found: Any) -> bool:
    return isinstance(found, str) and found.startswith(("\n\nHuman:", CUE))


def ends_with_cue(prompt: str) -> bool:
    return is_transcript(prompt) and prompt.rstrip().endswith(CUE)


def transcript_turns(transcript: str) -> Turns:
    """HH's text -> turns, contents stripped of surrounding white space as the published trl-style sets have them."""
    pieces = _SPEAKER.split(transcript)  # ["", "Human", " hi", "Assistant", " hello", ...]
    return [{"role": _ROLE[s], "content": c.strip()} for s, c in zip(pieces[1::2], pieces[2::2], strict=True)]


def prompt_turns(prompt: str) -> Turns:
    """A text prompt is one user turn, unless it is a transcript; the cue at its end opens the answer's turn."""
    if ends_with_cue(prompt):
        return transcript_turns(prompt)[:-1]
    return transcript_turns(prompt) if is_transcript(prompt) else [{"role": "user", "content": prompt}]


def answer_turns(prompt: str, answer: str) -> Turns:
    """The turns of a text answer to a text prompt (the empty text for a prompt that is given as turns)."""
    if ends_with_cue(prompt):
        return transcript_turns(CUE + answer)
    # " blue." after "The sky is": one space joins text to text, and is no part of a turn (the published sets drop it).
    return [{"role": "assistant", "content": re.sub(r"^ (?=\S)", "", answer)}]


def split_turns(whole: Sequence[Turns]) -> tuple[Turns, list[Turns]]:
    """The longest common prefix of all conversations is the prompt; each answer keeps at least one turn."""
    longest = min(map(len, whole)) - 1
    first = whole[0]
    shared = next((n for n in range(longest) if any(turns[n] != first[n] for turns in whole[1:])), longest)
    return first[:shared], [turns[shared:] for turns in whole]


def split_texts(whole: Sequence[str]) -> tuple[str, list[str]]:
    """The common beginning of all texts up to their last cue, or (no transcripts) their last white space."""
    first = whole[0]
    shared = first[: min(common_length(first, text) for text in whole[1:])]
    if all(map(is_transcript, whole)):
        cut = shared.rfind(CUE) + len(CUE) if CUE in shared else 0
    else:
        cut = len(shared) - _LAST_WORD_BACKWARDS.match(shared[::-1]).end()  # type: ignore[union-attr]
    return shared[:cut], [text[cut:] for text in whole]


def common_length(a: str, b: str) -> int:
    """Characters in which two texts agree at their beginning, by bisection: each comparison is one of C."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
