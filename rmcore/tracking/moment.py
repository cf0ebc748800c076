"""Where a run is: steps, pairs, passes over the data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """`step`: optimizer steps done; `episode`: pairs seen on all ranks; `epoch`: passes over the data, fractional."""

    step: int
    episode: int
    epoch: float
