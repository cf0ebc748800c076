"""Prepares text for a terminal: control characters made visible, durations. Example: ESC becomes the sign for ESC."""

CONTROL_CHARACTERS = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\n\t"} | {127: "\u2421"}


def visible(text: str) -> str:
    """Replace control characters by visible signs: an escape sequence in the data could rewrite the terminal."""
    return text.translate(CONTROL_CHARACTERS)


def clock(seconds: float) -> str:
    """A duration: 83.4 -> "0:01:23"."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
