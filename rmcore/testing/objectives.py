"""Checks an objective: `check_objective(function)`.

Input: `function(rewards_A, data, settings)`, as loss.name takes it.
Output: nothing, or an AssertionError that says which rule it breaks, with the two numbers.
Example: a function that returns the mean over the pairs fails with "the loss must be a sum over the comparisons: 3.21
for the whole batch, but 6.02 for its parts together". With such a loss, the gradient of a step would depend on how the
step is cut into ranks and micro batches.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rmcore.model.objectives import Objective
from rmcore.testing.examples import UNLABELLED, labelled, part, rewards_for, shuffled

CUTS = ([[0, 1, 2, 3], [4, 5, 6, 7, 8]], [[number] for number in range(9)], [[8, 1, 6], [3, 5, 7], [4, 0, 2]])
# fp64: sums of some 50 terms of order 1 in another order. The rules that are broken show as 1e-3 and more.
CLOSE = 1e-9


def check_objective(function: Callable[..., Any], **settings: Any) -> None:
    """Raise AssertionError unless the function can be trained with, on any number of ranks.

    Args:
        function: takes the rewards [A], the labels of the answers, and `settings`; returns a sum, a scalar tensor.
        settings: keys of the section `loss` to test it with, such as label_smoothing=0.1.
    The rules: a differentiable scalar in the dtype of the rewards; a sum over the comparisons, whose value and gradient
    do not depend on the cut into batches, nor on the order of comparisons, pairs and ties; comparisons without labels
    and empty batches add 0; the gradient is that of finite differences (fp64); the inputs are left as they were.
    """
    objective = Objective()._replace(**settings)

    def loss(rewards_A: Tensor, batch: Any) -> Tensor:
        return function(rewards_A, batch, objective)

    data = labelled()
    every = range(len(data))
    rewards_A = rewards_for(data)
    _, batch = part(data, rewards_A, every)
    before = [rewards_A.clone(), *(value.clone() for value in vars(batch).values() if isinstance(value, Tensor))]
    whole, gradient_A = _with_gradient(loss, rewards_A, batch)
    after = [rewards_A, *(value for value in vars(batch).values() if isinstance(value, Tensor))]
    unchanged = all(torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0)) for a, b in zip(before, after, strict=True))
    assert unchanged, "the function must not change its inputs"

    for cut in CUTS:
        total, gradients_A = rewards_A.new_zeros(()), torch.zeros_like(rewards_A)
        for numbers in cut:
            value, gradient = _with_gradient(loss, *part(data, rewards_A, numbers))
            total = total + value
            index = torch.cat([torch.arange(data.answer_offset[n], data.answer_offset[n + 1]) for n in numbers])
            gradients_A[index] = gradient
        _same(
            whole,
            total,
            "the loss must be a sum over the comparisons: {} for the whole batch, but {} for its parts together",
        )
        _same(gradient_A, gradients_A, "the gradient must not depend on the cut into batches: {} and {}")

    generator = torch.Generator().manual_seed(2)
    other, again_A = _with_gradient(loss, rewards_A, replace(batch, **shuffled(batch, generator)))
    _same(whole, other, "the loss must not depend on the order of the pairs and ties: {} and {}")
    _same(gradient_A, again_A, "the gradient must not depend on the order of the pairs and ties: {} and {}")

    for numbers, what in (([], "an empty batch"), ([UNLABELLED], "a comparison without labels")):
        value, gradient = _with_gradient(loss, *part(data, rewards_A, numbers))
        _same(value, torch.zeros_like(value), f"{what} must add 0 to the loss, not {{}}")
        _same(gradient, torch.zeros_like(gradient), f"{what} must have the gradient 0, not {{}}")

    differences = _finite_differences(loss, rewards_A, batch)
    error = float((differences - gradient_A).abs().max() / (1.0 + differences.abs().max()))
    assert error < 1e-6, f"the gradient must be that of finite differences: they differ by {error:.2g} (relative)"

    half, half_A = _with_gradient(loss, rewards_A.float(), batch)
    assert half.dtype == torch.float32, f"rewards in float32 must give a loss in float32, not {half.dtype}"
    _same(whole, half.double(), "in fp32 the loss must be that of fp64: {} and {}", 1e-4)
    _same(gradient_A, half_A.double(), "in fp32 the gradient must be that of fp64: {} and {}", 1e-4)


def _with_gradient(loss: Callable[..., Any], rewards_A: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """The loss and its gradient with respect to the rewards."""
    leaf_A = rewards_A.detach().requires_grad_()
    given_A = leaf_A * 1.0  # not a leaf, as in training
    value = loss(given_A, batch)
    assert torch.equal(given_A.detach(), leaf_A.detach()), "the function must not change its inputs"
    is_scalar = isinstance(value, Tensor) and value.ndim == 0
    assert is_scalar, f"the function must return a scalar tensor, not {getattr(value, 'shape', type(value).__name__)}"
    assert bool(torch.isfinite(value)), f"the loss must be finite for finite rewards, not {float(value)}"
    if not value.requires_grad:
        assert len(batch.winner_P) + len(batch.tie_a_Q) == 0 or not len(rewards_A), (
            "the loss must be differentiable with respect to the rewards: it does not depend on them"
        )
        return value.detach(), torch.zeros_like(rewards_A)
    (gradient_A,) = torch.autograd.grad(value, leaf_A, allow_unused=True)
    gradient_A = torch.zeros_like(rewards_A) if gradient_A is None else gradient_A
    assert bool(torch.isfinite(gradient_A).all()), "the gradient must be finite for finite rewards"
    return value.detach(), gradient_A


def _finite_differences(loss: Callable[..., Any], rewards_A: Tensor, batch: Any, step: float = 1e-5) -> Tensor:
    """[A]: (loss(r + step) - loss(r - step)) / (2 step) for each reward by itself."""
    moves = step * torch.eye(len(rewards_A), dtype=torch.float64)
    with torch.no_grad():
        moved = [(loss(rewards_A + move_A, batch), loss(rewards_A - move_A, batch)) for move_A in moves]
    return torch.stack([(above - below) / (2 * step) for above, below in moved])


def _same(first: Tensor, second: Tensor, words: str, close: float = CLOSE) -> None:
    difference = (first - second).abs()
    if bool((difference <= close * (1.0 + second.abs())).all()):
        return
    worst = int(difference.flatten().argmax())
    shown = (f"{float(values.flatten()[worst]):.6g}" for values in (first, second))
    raise AssertionError(words.format(*shown))
