"""Evaluations that steer a run: the best checkpoint by any metric is kept and exported, and run.patience ends the run.

The runs have eight small steps with an evaluation after each, in real processes that are killed, stopped and resumed.
"""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from rmcore.checkpoint import directory
from rmcore.checkpoint.resume import choose_start
from rmcore.config import UserError, load_config
from rmcore.evaluation.criterion import Criterion, Progress
from rmcore.hf_export.from_checkpoint import find_checkpoint
from rmcore.parallel.world import running_world
from rmcore.tracking.tracker import Tracker
from rmcore.train import train
from rmcore.training.assembly import assemble
from rmcore.training.signals import Signals, Stopped
from tests.harness.crash import Fault, Outcome, copy_of, run
from tests.harness.small_run import arguments, metrics, reference, same, stored_weights

# A learning rate of 3e-2 overshoots: the loss of the evaluations rises again before the eighth step.
STEERED = ["run.evals=8", "run.save_every=3", "run.keep=1", "optim.lr=3e-2", "log.every=3", "log.samples=0"]


def steered(folder: Path, *more: str) -> list[str]:
    held = [f"data.eval.path={folder}/pairs.jsonl", "data.eval.split=train[:80%]"]
    return [*STEERED, *held, *more]


def losses(outcome: Outcome) -> dict[int, float]:
    return {line["step"]: line["eval/rm/loss"] for line in metrics(outcome) if "eval/rm/loss" in line}


PATIENT = ("run.patience=2", "run.best_metric=eval/rm/loss")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("steered")


def uninterrupted(folder: Path) -> Outcome:
    return reference(folder, *steered(folder, *PATIENT))


@pytest.mark.distributed
def test_patience_ends_the_run_and_the_best_weights_are_exported(folder: Path) -> None:
    whole = uninterrupted(folder)
    found, status = losses(whole), whole.status
    best = min(found, key=lambda step: found[step])
    assert list(found) == list(range(1, best + 3)) and best + 2 < 8, "two evaluations after the best, before the end"
    assert (status["status"], status["step"]) == ("completed", best + 2)
    assert status["best"] == {"step": best, "metric": "eval/rm/loss", "value": found[best]}
    assert status["reason"].startswith("stopped early: no better eval/rm/loss since step")
    assert status["reason"] in whole.text
    assert status["eval"]["loss"] == found[best], "the metrics of the exported weights"
    assert f"step {best}, eval/rm/loss {found[best]:.4f}" in (whole.directory / "report.html").read_text()
    assert directory.steps(whole.directory / "checkpoints") == [best + 2, best]
    stored = stored_weights(whole.directory / "checkpoints" / f"step-{best}")
    assert whole.weights.keys() == stored.keys()
    assert all(np.array_equal(whole.weights[name].ravel(), stored[name]) for name in stored)
    chosen, manifest, _ = find_checkpoint(whole.directory)
    assert (chosen.name, manifest.step) == (f"step-{best}", best), "rmcore export takes it, too"
    trained = [line["step"] for line in metrics(whole) if "train/rm/loss" in line]
    assert trained[-1] == best + 2, "the last interval is logged"


@pytest.mark.distributed
def test_a_run_that_ended_early_continues_with_more_patience(folder: Path) -> None:
    whole = uninterrupted(folder)
    ended = Outcome(whole.codes, whole.output, 0.0, copy_of(whole, "continued"))
    again = run(ended.directory, arguments(folder, *steered(folder, *PATIENT)), 2)
    assert again.codes == [0, 0] and "is completed already" in again.text
    more = run(ended.directory, arguments(folder, *steered(folder, "run.patience=7", PATIENT[1])), 2)
    assert more.status["step"] == 8 and not more.status["reason"] and len(losses(more)) == 8, more.text
    other = [*steered(folder, "run.patience=7", "run.best_metric=eval/rm/accuracy"), "run.keep=9"]
    exported = run(ended.directory, arguments(folder, *other), 2)
    assert exported.codes == [0, 0] and exported.status["best"]["metric"] == "eval/rm/accuracy", "no step, an export"
    assert losses(exported) == losses(more)


@pytest.mark.distributed
@pytest.mark.parametrize("action", ["term", pytest.param("kill", marks=pytest.mark.slow)])
def test_a_resumed_run_decides_the_same(folder: Path, action: str) -> None:
    """Stopped at the best step, and again at the last one.

    A signal leaves out the evaluation of its step. The resumed run must repeat it before any other step, count it, and
    store it with the checkpoint, which is the best one.
    """
    whole, given = uninterrupted(folder), arguments(folder, *steered(folder, *PATIENT))
    best, last = whole.status["best"]["step"], whole.status["step"]
    stopped = run(folder / action, given, 2, [Fault("compute", action, 0, best)])
    assert stopped.codes[0] in (3, -9)
    newest = max(directory.steps(stopped.directory / "checkpoints"), default=0)  # none, if the first save was cut off
    left = last - newest  # the last step is this one of the second attempt
    stopped = run(stopped.directory, given, 2, [Fault("compute", action, 0, left)])
    assert stopped.codes[0] in (3, -9), stopped.text
    resumed = run(stopped.directory, given, 2)
    assert resumed.codes == [0, 0] and same(resumed, whole), resumed.text
    assert losses(resumed) == losses(whole)
    for key in ("step", "episode", "reason", "best"):
        assert resumed.status[key] == whole.status[key]
    roots = [outcome.directory / "checkpoints" for outcome in (resumed, whole)]
    assert directory.steps(roots[0]) == directory.steps(roots[1])


