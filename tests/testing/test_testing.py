"""`rmcore.testing`: rmcore's own functions pass, and each broken rule is found."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rmcore.model.objectives import OBJECTIVES
from rmcore.testing import check_metric, check_objective, check_reader


def margins(rewards_A: Any, data: Any) -> Any:
    return rewards_A[data.winner_P] - rewards_A[data.loser_P]


def bradley_terry(rewards_A: Any, data: Any, settings: Any) -> Any:
    return F.softplus(-margins(rewards_A, data)).sum()


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - {"quantile_regression"}))  # it reads several outputs
def test_the_objectives_of_rmcore_pass(name: str) -> None:
    check_objective(OBJECTIVES[name])


def test_the_example_and_settings_pass() -> None:
    check_objective(bradley_terry)
    check_objective(OBJECTIVES["bradley_terry"], label_smoothing=0.1, centering=0.01)


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("must be a sum over the comparisons", lambda r, d, s: bradley_terry(r, d, s) / max(1, len(d.winner_P))),
        ("must be a sum over the comparisons", lambda r, d, s: bradley_terry(r, d, s) + r.logsumexp(0)),
        ("the order of the pairs", lambda r, d, s: by_place(r, d)),
        ("must return a scalar tensor, not torch.Size", lambda r, d, s: margins(r, d)),
        ("must return a scalar tensor, not float", lambda r, d, s: float(bradley_terry(r, d, s))),
        ("must be differentiable", lambda r, d, s: bradley_terry(r.detach(), d, s)),
        ("that of finite differences", lambda r, d, s: 2 * bradley_terry(r.detach(), d, s) - bradley_terry(r, d, s)),
        ("a comparison without labels must add 0", lambda r, d, s: bradley_terry(r, d, s) + (r * r).sum()),
        ("must not change its inputs", lambda r, d, s: bradley_terry(r.mul_(2.0), d, s)),
        ("must not change its inputs", lambda r, d, s: (margins(r, d) * d.weight_P.mul_(2.0)).sum()),
        ("must be finite", lambda r, d, s: torch.exp(400 * margins(r, d)).sum()),
        ("a loss in float32", lambda r, d, s: bradley_terry(r.double(), d, s)),
        ("in fp32 the .* must be that of fp64", lambda r, d, s: F.softplus(margins(r + 3e4, d)).sum()),
    ],
)
def test_each_broken_rule_of_an_objective_is_found(words: str, wrong: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError, match=words):
        check_objective(wrong)


def by_place(rewards_A: Any, data: Any) -> Any:
    """Counts the first pair of each comparison only: right for every cut, wrong in another order of the pairs."""
    first = [n == 0 or not same_list(data, n - 1, n) for n in range(len(data.winner_P))]
    return F.softplus(-margins(rewards_A, data))[torch.tensor(first, dtype=torch.bool)].sum()


def same_list(data: Any, one: int, other: int) -> bool:
    starts = torch.from_numpy(data.answers_C).cumsum(0)
    places = torch.bucketize(torch.stack([data.winner_P[one], data.winner_P[other]]), starts, right=True)
    return bool(places[0] == places[1])


def test_metrics() -> None:
    check_metric(lambda rewards_A, data: margins(rewards_A, data).min())
    with pytest.raises(AssertionError, match="must return one number"):
        check_metric(margins)
    with pytest.raises(AssertionError, match="must not depend on the order"):
        check_metric(lambda rewards_A, data: margins(rewards_A, data)[0])
    with pytest.raises(AssertionError, match="a finite number"):
        check_metric(lambda rewards_A, data: float("nan"))

    def smallest(rewards_A: Any, data: Any) -> Any:
        return margins(rewards_A, data).min()

    for better in ("more", "less"):
        smallest.better = better  # type: ignore[attr-defined]
        check_metric(smallest)
    smallest.better = "higher"  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match='better must be "more" or "less", not \'higher\''):
        check_metric(smallest)


def test_readers() -> None:
    rows = [{"q": "2+2?", "good": "4", "bad": "5"}, {"q": "Why?", "good": "So.", "bad": "No."}]

    def right(row: Any) -> Any:
        return {"prompt": row.pop("q"), "chosen": row["good"], "rejected": row["bad"]}

    assert check_reader(right, rows) == "explicit prompt, text"
    assert rows[0]["q"] == "2+2?"
    with pytest.raises(AssertionError, match="row 1: the function must return a dict, not NoneType"):
        check_reader(lambda row: None, rows)
    with pytest.raises(AssertionError, match="need chosen and rejected"):
        check_reader(lambda row: row, rows)
    with pytest.raises(AssertionError, match="row 2: chosen must be text"):
        check_reader(lambda row: right(row) | ({"chosen": 3} if row["good"] == "So." else {}), rows)
    count = iter(range(9))
    with pytest.raises(AssertionError, match="the same for the same row"):
        check_reader(lambda row: right(row) | {"id": next(count)}, rows)
