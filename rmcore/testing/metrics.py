"""Checks a metric: `check_metric(function)`.

Input: `function(rewards_A, data)`, as run.metrics takes it.
Output: nothing, or an AssertionError that says which rule it breaks.
Example: a function that returns a tensor of all margins fails with "the function must return one number".
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from rmcore.data.batches.batch import Judged
from rmcore.testing.examples import labelled, part, rewards_for, shuffled


def check_metric(function: Callable[..., Any]) -> None:
    """Raise AssertionError unless the function returns one finite number that does not depend on the order of the data.

    Args:
        function: takes the fp64 rewards [A] of all answers, and their labels. Its attribute `better`, if it has one,
            must be "more" or "less": which of them run.best_metric and run.patience look for.
    """
    better = getattr(function, "better", None)
    assert better in (None, "more", "less"), f'the attribute better must be "more" or "less", not {better!r}'
    data = labelled()
    rewards_A = rewards_for(data)
    value = _number(function, rewards_A, Judged.of(data))
    order = [5, 0, 8, 3, 7, 1, 4, 6, 2]
    others_A, batch = part(data, rewards_A, order)
    generator = torch.Generator().manual_seed(2)
    for moved in (batch, replace(batch, **shuffled(batch, generator))):
        other = _number(function, others_A, moved)
        close = math.isclose(value, other, rel_tol=1e-9, abs_tol=1e-9)
        assert close, f"the metric must not depend on the order of comparisons and pairs: {value:.6g} and {other:.6g}"


def _number(function: Callable[..., Any], rewards_A: torch.Tensor, data: Judged) -> float:
    found = function(rewards_A.clone(), data)
    try:
        value = float(found)
    except (TypeError, ValueError, RuntimeError):
        raise AssertionError(f"the function must return one number, not {type(found).__name__}") from None
    assert math.isfinite(value), f"the function must return a finite number, not {value}"
    return value
