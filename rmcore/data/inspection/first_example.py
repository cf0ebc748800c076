"""Prints a training example token by token, and marks the two tokens whose scores become the rewards.

Input: one TokenizedComparison.
Output, on a terminal: neighbouring tokens in alternating colours, the shared prompt dim, the scored tokens on a
coloured background. In a log file: the same text with the scored tokens in double brackets. Example (zephyr):
    chosen, 4 tokens: Paris.</s>[[\\n]]
    scored tokens: chosen '\\n' (id 13), rejected '\\n' (id 13)
"""

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from rmcore.data.tokens.comparisons import TokenizedComparison

STYLES = ("cyan", "yellow")
SCORED_STYLE = {"chosen": "bold black on green", "rejected": "bold white on red"}


def show_first_example(comparison: TokenizedComparison, tokenizer: PreTrainedTokenizerFast, console: Console) -> None:
    """Prints the first pair of `comparison`, or its first two answers if none is preferred."""
    answers = {f"answer {k + 1}": k for k in range(len(comparison.tails))[:2]}
    if len(comparison.pairs):
        answers = {name: int(answer) for name, answer in zip(SCORED_STYLE, comparison.pairs[0], strict=True)}
    pieces = {name: token_texts(comparison.text(answer), tokenizer) for name, answer in answers.items()}
    shared = len(comparison.prefix)
    # An answer without tokens of its own is a prefix of the other: it is scored on the last shared token.
    on_shared = [name for name, answer in answers.items() if len(comparison.tails[answer]) == 0]
    _show(
        console,
        f"shared by both, {shared} tokens" if len(answers) > 1 else f"{shared} tokens",
        next(iter(pieces.values()))[:shared],
        0,
        on_shared[0] if on_shared else None,
        "dim ",
    )
    for name, answer in answers.items():
        scored = None if name in on_shared else name
        _show(console, f"{name}, {len(comparison.tails[answer])} tokens", pieces[name][shared:], shared, scored)
    last = {name: int(comparison.text(answer)[-1]) for name, answer in answers.items()}
    marks = ", ".join(f"{name} {pieces[name][-1]!r} (id {last[name]})" for name in answers)
    console.print(f"scored tokens: {marks}", markup=False, highlight=False, emoji=False, soft_wrap=True)


def token_texts(ids: np.ndarray | Sequence[int], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text that each token adds to the text before it. A token that is part of a character becomes U+FFFD."""
    texts: list[str] = []
    before: list[int] = []
    for token in map(int, ids):
        # Some decoders drop the space in front of a single token, so it is decoded together with its predecessor.
        head, both, alone = (str(tokenizer.decode(some)) for some in (before, [*before, token], [token]))
        texts.append(both[len(head) :] if before and both.startswith(head) else alone)
        before = [token]
    return texts


def _show(console: Console, title: str, pieces: list[str], first: int, scored: str | None, shade: str = "") -> None:
    """Prints tokens after a title. `scored`: the answer whose scored token is the last of them, if any."""
    line = Text()  # printed at once: a notebook shows each print as a block of its own
    line.append(f"{title}: ", "bold" if console.is_terminal else None)
    for number, piece in enumerate(pieces):
        if scored is None or number < len(pieces) - 1:
            line.append(_printable(piece), shade + STYLES[(first + number) % 2])
        elif console.is_terminal and not console.no_color:
            line.append(repr(piece)[1:-1], SCORED_STYLE.get(scored, SCORED_STYLE["chosen"]))
        else:
            line.append(f"[[{repr(piece)[1:-1]}]]")
    console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)


def _printable(text: str) -> str:
    """Escapes control characters, so that terminal escapes in the data have no effect."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
