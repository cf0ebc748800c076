"""Sends metrics, samples and lines of text to all sinks: metrics.jsonl, TensorBoard, trackers and the console.

Input: metrics by name at a step (rmcore/training/metrics.py, rmcore/evaluation/evaluate.py), sample rows, lines of
text. Output: a line in <run.dir>/metrics.jsonl, events in <run.dir>/tensorboard, the samples of each evaluation in
<run.dir>/samples.jsonl, and text on the console.
Example: tracker.log(Moment(10, 640, 0.36), {"train/rm/loss": 0.6931}) on rank 0.

Ranks other than 0 get a tracker that does nothing, so that the training loop need not distinguish ranks. A sink that
fails (a full disk, a service that does not answer) never ends the training: the tracker reports its first failure, and
at the end the number of its failures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.text import Text

from rmcore.config import UserError
from rmcore.config.schema import UNNAMED, Config
from rmcore.evaluation.samples import SampleRow
from rmcore.parallel.world import World
from rmcore.tracking.console import Screen
from rmcore.tracking.moment import Moment
from rmcore.tracking.services import MLflow, Trackio, WeightsAndBiases
from rmcore.tracking.sinks import JsonLines, TensorBoard


class Sink(Protocol):
    """A place to which metrics and samples are written."""

    def metrics(self, at: Moment, metrics: Mapping[str, float]) -> None: ...
    def samples(self, at: Moment, rows: Sequence[SampleRow], name: str) -> None: ...
    def close(self) -> None: ...


class Tracker:
    """Sends everything to its sinks, of which ranks other than 0 have none. Close it, or use it in a `with`."""

    def __init__(self, sinks: Sequence[Sink] = (), screen: Screen | None = None) -> None:
        self._sinks, self._screen = sinks, screen
        self._failures: Counter[str] = Counter()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def say(self, text: str | Text) -> None:
        """Print a line or more; control characters become visible."""
        if self._screen:
            self._screen.say(text)

    def step_done(self, step: int) -> None:
        """Move the progress bar, if there is one."""
        if self._screen:
            self._screen.step_done(step)

    def log(self, at: Moment, metrics: Mapping[str, float]) -> None:
        """Log the metrics of an interval or of an evaluation by their full names (train/rm/loss, eval/rm/accuracy)."""
        self._each(lambda sink: sink.metrics(at, metrics))

    def log_samples(self, at: Moment, rows: Sequence[SampleRow], name: str = UNNAMED) -> None:
        """Log the samples table of the evaluation of a set."""
        self._each(lambda sink: sink.samples(at, rows, name))

    def close(self) -> None:
        """Flush and close everything; safe to call twice."""
        self._each(lambda sink: sink.close())
        for name, count in self._failures.items():
            if count > 1:
                self.say(f"warning: {name} failed {count} times")
        self._failures.clear()

    def _each(self, act: Callable[[Sink], None]) -> None:
        for sink in self._sinks:
            try:
                act(sink)
            except Exception as error:
                name = type(sink).__name__
                self._failures[name] += 1
                if self._failures[name] == 1:
                    self.say(f"warning: {name}: {type(error).__name__}: {error}; the training continues")


def start_tracker(
    world: World, config: Config, *, steps: int, start: Moment | None = None, console: Console | None = None
) -> Tracker:
    """A tracker with the sinks that `log.*` selects on rank 0; one without sinks on the other ranks.

    Args:
        steps: steps of the whole run.
        start: where a resumed run continues. Lines that an earlier attempt logged after that point are removed, because
            this attempt will log them again. A run that starts from zero renames the logs of a former run in `run.dir`.
        console: used in place of standard output.
    Raises:
        UserError: the package of a selected sink is not installed.
    """
    if not world.is_main:
        return Tracker()
    directory = Path(config.run.dir)
    directory.mkdir(parents=True, exist_ok=True)
    start = start or Moment(0, 0, 0.0)
    screen = Screen(console or Console(), steps, start.step)
    sinks: list[Sink] = [JsonLines(directory, start), screen]
    if config.log.tensorboard:
        sinks.append(TensorBoard(directory / "tensorboard", start, config.dump_yaml()))
    for wanted, service in (
        (config.log.wandb, WeightsAndBiases),
        (config.log.trackio, Trackio),
        (config.log.mlflow, MLflow),
    ):
        if not wanted:
            continue
        try:
            sinks.append(service(directory, config))
        except UserError:
            raise
        except Exception as error:  # no login, no network
            name = service.__name__
            screen.say(f"warning: {name}: {type(error).__name__}: {error}; the training continues without {name}")
    return Tracker(sinks, screen)
