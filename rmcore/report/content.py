"""Gathers what a report shows, for the page and the pictures.

Input: an evaluation with its data, and the log of a run. Output: a `Report`.
Example: metrics.jsonl with the lines {"episode": 64, "train/rm/loss": 0.69} and {"episode": 64, "eval/rm/loss": 0.68}
gives series("train/rm/loss") == ([64], [0.69]).
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from rmcore import __version__
from rmcore.evaluation.answer_metrics import AnswerArrays
from rmcore.evaluation.metrics import sets_of
from rmcore.evaluation.pair_metrics import PairArrays
from rmcore.evaluation.samples import SampleRow


@dataclass(frozen=True)
class Report:
    """The content of a report.

    Args:
        facts: short lines about model and data, by name.
        metrics: of the main evaluation set, and under `sets` those of every set; {} if there was no evaluation.
        drops: the counts of the data preparation for each part, as in `TokenizedComparisons.report`.
        notes: lines about the data and how rewards were computed.
        history: the lines of metrics.jsonl.
        environment: versions, machine and command.
        prompt_N: uint64, identifies the prompt of each comparison, to find it in the evaluation of another model.
    """

    title: str
    facts: Mapping[str, str]
    metrics: Mapping[str, Any]
    pairs: PairArrays | None
    answers: AnswerArrays | None
    samples: Sequence[SampleRow]
    drops: Mapping[str, Mapping[str, Any]]
    notes: Sequence[str]
    config_yaml: str
    history: Sequence[Mapping[str, Any]] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    prompt_N: np.ndarray | None = None

    @property
    def sets(self) -> list[str]:
        """The evaluation sets in the history, the main one first."""
        return sets_of(dict.fromkeys(key for line in self.history for key in line))

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Pairs seen and values of a logged metric, where the value is a finite number."""
        found = [(line["episode"], line[name]) for line in self.history if isinstance(line.get(name), int | float)]
        points = np.array(found, dtype=np.float64).reshape(-1, 2)
        points = points[np.isfinite(points).all(axis=1)]
        return points[:, 0], points[:, 1]

    @property
    def evaluated(self) -> bool:
        """Whether there are metrics of pairs."""
        return self.pairs is not None and "accuracy" in self.metrics

    @property
    def finite(self) -> bool:
        """Whether there are pairs and all rewards are finite; others cannot be drawn."""
        pairs = self.pairs
        return self.evaluated and pairs is not None and bool(np.isfinite([pairs.chosen_P, pairs.rejected_P]).all())


def read_history(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl; none if the file does not exist."""
    lines: list[dict[str, Any]] = []
    if not path.is_file():
        return lines
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("episode"), int):
            lines.append(line)
    return lines


def environment(device: str, ranks: int) -> dict[str, str]:
    """Versions, machine and command of this process."""
    return {
        "command": shlex.join(sys.orig_argv),
        "ranks": f"{ranks} x {device}",
        "rmcore": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "Python": platform.python_version(),
        "system": platform.platform(),
        "written": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }
