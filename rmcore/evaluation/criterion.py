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
from rmcore.evaluation.own_metrics import own_directions

Quality = tuple[float, ...]
SOMETIMES = {metric.name for metric in EVALUATION if metric.sometimes}
DIRECTION = {metric.name: 1 if metric.better == "more" else -1 for metric in EVALUATION if metric.better}


@dataclass(frozen=True)
class Criterion:
    """Compares evaluations by their logged metrics.

    Args:
        keys: the log names of the metrics, the later ones only where the earlier ones are equal.
        signs: of each metric, 1 if more of it is better, -1 if less.
    """

    keys: tuple[str, ...]
    signs: tuple[int, ...]

    @classmethod
    def of(cls, config: Config) -> Criterion:
        """The criterion of a run: run.best_metric, else the accuracy of the main evaluation set and then its loss.

        Raises UserError, with the possible metrics, if run.best_metric cannot be a metric of the configured sets, and
        for a metric of run.metrics that does not state whether more or less of it is better.
        """
        sets, wanted = list(config.data.eval_sets) or [UNNAMED], config.run.best_metric
        if wanted is None:
            return cls((f"{prefix(sets[0])}accuracy", f"{prefix(sets[0])}loss"), (1, -1))
        own = own_directions(config.run.metrics)
        names = [metric for metric in DIRECTION if metric not in SOMETIMES] + [name for name in own if own[name]]
        usual = [prefix(name) + metric for name in sets for metric in names]
        rare = [prefix(name) + metric for name in sets for metric in DIRECTION if metric in SOMETIMES]
        metric = wanted.rpartition("/")[2]
        if own.get(metric) == 0 and wanted in [prefix(name) + metric for name in sets]:
            raise UserError(
                f"run.best_metric: {wanted} does not state whether more or less of it is better: set {metric}.better = "
                '"more" or "less" where the function is defined'
            )
        _check(wanted, usual, rare)
        return cls((wanted,), (own.get(metric) or DIRECTION[metric],))

    @property
    def name(self) -> str:
        """The log name of the metric."""
        return self.keys[0]

    def quality(self, metrics: Mapping[str, Any] | None) -> Quality | None:
        """The quality of an evaluation by its logged metrics; None without an evaluation, or if a value is NaN."""
        found = []
        for key, sign in zip(self.keys, self.signs, strict=True):
            value = (metrics or {}).get(key)
            if value is None or math.isnan(value):
                return None
            found.append(sign * value)
        return tuple(found)

    def value(self, quality: Quality) -> float:
        """The value of the first metric, of which `quality` was made."""
        return self.signs[0] * quality[0]


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
    own = [
        prefix(name) + metric
        for name in data.evals
        for metric, sign in own_directions(config.run.metrics).items()
        if sign
    ]
    _check(wanted, [key for key in found if key.rpartition("/")[2] in DIRECTION] + own)


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
