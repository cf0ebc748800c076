"""Sums training metrics on the device while steps run, and reduces them over the ranks once per log interval.

Input: the output and batch of each micro batch, the gradient norm of each step. Output: a dict of metrics by name, the
same on every rank; `TRAINING` in rmcore/evaluation/metrics.py explains them.
Example: rank 0 saw 3 pairs with losses 0.2, 0.4, 0.6 and rank 1 one pair with loss 1.2. `train/rm/loss` is
(0.2 + 0.4 + 0.6 + 1.2) / 4 = 0.6; the mean of the ranks' means would be 0.8.

Every mean is a sum over all ranks divided by a count over all ranks, never a mean of means. Means over pairs are
weighted by the pairs' weights, so that the two directions of a soft label count once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from rmcore.cost.machines import device_peak_flops
from rmcore.parallel.world import World, all_reduce_sum

# The sums on the device, in this order; for the reduction the counts of the host follow in the same vector.
DEVICE_SUMS = ("loss", "counted", "weight", "correct", "chosen", "rejected", "grad_norm", "skipped")
HOST_SUMS = ("pairs", "computed_tokens", "logical_tokens", "steps", "seconds")
LANGUAGE_SUMS = ("language_loss", "language_tokens")  # with loss.sft, behind the others
EVERY_RANK_THE_SAME = (
    "grad_norm",
    "skipped",
    "steps",
    "seconds",
)  # summed over the ranks, then divided by their number


class Paired(Protocol):
    """The part of a micro batch that metrics read; `rmcore.data.batches.batch.RaggedBatch` has it."""

    @property
    def winner_P(self) -> Tensor: ...
    @property
    def loser_P(self) -> Tensor: ...
    @property
    def weight_P(self) -> Tensor: ...
    @property
    def computed_tokens(self) -> int: ...
    @property
    def logical_tokens(self) -> int: ...
    @property
    def language_token_M(self) -> Tensor | None: ...


class Rewarded(Protocol):
    """The part of a forward's output that metrics read: the summed loss, its count, and every answer's reward."""

    @property
    def loss_sum(self) -> Tensor: ...
    @property
    def counted(self) -> Tensor: ...
    @property
    def rewards_A(self) -> Tensor: ...
    @property
    def language_sum(self) -> Tensor | None: ...
    @property
    def balance_sum(self) -> Tensor | None: ...
    @property
    def balance_counted(self) -> Tensor | None: ...


class Metrics:
    """Accumulators of one rank, in fp64 on `world.device`; `add` and `add_step` never wait for the device.

    Args:
        world: this process.
        flops_per_token: training FLOPs of one computed token (`Run.flops_per_token`), needed for `mfu`. `mfu` is
            reported only on devices whose peak is known.
        language: also the language-modelling loss of the chosen answers.
        earlier: the sums of an incomplete log interval from a checkpoint (`interval`).
        losses: the names of the objectives, where there are several.
        balance: also the balance of the experts.
    """

    def __init__(
        self,
        world: World,
        flops_per_token: float | None = None,
        earlier: Sequence[float | None] = (),
        losses: Sequence[str] = (),
        language: bool = False,
        balance: bool = False,
    ) -> None:
        self._world, self._losses = world, tuple(losses) if len(losses) > 1 else ()
        self._language = torch.zeros(2 if language else 0, dtype=torch.float64, device=world.device)
        self._names = (*DEVICE_SUMS, *(f"{kind} {name}" for kind in ("loss", "counted") for name in self._losses))
        self._balance = balance
        self._names += ("balance", "balance_counted") if balance else ()
        self._every = self._names + HOST_SUMS + (LANGUAGE_SUMS if language else ())
        same_version = len(earlier) == len(self._every)  # a former version may have summed other things
        self._earlier = [math.nan if value is None else value for value in earlier] if same_version else []
        self._sums = torch.zeros(len(self._names), dtype=torch.float64, device=world.device)
        self._flops_per_token = flops_per_token
        self._peak = device_peak_flops(world.device)
        self._pairs = self._computed_tokens = self._logical_tokens = self._steps = 0
        self._paused_seconds = 0.0
        self._started = time.perf_counter()

    def add(self, output: Rewarded, batch: Paired) -> None:
        """Add the pairs, losses, rewards and tokens of one micro batch, which may have no pairs.

        Of the ranks that compute a row together, the first one does.
        """
        if not self._world.leads_group:
            return
        rewards_A = output.rewards_A.detach().double()
        chosen_P, rejected_P = rewards_A[batch.winner_P], rewards_A[batch.loser_P]
        weight_P = batch.weight_P.double()
        loss, counted = output.loss_sum.detach().double(), output.counted.double()
        if self._losses:  # each objective has its own sum and count; those of a single one stay 0
            self._sums[len(DEVICE_SUMS) :][: 2 * len(self._losses)] += torch.cat([loss, counted])
            loss = counted = torch.zeros_like(weight_P.sum())
        if self._balance and output.balance_sum is not None and output.balance_counted is not None:
            self._sums[-2:] += torch.stack([output.balance_sum.detach().double(), output.balance_counted.double()])
        self._sums[:6] += torch.stack(
            [
                loss,
                counted,
                weight_P.sum(),
                (weight_P * (chosen_P > rejected_P)).sum(),
                (weight_P * chosen_P).sum(),
                (weight_P * rejected_P).sum(),
            ]
        )
        if len(self._language) and output.language_sum is not None and batch.language_token_M is not None:
            self._language[0] += output.language_sum.detach().double()
            self._language[1] += batch.language_token_M.numel()
        self._pairs += batch.winner_P.numel()
        self._computed_tokens += batch.computed_tokens
        self._logical_tokens += batch.logical_tokens

    def add_step(self, grad_norm: Tensor | None = None) -> None:
        """Add one optimizer step and its global gradient norm (a scalar tensor, the same on every rank).

        A step whose norm is NaN or Inf counts as skipped, and its norm is left out of the mean.
        """
        self._steps += 1
        if grad_norm is not None:
            norm = grad_norm.detach().double()
            good = torch.isfinite(norm)
            self._sums[6 : len(DEVICE_SUMS)] += torch.stack([torch.where(good, norm, 0.0), (~good).double()])

    @contextmanager
    def clock_paused(self) -> Iterator[None]:
        """Leave the time spent inside (evaluation, saving) out of the rates."""
        paused = time.perf_counter()
        try:
            yield
        finally:
            self._paused_seconds += time.perf_counter() - paused

    def reduce(self) -> dict[str, float]:
        """The metrics since the last call, over all ranks; then all sums start from zero. A collective.

        A metric whose count is 0 is left out.
        """
        waited, ranks = time.perf_counter(), self._world.size
        total = self._total(waited)
        metrics = _metrics(total, ranks)
        metrics |= joint_loss({name: (total[f"loss {name}"], total[f"counted {name}"]) for name in self._losses})
        if self._flops_per_token and self._peak and "tokens_per_second" in metrics:
            metrics["mfu"] = metrics["tokens_per_second"] * self._flops_per_token / (self._peak * ranks)
        self._sums.zero_()
        self._language.zero_()
        self._pairs = self._computed_tokens = self._logical_tokens = self._steps = 0
        self._paused_seconds = 0.0
        self._started = waited
        self._earlier = []
        return metrics

    def interval(self) -> list[float]:
        """The sums of the interval so far, over all ranks; a checkpoint keeps them for any world size. A collective."""
        total = self._total(time.perf_counter())
        return [value / self._world.size if name in EVERY_RANK_THE_SAME else value for name, value in total.items()]

    def _total(self, now: float) -> dict[str, float]:
        seconds = now - self._started - self._paused_seconds
        host = [self._pairs, self._computed_tokens, self._logical_tokens, self._steps, seconds]
        host_sums = torch.tensor(host, dtype=torch.float64).to(self._sums.device)
        values = all_reduce_sum(self._world, torch.cat([self._sums, host_sums, self._language])).tolist()
        total = dict(zip(self._every, values, strict=True))
        for name, value in zip(total, self._earlier, strict=False):
            total[name] += value * self._world.size if name in EVERY_RANK_THE_SAME else value
        return total


def joint_loss(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The mean of each of several objectives (sum, count), by name, and their sum; {} for a single objective."""
    means = {f"train/loss/{name}": loss / count for name, (loss, count) in sums.items() if count}
    return {"train/rm/loss": sum(means.values()), **means} if means else {}


