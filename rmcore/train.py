"""python -m rmcore.train CONFIG [key=value ...]: preference pairs in, a reward model out. The first file to read.

Enters: a config (see `--help`). Leaves: a run directory with the resolved config, metrics, checkpoints,
run_status.json and `model/`, a directory that `AutoModelForSequenceClassification` loads. Run by torchrun on any
number of ranks, or plainly on one. Started again after whatever ended it, it goes on from the newest good checkpoint.

What happens to a batch: the plan says which comparisons this rank computes in this micro batch; the loader packs them
into one row without padding, every prompt once; the model turns the row into the summed loss of its pairs; that is
divided by the weight of the whole step (all ranks, all micro batches), so that the gradients, once reduced, are those
of the mean over the global batch, however it was cut. Example: 64 pairs a step on 8 ranks in 2 micro batches: 16
forward and backward passes over about 4 pairs each, one reduction, one AdamW step.
"""

import sys

from rmcore.config import config_from_argv

if __name__ == "__main__":  # --help and mistakes in the config are answered before the heavy imports below
    CONFIG = config_from_argv(sys.argv[1:], "python -m rmcore.train", "Train a reward model on preference pairs.")

from pathlib import Path

from rmcore.checkpoint.resume import choose_start
from rmcore.config.loss import LossConfig
from rmcore.config.schema import Config
from rmcore.data.batches.loader import Loader
from rmcore.data.batches.step_plan import Step
from rmcore.evaluation.evaluate import Evaluation, evaluate
from rmcore.evaluation.samples import sample_rows
from rmcore.host.command import run_command
from rmcore.host.files import write_text_atomically
from rmcore.model.objectives import Objective
from rmcore.parallel.optim import learning_rate, set_learning_rate
from rmcore.parallel.world import World, running_world
from rmcore.tracking.moment import Moment
from rmcore.tracking.status import write_status
from rmcore.tracking.tracker import Tracker, start_tracker
from rmcore.training.assembly import assemble, introduce
from rmcore.training.bad_steps import BadSteps
from rmcore.training.heartbeat import Pulse
from rmcore.training.metrics import Metrics
from rmcore.training.outcome import STOPPED, Ending, leave_process, recorded
from rmcore.training.publish import publish
from rmcore.training.run import Run
from rmcore.training.run_directory import check_disk, own_directory
from rmcore.training.run_report import report_run
from rmcore.training.saver import Saver
from rmcore.training.signals import GivenUp, Signals, Stopped, give_up_if_stopped


def train(run: Run, tracker: Tracker, pulse: Pulse | None = None, signals: Signals | None = None) -> Evaluation | None:
    """The loop: every step of the plan that is left, from tokens to gradient sync. Returns the last evaluation."""
    config, world, strategy, plan = run.config, run.world, run.strategy, run.plan
    pulse, signals = pulse or Pulse(world), signals or Signals()
    optimizer, bad_steps = strategy.optimizer, BadSteps(run, tracker)
    metrics = Metrics(world, earlier=run.start.interval)
    evaluate_after = evaluation_steps(plan.steps, config.run.evals)
    evaluation = resumed_evaluation(run, tracker, evaluate_after)
    loader = Loader(run.data.train, plan.steps_from(run.position.step), world.rank, world.device, share=run.share)
    with signals.deferred(), Saver(run, metrics, pulse, signals) as saver, loader:
        for step, micro_batches in loader:
            lr = learning_rate(config.optim, step.index, plan.steps)
            set_learning_rate(optimizer, lr)
            for batch, is_last in pulse.through(step.index + 1, micro_batches):
                with strategy.gradient_sync(is_last):
                    with strategy.autocast():
                        out = strategy.model(batch)  # tokens -> last-token scores -> summed loss
                    pulse.at("backward")
                    (out.loss_sum * (world.size / step.global_weight)).backward()
                metrics.add(out, batch)  # stays on the device
            grad_norm = strategy.clip_grad_norm(config.optim.max_grad_norm)
            bad_steps.watch(grad_norm)  # NaN or Inf anywhere: AdamW leaves this update out, on every rank
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            metrics.add_step(grad_norm)

            done = step.index + 1
            tracker.step_done(done)
            bad_steps.report(done)
            if done % config.log.every == 0 or done == plan.steps:
                figures = metrics.reduce()
                tracker.log(moment(step), {**figures, "train/rm/lr": lr})
                bad_steps.note_spike(figures)
                pulse.name_slow_rank(tracker)
            evaluation = None
            if done in evaluate_after:
                pulse.at("evaluate")
                with metrics.clock_paused():
                    evaluation = evaluate_run(run, tracker, step, signals)
            saver.step_done(step, evaluation, healthy=bad_steps.in_row == 0)  # saves when due, leaves when asked to
    return evaluation


