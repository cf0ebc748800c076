"""Writes metrics and samples to files: metrics.jsonl, samples.jsonl, TensorBoard.

Input: metrics by name at a moment of the run, sample rows. Output: a line, an event or a table in each sink.
Example of a line of metrics.jsonl: {"step": 10, "episode": 640, "epoch": 0.36, "train/rm/loss": 0.6931, ...}
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from rmcore.config import UserError
from rmcore.config.schema import UNNAMED
from rmcore.evaluation.samples import SampleRow
from rmcore.host.files import finite, regular_file, write_text_atomically
from rmcore.host.markdown import markdown_text
from rmcore.tracking.moment import Moment


class JsonLines:
    """metrics.jsonl and samples.jsonl, one object per line, flushed at once."""

    def __init__(self, directory: Path, start: Moment) -> None:
        self._metrics = _continue_lines(directory / "metrics.jsonl", start.step)
        self._samples = _continue_lines(directory / "samples.jsonl", start.step)

    def metrics(self, at: Moment, metrics: Mapping[str, float]) -> None:
        self._write(self._metrics, {**asdict(at), **metrics})

    def samples(self, at: Moment, rows: Sequence[SampleRow], name: str) -> None:
        of = {} if name == UNNAMED else {"set": name}
        for row in rows:
            self._write(self._samples, {**asdict(at), **of, **asdict(row), "correct": row.correct})

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()

    @staticmethod
    def _write(file: TextIO, content: Mapping[str, Any]) -> None:
        file.write(json.dumps(finite(content)) + "\n")
        file.flush()


def _continue_lines(path: Path, step: int) -> TextIO:
    """Open for appending after the last line up to `step`. Later lines and half a line left by a kill are removed.

    At step 0 a former file is kept under another name. Raises UserError for a link or a pipe of this name.
    """
    try:
        if os.path.lexists(path) and step == 0:
            os.replace(path, _free_name(path))
        elif os.path.lexists(path):
            with open(path, encoding="utf-8", errors="replace", opener=regular_file) as file:
                lines = file.read().splitlines()
            write_text_atomically(path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))
        return open(path, "a", encoding="utf-8", opener=regular_file)
    except OSError as error:
        raise UserError(f"run.dir {path.parent}: {error.strerror or error}") from None


def _step_of(line: str) -> float:
    """The step of a line; infinite for a line that is not complete."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _free_name(path: Path) -> Path:
    """metrics.jsonl -> metrics.1.jsonl, or the next number that is not used."""
    number = 1
    while os.path.lexists(name := path.with_name(f"{path.stem}.{number}{path.suffix}")):
        number += 1
    return name


def samples_key(name: str) -> str:
    """The name of the samples table of an evaluation set: eval/samples, or eval/NAME/samples."""
    return "eval/samples" if name == UNNAMED else f"eval/{name}/samples"


class TensorBoard:
    """Events, with the episode as x axis; the config and the samples as text."""

    def __init__(self, directory: Path, start: Moment, config_yaml: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "log.tensorboard is on and the package tensorboard is not installed: "
                "pip install tensorboard, or set log.tensorboard=false"
            ) from None
        if directory.exists() and start.step == 0:
            os.replace(directory, _free_name(directory))
        # Charts hide what an earlier attempt logged after the point where this one continues.
        purge_step = start.episode + 1 if start.step else None
        self._writer = SummaryWriter(str(directory), purge_step=purge_step, flush_secs=10)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in config_yaml.splitlines()), start.episode)

    def metrics(self, at: Moment, metrics: Mapping[str, float]) -> None:
        for name, value in {"epoch": at.epoch, "step": at.step, **metrics}.items():
            self._writer.add_scalar(name, value, at.episode)

    def samples(self, at: Moment, rows: Sequence[SampleRow], name: str) -> None:
        lines = ["| prompt | chosen | rejected | rewards | correct |", "|---|---|---|---|---|"]
        for row in rows:
            texts = (markdown_text(text) for text in (row.prompt, row.chosen, row.rejected))
            rewards = f"{row.chosen_reward:.4f} / {row.rejected_reward:.4f}"
            lines.append(f"| {' | '.join(texts)} | {rewards} | {'yes' if row.correct else 'no'} |")
        self._writer.add_text(samples_key(name), "\n".join(lines), at.episode)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
