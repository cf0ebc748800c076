"""python -m rmcore.train CONFIG [key=value ...]: trains a reward model on preference pairs. The first file to read.

Input: a config (see `--help`).
Output: a run directory with the resolved config, metrics, checkpoints, run_status.json, and `model/`, a directory that
`AutoModelForSequenceClassification` loads.
Example: 64 pairs per step on 8 ranks in 2 micro batches: 16 forward and backward passes over about 4 pairs each, one
reduction, one AdamW step.

Torchrun starts it on any number of ranks; without torchrun it is one rank. To resume, run the same command again. It
continues from the newest checkpoint whose hashes match.

What happens to a batch: the plan decides which comparisons this rank computes in this micro batch. The loader packs
them into one row without padding, each prompt once. The model turns the row into the summed loss of its pairs. The loop
divides it by the weight of the whole step (all ranks, all micro batches), each objective by its own. So the reduced
gradients are those of the mean over the global batch, however it was divided.
"""

import sys

from rmcore.config import config_from_argv

if __name__ == "__main__":  # `--help`, and mistakes in the config, are answered before the heavy imports below
    CONFIG = config_from_argv(sys.argv[1:], "python -m rmcore.train", "Train a reward model on preference pairs.")

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rmcore.checkpoint.resume import choose_start
from rmcore.config.loss import distinct_names
from rmcore.config.schema import Config
from rmcore.data.batches.loader import Loader
from rmcore.host.command import run_command
from rmcore.host.files import write_text_atomically
from rmcore.host.terminal import print_text, survive_lost_output
from rmcore.parallel.optim import set_learning_rates
from rmcore.parallel.world import World, first_error, running_world
from rmcore.tracking.status import write_status
from rmcore.tracking.tracker import Tracker, start_tracker
from rmcore.training.assembly import assemble, introduce
from rmcore.training.bad_steps import BadSteps
from rmcore.training.best import Trained, take_best
from rmcore.training.heartbeat import Heartbeat
from rmcore.training.held_out import evaluate_run, evaluation_steps, resumed_evaluations
from rmcore.training.in_process import FinishedRun, config_of, in_process, raise_reason
from rmcore.training.metrics import Metrics
from rmcore.training.outcome import STOPPED, Ending, leave_process, recorded
from rmcore.training.patience import Patience
from rmcore.training.publish import publish, push_model
from rmcore.training.regularisers import Regularisers
from rmcore.training.rehearsal import rehearse, sizes_of
from rmcore.training.run import Run, moment_after
from rmcore.training.run_directory import check_disk, own_directory
from rmcore.training.run_report import report_run
from rmcore.training.saver import Saver
from rmcore.training.signals import Signals, Stopped


def train(run: Run, tracker: Tracker, heartbeat: Heartbeat | None = None, signals: Signals | None = None) -> Trained:
    """The loop over the remaining steps of the plan, or until run.patience ends it."""
    config, world, strategy, plan = run.config, run.world, run.strategy, run.plan
    heartbeat, signals = heartbeat or Heartbeat(world), signals or Signals()
    optimizer, bad_steps = strategy.optimizer, BadSteps(run, tracker)
    names, language = distinct_names(config.losses), config.loss.sft > 0
    balance = config.loss.router_aux > 0
    metrics = Metrics(world, run.flops_per_token, run.start.interval, losses=names, language=language, balance=balance)
    evaluate_after, patience = evaluation_steps(plan.steps, config.run.evals), Patience(run)
    saver = Saver(run, metrics, bad_steps, patience, heartbeat, signals)
    evaluations = resumed_evaluations(run, tracker, evaluate_after, patience, saver)
    regularisers = Regularisers(run)
    step, rates = plan.step(max(0, run.position.step - 1)), dict[str, float]()
    steps = iter(()) if patience.over else plan.steps_from(run.position.step)
    loader = Loader(
        run.data.train, steps, world.group, world.device, share=run.share, language=language, multiple=world.context
    )

    def log_interval() -> None:
        bad_steps.report(step.index + 1, logged=True)
        interval = metrics.reduce()
        tracker.log(moment_after(step), {**interval, **rates, **regularisers.logged()})
        bad_steps.note_spike(interval)
        heartbeat.report_slow_rank(tracker)

    with signals.deferred(world), saver, loader:
        for step, micro_batches in loader:
            rates = set_learning_rates(optimizer, config.optim, step.index, plan.steps)
            micro_batches = regularisers.begin(step, micro_batches)
            for batch, is_last in heartbeat.through(step.index + 1, micro_batches):
                with strategy.gradient_sync(is_last):
                    with strategy.autocast():
                        out = strategy.model(batch)  # tokens -> last-token scores -> summed loss
                    heartbeat.at("backward")
                    loss = out.share(world.size, step.counts) + regularisers.loss(out, batch)
                    loss.backward()
                metrics.add(out, batch)  # stays on the device
            grad_norm = strategy.clip_grad_norm(config.optim.max_grad_norm)
            bad_steps.watch(grad_norm)  # NaN or Inf in any gradient: AdamW skips this update, on every rank
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if strategy.ema:
                strategy.ema.update()
            metrics.add_step(grad_norm)

            done = step.index + 1
            tracker.step_done(done)
            is_logged = done % config.log.every == 0 or done == plan.steps
            log_interval() if is_logged else bad_steps.report(done, logged=False)
            evaluations = None
            if done in evaluate_after:
                heartbeat.at("evaluate")
                with metrics.clock_paused():
                    evaluations = evaluate_run(run, tracker, step, signals)
                patience.note(step, evaluations)
                if patience.over and not is_logged:
                    log_interval()
            saver.step_done(step, evaluations)  # saves if due; raises Stopped after a signal
            if patience.over:
                break
    reason = patience.reason if step.index + 1 < plan.steps else ""
    if reason:
        tracker.say(reason)
    return Trained(step, evaluations, reason)


