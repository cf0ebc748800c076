"""Turns matplotlib figures into inline SVG that fits a light page, a dark page and paper, or into PNG files.

Input: a matplotlib figure. Output: SVG text that draws in the page's text colour, with ids of its own, so that a page
may contain many; or a PNG on white.
Example: figure.text drawn in INK becomes fill: currentColor, and id="patch_1" of the picture "loss" id="loss-patch_1".
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INK = "#1b1f24"  # lines in this colour take the text colour of the page
# Colours that differ on white, on black, and for red-green colour blindness.
CHOSEN, REJECTED, PLAIN, GREY = "#2f7fc1", "#e07b39", "#3a9d6e", "#8a9099"
STYLE: Any = {
    "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "legend.fontsize": 8, "legend.frameon": False,
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "axes.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": INK, "grid.alpha": 0.14,
    "grid.linewidth": 0.5, "axes.axisbelow": True, "lines.linewidth": 1.4, "text.parse_math": False,
    "svg.fonttype": "path",
}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings for the pictures, only inside the `with`. Letters missing from the font become boxes."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_figure(width: float = 5.4, height: float = 3.1) -> Any:
    """A figure of this size in inches that belongs to no window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def svg(figure: Any, name: str) -> str:
    """The figure as an <svg> element that fills the width of its container."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for size in ("width", "height"):  # only those of the element itself; its viewBox keeps the proportions
        text = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", text, count=1)
    return text


def png(figure: Any, path: Path) -> None:
    """The figure as a file, on white. Raises OSError."""
    figure.savefig(path, dpi=150, facecolor="white")


def draw_all(
    wanted: Mapping[str, tuple[Callable[[Any], Any], str]], report: Any, folder: Path | None
) -> dict[str, tuple[str, str]]:
    """{name: (SVG, caption)} of the pictures that `report` has content for; each also as a PNG in `folder`."""
    drawn: dict[str, tuple[str, str]] = {}
    with style():
        for name, (draw, caption) in wanted.items():
            figure = draw(report)
            if figure is None:
                continue
            drawn[name] = (svg(figure, name), caption)
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                png(figure, folder / f"{name}.png")
    return drawn