def test_a_repeated_evaluation_counts_for_the_checkpoint_that_the_run_continues_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by a signal before the first evaluation; the resumed run repeats it, and fails before it saves again."""
    config = load_config(None, [*arguments(tmp_path, *steered(tmp_path, *PATIENT)), f"run.dir={tmp_path / 'run'}"])
    signals = Signals()
    signals.received = signal.SIGTERM

    def fails(*_: object) -> dict[str, float]:
        raise ArithmeticError

    with running_world(60, 1) as world:
        with pytest.raises(Stopped):
            train(assemble(config, world), Tracker(), None, signals)
        stopped = choose_start(config, world)
        assert stopped.step == 1 and stopped.manifest and stopped.manifest.figures is None
        with monkeypatch.context() as patch, pytest.raises(ArithmeticError):
            patch.setattr("rmcore.train.set_learning_rates", fails)
            train(assemble(config, world, stopped), Tracker())
        manifest = choose_start(config, world).manifest
    assert manifest and manifest.figures and manifest.progress
    assert manifest.progress["step"] == 1, "the evaluation counts"
    assert -manifest.progress["best"][0] == manifest.figures["eval/rm/loss"]


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["zero2", *(pytest.param(s, marks=pytest.mark.slow) for s in ("zero1", "zero3"))])
def test_the_best_weights_under_every_strategy(tmp_path: Path, strategy: str) -> None:
    """bf16: zero2 keeps gathered copies after an evaluation, which must not be the exported weights."""
    given = steered(
        tmp_path, "run.best_metric=eval/rm/brier", f"parallel.strategy={strategy}", "parallel.precision=bf16"
    )
    outcome = run(tmp_path / "run", arguments(tmp_path, *given), 2)
    assert outcome.codes == [0, 0], outcome.text
    best, status = outcome.status["best"]["step"], outcome.status
    assert status["step"] == 8 and best < 8 and status["eval"]["brier"] == status["best"]["value"]
    stored = stored_weights(outcome.directory / "checkpoints" / f"step-{best}")
    assert all(np.array_equal(outcome.weights[name].ravel(), stored[name]) for name in stored)


def test_a_metric_that_the_run_does_not_have(tmp_path: Path) -> None:
    for metric, meant, unmeant in [
        ("eval/rm/acuracy", "did you mean eval/rm/accuracy?", "eval/rm/count"),  # a typo
        ("accuracy", "choose one of eval/rm/accuracy, ", "eval/rm/chosen_rewards"),
        ("eval/rm/count", "eval/rm/loss", "eval/rm/count,"),  # neither more nor less is better
        ("eval/rm/best_of_k_accuracy", "eval/rm/ece", "best_of_k_accuracy,"),  # known, but pairs have two answers
    ]:
        outcome = run(tmp_path / "run", arguments(tmp_path, *steered(tmp_path, f"run.best_metric={metric}")), 1)
        assert outcome.codes == [2] and "Traceback" not in outcome.text
        assert f"run.best_metric: the evaluations of this run have no {metric} by which to choose" in outcome.text
        assert meant in outcome.text and unmeant not in outcome.text, outcome.text


def test_what_cannot_be_steered(tmp_path: Path) -> None:
    needed = ["model.name=m", "data.train.path=p"]
    for more, message in [
        (["run.patience=1", "run.evals=3"], "run.patience needs evaluation data"),
        (["run.best_metric=eval/rm/loss"], "run.best_metric needs evaluation data"),
        (["run.patience=1", "run.evals=0"], "run.patience needs evaluations: run.evals is 0"),
        (["data.eval_fraction=0.1", "run.patience=3", "run.evals=3"], "cannot end a run of 3 evaluations"),
    ]:
        with pytest.raises(UserError, match=message):
            load_config(None, [*needed, *more])


def test_progress_counts_evaluations_without_a_better_one() -> None:
    config = load_config(None, ["model.name=m", "data.train.path=p", "data.eval_fraction=0.1", "run.evals=9"])
    criterion = Criterion.of(config)
    assert criterion.keys == ("eval/rm/accuracy", "eval/rm/loss")
    progress = Progress(criterion.name)
    for step, (accuracy, loss, since) in enumerate(
        [
            (float("nan"), 0.7, 1),  # NaN is no value
            (0.6, 0.7, 0),
            (0.6, 0.6, 0),  # of equal accuracies the lower loss is better
            (0.6, 0.6, 1),  # an equal evaluation is no improvement
            (0.5, 0.1, 2),
            (0.7, 0.9, 0),
        ]
    ):
        quality = criterion.quality({"eval/rm/accuracy": accuracy, "eval/rm/loss": loss})
        progress = progress.after(step, quality)
        stored = json.loads(json.dumps({"metric": progress.metric, "best": progress.best, "step": progress.step,
                                        "since": progress.since}))  # fmt: skip
        assert progress.since == since and Progress.restored(criterion, stored) == progress
    assert progress.best is not None and (progress.step, criterion.value(progress.best)) == (5, 0.7)
    assert Progress.restored(Criterion(("eval/rm/loss",), (-1,)), stored) == Progress("eval/rm/loss"), "another metric"
