"""Where figures go: metrics.jsonl, TensorBoard, wandb, and the console (rmcore/tracking/console.py).

In: figures by name at a step (rmcore/training/metrics.py, rmcore/evaluation/evaluate.py), sample rows, lines of text.
Out: one JSON object
a line in <run.dir>/metrics.jsonl, events under <run.dir>/tensorboard with the episode as x axis, the samples of each
evaluation in <run.dir>/samples.jsonl.
Ranks other than 0 get a tracker that does nothing, so the training loop asks no rank.

Example of a line: {"step": 10, "episode": 640, "epoch": 0.36, "train/rm/loss": 0.6931, ...}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.text import Text

from rmcore.config.schema import Config
from rmcore.tracking.console import Screen
from rmcore.tracking.moment import Moment
from rmcore.tracking.sinks import JsonLines, TensorBoard, WeightsAndBiases

if TYPE_CHECKING:
    from rmcore.evaluation.samples import SampleRow
    from rmcore.parallel.world import World


class Sink(Protocol):
    """One place that figures go to."""

    def figures(self, at: Moment, figures: Mapping[str, float]) -> None: ...
    def samples(self, at: Moment, rows: Sequence[SampleRow]) -> None: ...
    def close(self) -> None: ...


class Tracker:
    """Sends everything to its sinks; on ranks other than 0 there are none. Close it, or use it in a `with`."""

    def __init__(self, sinks: Sequence[Sink] = (), screen: Screen | None = None) -> None:
        self._sinks, self._screen = sinks, screen

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def say(self, text: str | Text) -> None:
        """One line (or more) for people; control characters are made visible."""
        if self._screen:
            self._screen.say(text)

    def step_done(self, step: int) -> None:
        """Move the progress bar; costs nothing elsewhere."""
        if self._screen:
            self._screen.step_done(step)

    def log(self, at: Moment, figures: Mapping[str, float]) -> None:
        """Figures of a log interval or of an evaluation, under their full names (train/rm/loss, eval/rm/accuracy)."""
        for sink in self._sinks:
            sink.figures(at, figures)

    def log_samples(self, at: Moment, rows: Sequence[SampleRow]) -> None:
        """The samples table of an evaluation."""
        for sink in self._sinks:
            sink.samples(at, rows)

    def close(self) -> None:
        """Flush and close everything; safe to call twice."""
        for sink in self._sinks:
            sink.close()


def start_tracker(
    world: World, config: Config, *, steps: int, start: Moment | None = None, console: Console | None = None
) -> Tracker:
    """The trackers that `log.*` asks for, on rank 0; a silent one on the others.

    Args:
        steps: of the whole run.
        start: where a resumed run continues. What an earlier attempt logged after that point is dropped, for it is
            about to be logged again. A run that starts from zero moves the logs of a former run in `run.dir` aside.
        console: in place of standard output.
    Raises:
        UserError: a tracker that is asked for is not installed.
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
    if config.log.wandb:
        sinks.append(WeightsAndBiases(directory, config))
    return Tracker(sinks, screen)
