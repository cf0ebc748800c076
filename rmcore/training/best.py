"""Puts the weights of the best checkpoint into the model at the end of a run, to be exported.

Input: a `Run` whose steps are done, and its checkpoints.
Output: the model with the best weights, and the evaluations of these weights.
Example: run.best_metric=eval/rm/loss, and the losses 0.61, 0.58 and 0.60 after steps 10, 20 and 30: the export has the
weights of step 20.
"""

from dataclasses import dataclass
from pathlib import Path

from rmcore.checkpoint.resume import first_good, restore
from rmcore.data.batches.step_plan import Step
from rmcore.evaluation.criterion import Criterion
from rmcore.evaluation.evaluate import Evaluations
from rmcore.parallel.world import broadcast_json, first_error
from rmcore.tracking.tracker import Tracker
from rmcore.training.held_out import evaluate_run
from rmcore.training.run import Run
from rmcore.training.saver import best_steps
from rmcore.training.signals import Signals


@dataclass(frozen=True)
class Best:
    """The best checkpoint: its step, the log name of the metric, and its value."""

    step: int
    metric: str
    value: float


@dataclass(frozen=True)
class Trained:
    """The end of a training.

    Args:
        step: the last step.
        evaluations: those of the weights in the model; None if these were not evaluated.
        reason: why the run ended before its last step; empty if it did not.
        best: the best checkpoint, if the weights in the model are its weights.
    """

    step: Step
    evaluations: Evaluations | None
    reason: str = ""
    best: Best | None = None


def take_best(run: Run, end: Trained, tracker: Tracker) -> Trained:
    """With run.best_metric or run.patience, load the best checkpoint; a collective. Otherwise return `end`."""
    if not run.config.run.exports_best:
        return end
    world, criterion, root = run.world, Criterion.of(run.config), Path(run.config.run.dir) / "checkpoints"

    def ranked() -> list[int] | None:
        return best_steps(root, criterion) if world.is_main else None

    steps = broadcast_json(world, first_error(world, "looking for the best checkpoint", ranked))
    lines: list[str] = []
    candidates = [str(root / f"step-{step}") for step in steps]
    start = first_good(candidates, world, lines, quarantine=True)
    for line in lines:
        tracker.say(line)
    if start.manifest is None or start.manifest.figures is None:
        tracker.say(f"warning: no checkpoint was evaluated by {criterion.name}: the last weights are exported")
        return end
    value = start.manifest.figures[criterion.name]
    tracker.say(f"the best checkpoint is {start.checkpoint}: {criterion.name} {value:.4f}")
    evaluations = end.evaluations
    if start.step != end.step.index + 1 or evaluations is None:
        restore(start, run.strategy, world)
        evaluations = evaluate_run(run, Tracker(), run.plan.step(start.step - 1), Signals())
    return Trained(end.step, evaluations, end.reason, Best(start.step, criterion.name, value))
