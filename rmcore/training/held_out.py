"""Evaluates a run on its held-out comparisons, between two steps of training.

Input: a `Run`, and the step that was just done.
Output: an `Evaluation`; its metrics and sample rows also go to the tracker.
Example: 100 steps and run.evals=4 -> evaluations after steps 25, 50, 75 and 100.
"""

from rmcore.config.loss import LossConfig
from rmcore.data.batches.step_plan import Step
from rmcore.evaluation.evaluate import Evaluation, evaluate
from rmcore.evaluation.samples import sample_rows
from rmcore.model.objectives import Objective
from rmcore.tracking.tracker import Tracker
from rmcore.training.run import Run, moment_after
from rmcore.training.signals import EvaluationGivenUp, Signals, give_up_if_stopped


def evaluation_steps(steps: int, evals: int) -> set[int]:
    """The numbers of steps after which to evaluate: evenly spread, the last one at the end."""
    return {round(steps * (place + 1) / evals) for place in range(evals)} - {0}


def evaluate_run(run: Run, tracker: Tracker, step: Step, signals: Signals) -> Evaluation | None:
    """Evaluate every held-out comparison once, over all ranks; a collective.

    Returns None without held-out data, or if any rank received a signal: the resumed run evaluates again.
    """
    if run.data.eval is None:
        return None
    strategy = run.strategy
    try:
        evaluation = evaluate(
            strategy.model,
            run.data.eval,
            run.world,
            token_budget=run.token_budget,
            share=run.share,
            objective=None if run.config.loss == LossConfig() else Objective.of(run.config.loss),
            autocast=strategy.autocast,
            between=lambda: give_up_if_stopped(run.world, signals),
        )
    except EvaluationGivenUp:
        return None
    samples = sample_rows(run.data.eval, evaluation.rewards_A, run.tokenizer, run.config.log.samples)
    tracker.log(moment_after(step), evaluation.logged())
    tracker.log_samples(moment_after(step), samples)
    return evaluation


def resumed_evaluation(run: Run, tracker: Tracker, evaluate_after: set[int]) -> Evaluation | None:
    """Repeat the evaluation at the step from which the run resumes, if its result is needed again.

    It is needed if the run stopped before that evaluation was saved; or, not logged again, if all steps are done and
    only the export is missing.
    """
    position = run.position.step
    saved = run.start.manifest.figures if run.start.manifest else None
    if position not in evaluate_after or (saved and position < run.plan.steps):
        return None
    return evaluate_run(run, Tracker() if saved else tracker, run.plan.step(position - 1), Signals())
