"""Ends a run that no longer improves: early stopping by run.patience.

Input: the evaluations of the run.
Output: `over`, the same on every rank.
Example: run.patience=2 and the accuracies 0.61, 0.64, 0.63, 0.64 -> `over` after the fourth evaluation.

The count is stored in every checkpoint, so that a run that is killed and resumed ends at the same step.
"""

from dataclasses import asdict
from typing import Any

from rmcore.data.batches.step_plan import Step
from rmcore.evaluation.criterion import Criterion, Progress
from rmcore.evaluation.evaluate import Evaluations
from rmcore.parallel.world import broadcast_json
from rmcore.training.run import Run


class Patience:
    """Counts the evaluations without improvement; without run.patience it never ends a run."""

    def __init__(self, run: Run) -> None:
        self._limit, self._world = run.config.run.patience, run.world
        self.criterion = Criterion.of(run.config)
        manifest = run.start.manifest
        self._progress = Progress.restored(self.criterion, manifest.progress if manifest else None)

    def note(self, step: Step, evaluations: Evaluations | None) -> None:
        """Count the evaluations after `step`, if there are any; a collective.

        Rank 0 compares them for all ranks: ranks on unlike processors may compute means that differ in the last bit.
        """
        if evaluations is None or self._limit is None:
            return
        found = self._progress.after(step.index + 1, self.criterion.quality(evaluations.logged()))
        self._progress = Progress.restored(self.criterion, broadcast_json(self._world, asdict(found)))

    @property
    def over(self) -> bool:
        """Whether the run ends here."""
        return self._limit is not None and self._progress.since >= self._limit

    @property
    def reason(self) -> str:
        """Why the run ends here, for people; empty if it does not."""
        if not self.over:
            return ""
        best = self._progress
        found = f"since step {best.step} ({self.criterion.value(best.best):.4f})" if best.best else "in any evaluation"
        return f"stopped early: no better {best.metric} {found}, run.patience={self._limit}"

    def stored(self) -> dict[str, Any] | None:
        """What a checkpoint keeps; None without run.patience."""
        return None if self._limit is None else asdict(self._progress)
