"""NaN and Inf: a step whose gradient is not finite is left out, on all ranks together, before it reaches a weight.

Enters: the global gradient norm of each step (the same on every rank; it is not finite exactly if some gradient is
not). Leaves: the optimizer told to skip, a line that names the tensors, and an end to the run when it happens too
often in a row. Example: a pair whose loss overflows at step 8 makes 3 of 31 gradients NaN -> AdamW changes nothing at
step 8, not its own averages either; step 9 goes on from the weights of step 7.

AdamW's fused kernel looks at `found_inf` on the device (torch/optim/adam.py), so nothing waits for the GPU; the host
looks at every log interval there, at every step on a CPU.
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

NAMED = 5  # tensors in a message
ENOUGH, SPREADS, FAR = 8, 6.0, 1.5  # a spike: after 8 intervals, 6 standard deviations and half as much again


class BadSteps:
    """Watches the steps of one run."""

    def __init__(self, run: Run, tracker: Tracker) -> None:
        self._run, self._tracker = run, tracker
        self._limit = run.config.run.max_bad_steps
        self._losses: deque[float] = deque(maxlen=20)
        device = run.world.device
        self._names = list(run.strategy.named_parameters())
        self._in_row = torch.zeros((), dtype=torch.int64, device=device)
        self._since_told = torch.zeros((), dtype=torch.int64, device=device)
        self._bad_P = torch.zeros(len(self._names), dtype=torch.bool, device=device)

    def watch(self, grad_norm: Tensor) -> None:
        """Before the optimizer's step: let it skip the update when the norm is NaN or infinite. Never waits."""
        bad = ~torch.isfinite(grad_norm)
        self._run.strategy.adamw.found_inf = bad.float()  # type: ignore[attr-defined]
        self._in_row = (self._in_row + 1) * bad
        self._since_told += bad
        self._bad_P |= ~torch.isfinite(self._run.strategy.grad_norms_P) & bad

    def note_spike(self, figures: Mapping[str, float]) -> None:
        """Say when the loss of a log interval is far above those of the last twenty."""
        loss = figures.get("train/rm/loss", math.nan)
        if len(self._losses) >= ENOUGH:
            mean, spread = statistics.mean(self._losses), statistics.stdev(self._losses)
            if loss > mean + SPREADS * spread and loss > FAR * mean:
                self._tracker.say(f"note: the loss jumped to {loss:.4f} from a mean of {mean:.4f}")
        if math.isfinite(loss):
            self._losses.append(loss)

    @property
    def in_row(self) -> int:
        """Non-finite steps up to now without a finite one between; waits for the device."""
        return int(self._in_row)

    def report(self, done: int) -> None:
        """Say what was skipped; a collective when something was. Raises RankError after run.max_bad_steps in a row."""
        if self._run.world.device.type != "cpu" and done % self._run.config.log.every:
            return  # a look would wait for the device
        count = int(self._since_told)
        if not count:
            return
        mine = [self._names[place] for place in torch.nonzero(self._bad_P).flatten().tolist()]
        everyones = [name for rank in all_gather_json(self._run.world, mine) for name in rank]
        names = list(dict.fromkeys(everyones))
        shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        steps = f"{count} of the steps up to {done}" if count > 1 else f"step {done}" if self.in_row else "a step"
        self._tracker.say(
            f"warning: {steps} skipped on all ranks: NaN or Inf in the gradient of {shown or 'the whole'}"
        )
        self._since_told.zero_()
        self._bad_P.zero_()
        if self.in_row >= self._limit:
            raise RankError(
                f"{self.in_row} steps in a row up to step {done} had NaN or Inf in the gradient (of {shown}); all were "
                "skipped, so the weights are those before them. Look at the data of these steps, lower optim.lr, or "
                "train in parallel.precision=fp32; run.max_bad_steps sets how many may follow each other"
            )
