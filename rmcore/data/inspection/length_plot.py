"""Plots the lengths in the data: prompts, chosen and rejected answers, and their difference.

Input: tokenised parts by name.
Output: a PNG file with two panels per part. `rmcore inspect` draws it.
Example: plot_lengths({"data.train": train}, 512, Path("runs/hh/lengths.png")).
"""

from pathlib import Path

import numpy as np

from rmcore.data.inspection.statistics import length_bias, of_pairs
from rmcore.data.tokens.comparisons import TokenizedComparisons


def plot_lengths(parts: dict[str, TokenizedComparisons], limit: int, path: Path) -> None:
    """Writes the plot; `limit` is data.max_tokens, for the title. Raises OSError if `path` cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6 * len(parts)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(parts), 2, squeeze=False)
    for (name, part), (left, right) in zip(parts.items(), axes, strict=True):
        chosen_P, rejected_P = of_pairs(part, part.answer_length_A)
        series = {"prompt": part.prompt_length, "chosen": chosen_P, "rejected": rejected_P}
        bins = np.linspace(0, max(int(values.max()) for values in series.values()) + 1, 61)
        for (label, values), colour in zip(series.items(), ("0.4", "tab:green", "tab:red"), strict=True):
            left.hist(values, bins, histtype="step", label=f"{label}, median {np.median(values):.0f}", color=colour)
        left.set(title=f"{name}: {len(chosen_P):,} pairs", xlabel="tokens", ylabel="count")
        left.legend()
        right.hist(chosen_P - rejected_P, 61, color="tab:blue")
        right.axvline(0, color="black", linewidth=0.8)
        longer = length_bias(chosen_P, rejected_P)["longer"]
        right.set(title=f"chosen is longer in {longer:.1%}", xlabel="tokens of chosen - tokens of rejected")
    figure.suptitle(f"lengths after data.max_tokens={limit}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
