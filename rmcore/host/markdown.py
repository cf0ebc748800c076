"""Foreign text inside Markdown: names of data sets and files become text, never markup, links or HTML.

Input: any text. Output: Markdown that renders as the text, on one line.
Example: "a|b <img src=x>" -> "a\\|b &lt;img src=x&gt;".
"""

import re

from rmcore.host.terminal import visible

# Backslashes for what CommonMark and GitHub's extensions (tables, strikethrough, math) read as markup; entities for
# HTML, mentions and bare addresses, which a backslash does not stop.
_MARKUP = {ord(character): f"\\{character}" for character in "\\`*_[]()|~$!#"}
_MARKUP |= {ord("<"): "&lt;", ord(">"): "&gt;", ord("&"): "&amp;", ord("@"): "&#64;"}


def markdown_text(text: object) -> str:
    """The text as a part of a Markdown paragraph, heading or table cell."""
    line = visible(" ".join(str(text).split())).translate(_MARKUP)
    line = line.replace("://", "&#58;//")
    return re.sub(r"(?i)\bwww\.", "www&#46;", line)


def markdown_code(text: object, info: str | None = None) -> str:
    """The text as a code span, or with `info` (a language, or "") as a fenced block; it cannot end its own fence."""
    shown = visible(str(text))
    ticks = "`" * (max((len(run) for run in re.findall("`+", shown)), default=0) + 1)
    if info is not None:
        fence = ticks if len(ticks) > 3 else "```"
        return f"{fence}{info}\n{shown}\n{fence}"
    line = " ".join(shown.split())
    return f"{ticks} {line} {ticks}" if "`" in line else f"`{line}`"
