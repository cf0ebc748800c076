"""Evaluates a run on its held-out comparisons, between two steps of training.

Input: a `Run`, and the step that was just done.
Output: the `Evaluations` of all sets; their metrics and sample rows also go to the tracker.
Example: 100 steps and run.evals=4 -> evaluations after steps 25, 50, 75 and 100.
"""

from rmcore.data.batches.step_plan import Step
from rmcore.evaluation.evaluate import Evaluations, evaluate, own_objective
from rmcore.evaluation.own_metrics import add_own_metrics
from rmcore.evaluation.samples import sample_rows
from rmcore.tracking.tracker import Tracker
from rmcore.training.patience import Patience
from rmcore.training.run import Run, moment_after
from rmcore.training.saver import Saver
from rmcore.training.signals import EvaluationGivenUp, Signals, give_up_if_stopped


def evaluation_steps(steps: int, evals: int) -> set[int]:
    """The numbers of steps after which to evaluate: evenly spread, the last one at the end."""
    return {round(steps * (place + 1) / evals) for place in range(evals)} - {0}


def evaluate_run(run: Run, tracker: Tracker, step: Step, signals: Signals) -> Evaluations | None:
    """Evaluate every held-out comparison of every set once, over all ranks; a collective.

    Returns None without held-out data, or if any rank received a signal: the resumed run evaluates again.
    """
    strategy = run.strategy
    try:
        with run.chosen_weights():
            found = {
                name: evaluate(
                    strategy.model,
                    data,
                    run.world,
                    token_budget=run.token_budget,
                    share=run.share,
                    objective=own_objective(run.config.loss),
                    rewardbench=run.data.rewardbench.get(name),
                    autocast=strategy.autocast,
                    between=lambda: give_up_if_stopped(run.world, signals),
                )
                for name, data in run.data.evals.items()
            }
    except EvaluationGivenUp:
        return None
    if not found:
        return None
    for name, data in run.data.evals.items():
        add_own_metrics(found[name], data, run.config.run.metrics)
    evaluations = Evaluations(found)
    tracker.log(moment_after(step), evaluations.logged())
    for name, data in run.data.evals.items():
        samples = sample_rows(data, found[name].rewards_A, run.tokenizer, run.config.log.samples)
        tracker.log_samples(moment_after(step), samples, name)
    return evaluations


def resumed_evaluations(
    run: Run, tracker: Tracker, evaluate_after: set[int], patience: Patience, saver: Saver
) -> Evaluations | None:
    """Repeat the evaluation at the step from which the run resumes, if its result is needed again; a collective.

    It is needed if the run stopped before that evaluation was saved; then it counts for `patience` and is added to the
    checkpoint. Or, not logged again, if all steps are done and only the export is missing.
    """
    position, manifest = run.position.step, run.start.manifest
    if position not in evaluate_after or manifest is None:
        return None
    step = run.plan.step(position - 1)
    if manifest.figures is None:
        evaluations = evaluate_run(run, tracker, step, Signals())
        patience.note(step, evaluations)
        saver.amend(evaluations)
        return evaluations
    if position == run.plan.steps or patience.over:
        return evaluate_run(run, Tracker(), step, Signals())
    return None
