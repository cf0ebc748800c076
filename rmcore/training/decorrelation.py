"""Keeps the rewards of a step uncorrelated with the lengths of the answers (ODIN), whatever the cut of the step.

Input: the micro batches of a step on this rank, before they are trained on.
Output: the part of the loss that each of them adds, and the correlation for the log.
Example: rewards [1, 2, 4] and lengths [10, 30, 20]: Pearson's correlation is 0.3273, and its derivatives with respect
to the rewards are -0.2338, 0.3507 and -0.1169; with the weight 0.5 the loss is 0.1637.

The regulariser is weight * |correlation| over the answers of the whole step, on all ranks: Chen et al., arXiv
2402.07319, eq. 4, on the one reward of this model. Its gradient is exact although no rank holds all rewards: a first
pass without gradients computes the step's rewards, six sums are reduced over the ranks, and with them the derivative d
of the regulariser with respect to each reward r is known. In the second pass a micro batch adds sum(d * r), which has
these derivatives. The first pass costs one forward more. Lengths are tokens behind the prompt.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from rmcore.data.batches.batch import RaggedBatch
from rmcore.model.reward_model import Output
from rmcore.parallel.world import all_reduce_sum
from rmcore.training.run import Run

MicroBatches = Iterator[tuple[RaggedBatch, bool]]


class Decorrelation:
    """The regulariser of one run. Everything stays on the device."""

    def __init__(self, run: Run) -> None:
        self._strategy, self._world = run.strategy, run.world
        self._weight = run.config.loss.length_decorrelation
        self._sums = torch.zeros(6, dtype=torch.float64, device=run.world.device)

    @torch.no_grad()
    def first_pass(self, micro_batches: MicroBatches) -> MicroBatches:
        """Compute the rewards of the whole step; a collective. Returns the micro batches, to be trained on."""
        batches = list(micro_batches)
        self._sums.zero_()
        for batch, _ in batches:
            with self._strategy.autocast():
                r_A = self._strategy.model(batch).rewards_A.double()
            l_A = batch.length_A.double()
            self._sums += torch.stack(
                [torch.ones_like(r_A).sum(), r_A.sum(), l_A.sum(), (r_A**2).sum(), (l_A**2).sum(), (r_A * l_A).sum()]
            )
        all_reduce_sum(self._world, self._sums)
        self._sums /= self._world.context  # all ranks that compute a row together have added its answers
        return iter(batches)

    def loss(self, output: Output, batch: RaggedBatch) -> Tensor:
        """This micro batch's part; the sum over all ranks and micro batches has the derivatives of the regulariser."""
        mean_r, mean_l, rr, ll, rl = self._centred()
        spread = (rr * ll).sqrt()
        r_A, l_A = output.rewards_A.detach().double(), batch.length_A.double()
        slope_A = ((l_A - mean_l) - rl / rr * (r_A - mean_r)) / spread * rl.sign()
        # Equal rewards or equal lengths have no correlation.
        slope_A = torch.where(spread > 0.0, slope_A, 0.0).to(output.rewards_A.dtype)
        return self._weight * (slope_A * output.rewards_A).sum()

    def logged(self) -> dict[str, float]:
        """The correlation of the last step; waits for the device."""
        _, _, rr, ll, rl = self._centred()
        spread = float((rr * ll).sqrt())
        return {"train/rm/length_correlation": float(rl) / spread} if spread > 0.0 else {}

    def _centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The two means, and the sums of the products of the deviations from them."""
        n, r, length, rr, ll, rl = self._sums.unbind()
        return r / n, length / n, rr - r * r / n, ll - length * length / n, rl - r * length / n
