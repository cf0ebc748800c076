"""Skips steps whose gradient holds NaN or Inf, on all ranks, before they change a weight.

Input: the global gradient norm of each step (the same on every rank; it is not finite if any gradient is not).
Output: an optimizer that skips the update, a warning that lists the tensors, and the end of the run after
run.max_bad_steps such steps in a row.
Example: a pair whose loss overflows at step 8 makes 3 of 31 gradients NaN. AdamW then changes neither weights nor its
averages, and step 9 continues from the weights of step 7.

AdamW's fused kernel reads `found_inf` on the device (torch/optim/adam.py), so the host does not wait. The host looks at
the counts in every step on a CPU, and in steps that log on a GPU.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

from rmcore.parallel.world import RankError, all_gather_json
from rmcore.tracking.tracker import Tracker
from rmcore.training.run import Run

LISTED = 5  # tensors in a message
# The loss of an interval is a spike if at least ENOUGH intervals precede it, and it is SPREADS standard deviations and
# FAR times above their mean.
ENOUGH, SPREADS, FAR = 8, 6.0, 1.5


class BadSteps:
    """Counts the non-finite steps of one run."""

    def __init__(self, run: Run, tracker: Tracker) -> None:
        self._run, self._tracker = run, tracker
        self._limit = run.config.run.max_bad_steps
        self._losses: deque[float] = deque(maxlen=20)
        device = run.world.device
        parameters = run.strategy.named_parameters()
        self._names, self._updated_on = list(parameters), next(iter(parameters.values())).device
        self._in_row = torch.zeros((), dtype=torch.int64, device=device)
        self._since_report = torch.zeros((), dtype=torch.int64, device=device)
        self._bad_W = torch.zeros(len(self._names), dtype=torch.bool, device=device)

    def watch(self, grad_norm: Tensor) -> None:
        """Call it before the optimizer's step: the update is skipped if the norm is NaN or infinite.

        Waits for the device only if the optimizer is not on it.
        """
        bad = ~torch.isfinite(grad_norm)
        # With parallel.offload AdamW runs on the CPU, and torch would not wait for the copy that it makes itself.
        self._run.strategy.adamw.found_inf = bad.float().to(self._updated_on)  # type: ignore[attr-defined]
        self._in_row = (self._in_row + 1) * bad
        self._since_report += bad
        self._bad_W |= ~torch.isfinite(self._run.strategy.grad_norms_W) & bad

    def note_spike(self, metrics: Mapping[str, float]) -> None:
        """Print a note if the loss of a log interval is far above those of the last twenty."""
        loss = metrics.get("train/rm/loss", math.nan)
        if len(self._losses) >= ENOUGH:
            mean, spread = statistics.mean(self._losses), statistics.stdev(self._losses)
            if loss > mean + SPREADS * spread and loss > FAR * mean:
                self._tracker.say(f"note: the loss jumped to {loss:.4f} from a mean of {mean:.4f}")
        if math.isfinite(loss):
            self._losses.append(loss)

    @property
    def in_row(self) -> int:
        """The number of non-finite steps since the last finite one; waits for the device."""
        return int(self._in_row)

    def report(self, done: int, *, logged: bool) -> None:
        """Print what was skipped; a collective if something was. Raises RankError after run.max_bad_steps in a row.

        `logged`: the step logs its metrics, so that reading the device's counts costs nothing more.
        """
        if self._run.world.reads_wait and not logged:
            return
        count = int(self._since_report)
        if not count:
            return
        mine = [self._names[place] for place in torch.nonzero(self._bad_W).flatten().tolist()]
        names = list(dict.fromkeys(name for rank in all_gather_json(self._run.world, mine) for name in rank))
        shown = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
        in_row = self.in_row
        steps = f"{count} of the steps up to {done}" if count > 1 else f"step {done}" if in_row else "a step"
        self._tracker.say(
            f"warning: {steps} skipped on all ranks: NaN or Inf in the gradient of {shown or 'the whole model'}"
        )
        self._since_report.zero_()
        self._bad_W.zero_()
        if in_row >= self._limit:
            raise RankError(
                f"{in_row} steps in a row up to step {done} had NaN or Inf in the gradient (of {shown}); all were "
                "skipped, so the weights are those before them. Look at the data of these steps, lower optim.lr, or "
                "train in parallel.precision=fp32; run.max_bad_steps sets how many may follow each other"
            )
