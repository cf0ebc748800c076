"""Compares the evaluations of a run: which one is the best, and how many came after it without an improvement.

Input: run.best_metric, and the logged metrics of an evaluation. Output: a `Quality`, of which a larger one is better;
a `Progress`, which counts.
Example: run.best_metric=eval/rm/loss and run.patience=2. The losses 0.61, 0.58, 0.60 and 0.59 have the qualities
-0.61, -0.58, -0.60 and -0.59. After the fourth, two evaluations have not improved on the second: the run ends.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rmcore.config import Config, UserError
from rmcore.config.schema import UNNAMED
from rmcore.data.prepare import PreparedData
from rmcore.evaluation.evaluate import metrics_of, own_objective
from rmcore.evaluation.metrics import EVALUATION, logged, prefix

Quality = tuple[float, ...]
SOMETIMES = {metric.name for metric in EVALUATION if metric.sometimes}
DIRECTION = {metric.name: 1 if metric.better == "more" else -1 for metric in EVALUATION if metric.better}


@dataclass(frozen=True)
class Criterion:
    """`keys`: the log names of the metrics that are compared, the later ones only where the earlier ones are equal."""

    keys: tuple[str, ...]

    @classmethod
    def of(cls, config: Config) -> Criterion:
        """The criterion of a run: run.best_metric, else the accuracy of the main evaluation set and then its loss.

        Raises UserError, with the possible metrics, if run.best_metric cannot be a metric of the configured sets.
        """
        sets = list(config.data.eval_sets) or [UNNAMED]
        if config.run.best_metric is None:
            return cls((f"{prefix(sets[0])}accuracy", f"{prefix(sets[0])}loss"))
        usual = [prefix(name) + metric for name in sets for metric in DIRECTION if metric not in SOMETIMES]
        rare = [prefix(name) + metric for name in sets for metric in DIRECTION if metric in SOMETIMES]
        _check(config.run.best_metric, usual, rare)
        return cls((config.run.best_metric,))

    @property
    def name(self) -> str:
        """The log name of the metric."""
        return self.keys[0]

    def quality(self, metrics: Mapping[str, Any] | None) -> Quality | None:
        """The quality of an evaluation by its logged metrics; None without an evaluation, or if a value is NaN."""
        found = []
        for key in self.keys:
            value = (metrics or {}).get(key)
            if value is None or math.isnan(value):
                return None
            found.append(DIRECTION[key.rpartition("/")[2]] * value)
        return tuple(found)


def check_best_metric(config: Config, data: PreparedData) -> None:
    """Raises UserError, with the possible metrics, if the evaluations of these data will not have run.best_metric.

    Some metrics need data of their kind: best_of_k_accuracy needs comparisons of three or more answers.
    """
    wanted = config.run.best_metric
    if wanted is None:
        return
    objective = own_objective(config)
    found: dict[str, float] = {}
    for name, part in data.evals.items():  # which metrics there are does not depend on the rewards
        zeros_A = np.zeros(int(part.answer_offset[-1]))
        found |= logged(metrics_of(part, zeros_A, objective, data.rewardbench.get(name)), name)
    _check(wanted, [key for key in found if key.rpartition("/")[2] in DIRECTION])


def _check(wanted: str, usual: Sequence[str], rare: Sequence[str] = ()) -> None:
    """Raises UserError if `wanted` is not among the metrics. `rare`: not listed, because only some data have them."""
    if wanted in usual or wanted in rare:
        return
    near = difflib.get_close_matches(wanted, [*usual, *rare], n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise UserError(
        f"run.best_metric: the evaluations of this run have no {wanted} by which to choose{meant}\n"
        f"choose one of {', '.join(usual)}"
    )


@dataclass(frozen=True)
class Progress:
    """How far a run has come by its criterion, from the first evaluation to the last.

    Args:
        metric: the log name of the metric, so that a changed criterion begins anew.
        best: the largest quality, at the step `step`; None before there is one.
        since: evaluations after it, none of which was better.
    """

    metric: str
    best: Quality | None = None
    step: int = 0
    since: int = 0

    @classmethod
    def restored(cls, criterion: Criterion, stored: Mapping[str, Any] | None) -> Progress:
        """The progress that a checkpoint holds; the beginning, if it holds none or one by another metric."""
        if stored is None or stored["metric"] != criterion.name:
            return cls(criterion.name)
        best = stored["best"]
        return cls(criterion.name, None if best is None else tuple(best), stored["step"], stored["since"])

    def after(self, step: int, quality: Quality | None) -> Progress:
        """The progress after one more evaluation. An equal quality does not count as an improvement."""
        if quality is not None and (self.best is None or quality > self.best):
            return Progress(self.metric, quality, step)
        return replace(self, since=self.since + 1)

    @property
    def value(self) -> float:
        """The best value of the metric; NaN before there is one."""
        return math.nan if self.best is None else self.best[0] * DIRECTION[self.metric.rpartition("/")[2]]
