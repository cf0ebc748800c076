"""Text for a terminal: control characters made visible, durations, and output that may fail without ending a program.

Input: text, or the standard streams of the process. Output: text, or streams that write what can be written.
Example: ESC becomes the sign for ESC, a right-to-left override "\\u202e"; an emoji on a console in GBK becomes
"\\U0001f600".
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

# C0 and DEL as their signs. C1, which terminals obey as they obey ESC, the characters that reorder the line around them
# (Unicode standard annex 9) and the Unicode line separators as escapes.
CONTROL_CHARACTERS = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\n\t"} | {127: "\u2421"}
CONTROL_CHARACTERS |= {c: f"\\x{c:02x}" for c in range(0x80, 0xA0)}
CONTROL_CHARACTERS |= {
    c: f"\\u{c:04x}" for first, last in ((0x2028, 0x202E), (0x2066, 0x206F)) for c in range(first, last + 1)
}


def visible(text: str) -> str:
    """Replace control characters by visible signs: an escape sequence in the data could rewrite the terminal."""
    return text if text.isascii() and text.isprintable() else text.translate(CONTROL_CHARACTERS)


def one_line(text: object, most: int = 300) -> str:
    """A foreign text, such as the message of a library, as part of a line: white space joined, at most `most` long."""
    line = visible(" ".join(str(text).split()))
    return line if len(line) <= most else f"{line[: most - 4]} ..."


def print_text(text: object, file: TextIO | None = None, *, flush: bool = False) -> None:
    """Print a line or more, made `visible`, to standard output or `file`.

    All of rmcore prints by this function or by a rich console, because any message may contain names and texts of data,
    models and templates.
    """
    print(visible(str(text)), file=file, flush=flush)


def clock(seconds: float) -> str:
    """A duration: 83.4 -> "0:01:23"."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def escape_what_cannot_be_encoded() -> None:
    """Write characters that the encoding of standard output or error lacks as escapes; Python would raise an error."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # None, or a stream of another kind
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def survive_lost_output() -> None:
    """Let the program continue when standard output or error cannot be written, because its work matters more.

    When a pipe or a terminal is closed, the rest of the output goes nowhere. On a full disk, what cannot be written is
    lost, and output continues when there is room again.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Survivor):
            setattr(sys, name, _Survivor(stream))


def discard_output() -> None:
    """Send the rest of standard output nowhere, so that Python does not fail to write it when it exits."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it is closed, or no file
        _send_nowhere(sys.stdout)


def _send_nowhere(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class _Survivor:
    """A stream that behaves as `stream`, except that writing never raises OSError."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._survived():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._survived():
            self._stream.flush()

    @contextlib.contextmanager
    def _survived(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                _send_nowhere(self._stream)