def _metrics(total: dict[str, float], ranks: int) -> dict[str, float]:
    pairs, weight, tokens = total["pairs"], total["weight"], total["computed_tokens"]
    steps, seconds = total["steps"], total["seconds"] / ranks  # the mean of the ranks' clocks
    metrics: dict[str, float] = {}
    if weight:
        metrics["train/rm/accuracy"] = total["correct"] / weight
        metrics["train/rm/chosen_rewards"] = total["chosen"] / weight
        metrics["train/rm/rejected_rewards"] = total["rejected"] / weight
        metrics["train/rm/reward_margin"] = (total["chosen"] - total["rejected"]) / weight
    if total["counted"]:
        metrics["train/rm/loss"] = total["loss"] / total["counted"]
    if total.get("balance_counted"):
        metrics["train/rm/router_balance"] = total["balance"] / total["balance_counted"]
    if total.get("language_tokens"):
        metrics["train/rm/sft_loss"] = total["language_loss"] / total["language_tokens"]
    if steps:
        metrics["train/skipped_steps"] = total["skipped"] / ranks
        if steps > total["skipped"]:
            metrics["grad_norm"] = total["grad_norm"] / (steps - total["skipped"])
        metrics["step_seconds"] = seconds / (steps / ranks)
    if tokens:
        metrics["sharing_ratio"] = total["logical_tokens"] / tokens
    if seconds > 0 and tokens:
        metrics["tokens_per_second"] = tokens / seconds
        metrics["logical_tokens_per_second"] = total["logical_tokens"] / seconds
        metrics["pairs_per_second"] = pairs / seconds
    return metrics