def moment(step: Step) -> Moment:
    """Where the run is once `step` is done."""
    return Moment(step.index + 1, step.episode, step.epoch)


def evaluation_steps(steps: int, evals: int) -> set[int]:
    """The numbers of done steps after which to evaluate: spread evenly, the last at the end."""
    return {round(steps * (place + 1) / evals) for place in range(evals)} - {0}


def resumed_evaluation(run: Run, tracker: Tracker, evaluate_after: set[int]) -> Evaluation | None:
    """What a run that was stopped before the evaluation of its last step, or before the export, has to do again."""
    position = run.position.step
    figures = run.start.manifest.figures if run.start.manifest else None
    if position not in evaluate_after or (figures and position < run.plan.steps):
        return None
    return evaluate_run(run, Tracker() if figures else tracker, run.plan.step(position - 1), Signals())


def evaluate_run(run: Run, tracker: Tracker, step: Step, signals: Signals) -> Evaluation | None:
    """Every held-out comparison once over all ranks: figures and samples to the tracker.

    None without held-out data; or when a rank got a signal, for the figures can be made again after the resume.
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
    except GivenUp:
        return None
    tracker.log(moment(step), evaluation.logged())
    tracker.log_samples(
        moment(step), sample_rows(run.data.eval, evaluation.rewards_A, run.tokenizer, run.config.log.samples)
    )
    return evaluation


def run(config: Config, world: World, pulse: Pulse, signals: Signals) -> None:
    """A whole run: assemble, train, export. Raises UserError for what cannot be trained, on all ranks alike."""
    directory = Path(config.run.dir)
    start = choose_start(config, world)
    if start.completed:
        if world.is_main:
            print(f"the run in {directory} is completed already; run.resume=never starts it anew")
        return
    write_status(world, directory, "running", step=start.step)
    state = assemble(config, world, start)
    check_disk(config, world, sum(p.numel() for p in state.strategy.named_parameters().values() if p.requires_grad))
    if world.is_main:
        write_text_atomically(directory / "config.yaml", config.dump_yaml())
    introduce(state)
    with start_tracker(world, config, steps=state.plan.steps, start=state.position) as tracker:
        evaluation = train(state, tracker, pulse, signals)
        publish(state, evaluation, tracker)
        report_run(state, evaluation, tracker)
    last = state.plan.step(state.plan.steps - 1)
    figures = evaluation.figures if evaluation else None
    write_status(world, directory, "completed", step=last.index + 1, episode=last.episode, evaluation=figures)


def attempt(config: Config, world: World, signals: Signals) -> None:
    """A run that holds its directory, beats, and records how it ended; raises Ending when it did not end well."""
    with Pulse(world) as pulse, own_directory(config, world), recorded(config.run.dir, pulse, signals):
        run(config, world, pulse, signals)


def main(config: Config) -> int:
    """Exit codes: 0 done, 1 failed while running, 2 refused (config, data, files), 3 stopped by a signal, saved."""
    signals = Signals()

    def work() -> None:
        with signals.watched(), running_world(config.parallel.timeout_seconds, config.run.seed) as world:
            attempt(config, world, signals)

    try:
        return run_command("rmcore.train", work)  # explains what fails before the run owns its directory
    except Stopped:
        return STOPPED
    except Ending as end:
        return end.code


if __name__ == "__main__":
    leave_process(main(CONFIG))