def run(config: Config, world: World, heartbeat: Heartbeat, signals: Signals) -> None:
    """A whole run: assemble, train, export. Raises UserError, on all ranks, for what cannot be trained."""
    directory = Path(config.run.dir)
    start = choose_start(config, world)
    if start.completed:
        if world.is_main:
            print_text(f"the run in {directory} is completed already; to start it anew, set run.resume=never")
        return
    write_status(world, directory, "running", step=start.step)
    state = assemble(config, world, start)
    config = state.config  # with a date, and with parallel.precision not `auto`
    sizes = sizes_of(state)
    first_error(world, "looking at the disk", lambda: check_disk(config, sizes) if world.is_main else None)
    rehearsed = rehearse(state, sizes)
    if world.is_main:
        write_text_atomically(directory / "config.yaml", state.config.dump_yaml())
    introduce(state, rehearsed)
    with start_tracker(world, config, steps=state.plan.steps, start=state.position) as tracker:
        trained = train(state, tracker, heartbeat, signals)
        heartbeat.at("export")
        end = take_best(state, trained, tracker)
        with state.chosen_weights():
            publish(state, end.evaluations, tracker)
        report_run(state, end, tracker)
    last, metrics = moment_after(end.step), end.evaluations.metrics if end.evaluations else None
    write_status(
        world,
        directory,
        "completed",
        step=last.step,
        episode=last.episode,
        reason=end.reason,
        evaluation=metrics,
        best=asdict(end.best) if end.best else None,
    )
    push_model(state)


def attempt(config: Config, world: World, signals: Signals, *, prints: bool = True) -> None:
    """One attempt at a run that owns its directory. Raises Ending, once the reason is recorded, if it fails."""
    with (
        Heartbeat(world, prints=prints) as heartbeat,
        own_directory(config, world),
        recorded(config.run.dir, heartbeat, signals),
    ):
        run(config, world, heartbeat, signals)


def main(config: Config) -> int:
    """Exit codes: 0 done, 1 failed while running, 2 refused (config, data, files), 3 stopped by a signal and saved."""
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


def fit(config: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> FinishedRun:
    """Train in this process, from a program or a notebook, as `python -m rmcore.train CONFIG [key=value ...]` would.

    Args:
        config: the path of a YAML file, a nested dict of the same keys, or a `Config`.
        overrides: ["optim.lr=1e-5", ...], as on the command line.
    Raises:
        UserError: the config, the data, the model or the run directory cannot be used.
        RunError: the run failed, with its reason; or it is completed, and the hub did not accept its model.
        KeyboardInterrupt: after Ctrl-C, once the run has saved; the same call resumes it. A second one does not save.
    A run that is completed already is returned as it is.
    """
    chosen, signals = config_of(config, overrides), Signals(guest=True)
    try:
        with in_process(), signals.watched(), running_world(chosen.parallel.timeout_seconds, chosen.run.seed) as world:
            attempt(chosen, world, signals, prints=False)
    except (Ending, Stopped) as end:
        raise_reason(end, chosen.run.dir, signals.received)
    return FinishedRun(chosen.run.dir)


if __name__ == "__main__":
    survive_lost_output()
    leave_process(main(CONFIG))
