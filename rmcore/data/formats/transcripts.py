"""Splits texts and conversations into a prompt and its continuations, and turns HH's transcripts into chat turns.

Input: the raw prompt and the raw answers of one row.
Output: a prompt, and one continuation of it per answer.
Example: "\\n\\nHuman: Hi\\n\\nAssistant:" with the answers " Hello" and " No" -> the turns [user "Hi"] and
([assistant "Hello"], [assistant "No"]).

A transcript, as in hh-rlhf, is text of "\\n\\nHuman: ..." and "\\n\\nAssistant: ..." turns, either whole or cut into
prompt and answers. Answers that begin with the prompt are cut where they begin to differ.
"""

import re
from collections.abc import Sequence
from typing import Any

from rmcore.data.formats.turns import Turns

CUE = "\n\nAssistant:"
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_ROLE = {"Human": "user", "Assistant": "assistant"}
_LAST_WORD_BACKWARDS = re.compile(r"\S*")


def is_transcript(found: Any) -> bool:
    return isinstance(found, str) and found.startswith(("\n\nHuman:", CUE))


def ends_with_cue(prompt: str) -> bool:
    return is_transcript(prompt) and prompt.rstrip().endswith(CUE)


def transcript_turns(transcript: str) -> Turns:
    """HH's text -> turns. The contents are stripped of white space, as in the published data sets in TRL's format."""
    pieces = _SPEAKER.split(transcript)  # ["", "Human", " hi", "Assistant", " hello", ...]
    return [{"role": _ROLE[s], "content": c.strip()} for s, c in zip(pieces[1::2], pieces[2::2], strict=True)]


def prompt_turns(prompt: str) -> Turns:
    """A text prompt is one user turn, unless it is a transcript. A cue at its end belongs to the turn of the answer."""
    if ends_with_cue(prompt):
        return transcript_turns(prompt)[:-1]
    return transcript_turns(prompt) if is_transcript(prompt) else [{"role": "user", "content": prompt}]


def answer_turns(prompt: str, answer: str) -> Turns:
    """The turns of a text answer to a text prompt. `prompt` is "" if the prompt is given as turns."""
    if ends_with_cue(prompt):
        return transcript_turns(CUE + answer)
    # " blue." after "The sky is": the space joins two texts and is not part of a turn (the published sets drop it).
    return [{"role": "assistant", "content": re.sub(r"^ (?=\S)", "", answer)}]


def split_turns(whole: Sequence[Turns]) -> tuple[Turns, list[Turns]]:
    """The prompt is the longest common prefix of all conversations, but each answer keeps at least one turn."""
    longest = min(map(len, whole)) - 1
    first = whole[0]
    shared = next((n for n in range(longest) if any(turns[n] != first[n] for turns in whole[1:])), longest)
    return first[:shared], [turns[shared:] for turns in whole]


def split_texts(whole: Sequence[str]) -> tuple[str, list[str]]:
    """The prompt is the common beginning of all texts, up to its last cue (transcripts) or its last white space."""
    first = whole[0]
    shared = first[: min(common_length(first, text) for text in whole[1:])]
    if all(map(is_transcript, whole)):
        cut = shared.rfind(CUE) + len(CUE) if CUE in shared else 0
    else:
        cut = len(shared) - _LAST_WORD_BACKWARDS.match(shared[::-1]).end()  # type: ignore[union-attr]
    return shared[:cut], [text[cut:] for text in whole]


def common_length(a: str, b: str) -> int:
    """The number of characters in which two texts agree at their beginning, by bisection (slices compare in C)."""
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
