"""Where in a run: steps, pairs, passes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """Where in the run: optimizer steps done, pairs seen, passes over the data (fractional)."""

    step: int
    episode: int
    epoch: float
