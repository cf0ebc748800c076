"""Tests of your own objective, metric and row reader, by the rules that rmcore holds its own ones to.

Input: a function. Output: nothing, or an AssertionError that says which rule it breaks.
Example, in your test file:

    from rmcore.testing import check_objective
    from losses import exponential

    def test_exponential():
        check_objective(exponential)
"""

from rmcore.testing.metrics import check_metric
from rmcore.testing.objectives import check_objective
from rmcore.testing.readers import check_reader

__all__ = ["check_metric", "check_objective", "check_reader"]
