"""Metrics of the user: functions in run.metrics, computed from the rewards of all held-out answers.

Input: an evaluation, its data, "module:function" texts.
Output: the metric `own` of the evaluation: a number by the name of each function.
Example: run.metrics=[mine:worst_margin] logs eval/rm/worst_margin, where mine.py has

    def worst_margin(rewards_A, data):
        return (rewards_A[data.winner_P] - rewards_A[data.loser_P]).min()

    worst_margin.better = "more"  # so that run.best_metric may be eval/rm/worst_margin
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rmcore.config import Config, UserError
from rmcore.data.batches.batch import Judged
from rmcore.data.tokens.comparisons import TokenizedComparisons
from rmcore.evaluation.evaluate import Evaluation
from rmcore.evaluation.metrics import EVALUATION, OWN
from rmcore.host.imports import imported
from rmcore.model.objectives import OBJECTIVES

KEY = "run.metrics"
BETTER = {"more": 1, "less": -1, None: 0}


def check_functions(config: Config) -> None:
    """Raises UserError if a function of the user, an objective or a metric, cannot be imported."""
    OBJECTIVES[config.loss.name]
    own_metrics(config.run.metrics)


def own_metrics(names: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """The functions, by the names of their metrics. Raises UserError for one that does not exist, or a name in use."""
    found: dict[str, Callable[..., Any]] = {}
    for name in names:
        short = name.replace(":", ".").rpartition(".")[2]
        if short in found or any(metric.name == short for metric in EVALUATION):
            raise UserError(f"{KEY}: there is a metric {short} already: give the function of {name} another name")
        found[short] = imported(name, KEY)
    return found


def own_directions(names: Sequence[str]) -> dict[str, int]:
    """1 for each metric of which more is better, -1 if less is, and 0 if its function does not state it.

    The function states it by its attribute `better`, "more" or "less". Raises UserError for another value.
    """
    found = {}
    for short, function in own_metrics(names).items():
        better = getattr(function, "better", None)
        if better is not None and better not in ("more", "less"):
            raise UserError(f'{KEY}: {short}.better must be "more" or "less", not {better!r}')
        found[short] = BETTER[better]
    return found


def add_own_metrics(evaluation: Evaluation, data: TokenizedComparisons, names: Sequence[str]) -> None:
    """Compute the metrics of `names` and put them into the evaluation. Every rank computes the same.

    Each function gets the fp64 rewards [A] of all answers, and the labels of the data, as objectives do. Raises
    UserError if it does not return a number.
    """
    if not names:
        return
    judged, own = Judged.of(data), {}
    for short, function in own_metrics(names).items():
        value = function(torch.from_numpy(evaluation.rewards_A.copy()), judged)
        try:
            own[short] = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"{KEY}: {short} must return a number, not {type(value).__name__}") from None
    evaluation.metrics[OWN] = own
