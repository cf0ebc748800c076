"""A trained reward model in Python: `rmcore.load(MODEL)` returns it.

Input: a model, then prompts and answers, each a text or chat turns.
Output: their rewards as floats.
Example: `rmcore.load("runs/hh/model").score("2+2?", ["4", "5"])` returns [1.25, -0.5], as `rmcore score` would for
{"prompt": "2+2?", "answers": ["4", "5"]}.

The engine is that of `rmcore score` (scorer.py): answers are packed without padding, and each prompt is computed once
per call for all its answers.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rmcore.config import UserError
from rmcore.config.layers import check_overrides
from rmcore.data.formats.fields import short
from rmcore.host.memory import trim_freed_memory
from rmcore.scoring.rows import trial_rows
from rmcore.scoring.scorer import Scorer

Words = str | Sequence[Mapping[str, Any]]  # a text, or chat turns [{"role": ..., "content": ...}, ...]
RewardFunction = Callable[..., list[float | None]]
# Columns of a trainer's data that reach the chat template, as they do from a row of `rmcore score`.
CONTEXT = ("system", "tools", "documents", "chat_template_kwargs")


@dataclass(frozen=True)
class Ranked:
    """An answer of `RewardModel.rank`: its place in the given list, and its reward (None: it has none)."""

    index: int
    reward: float | None


def load(
    model: str | Path,
    *,
    device: str | torch.device | None = None,
    precision: str | None = None,
    normalise: bool = False,
    batch_tokens: int | None = None,
    overrides: Sequence[str] = (),
) -> RewardModel:
    """Load a reward model: a directory made by rmcore, or any `*ForSequenceClassification` with one output.

    Args:
        model: directory or hub id.
        device: "cpu", "cuda", "cuda:1", ...; None: a GPU if there is one.
        precision: bf16, fp32 or auto; None: that of the training.
        normalise: return (reward - mean) / deviation, by the numbers that `rmcore export --normalise` has stored.
        batch_tokens: most tokens that are computed together; None: 4,096 on a CPU, 32,768 on a GPU.
        overrides: further settings, as on the command line of `rmcore score`: ["data.template=zephyr"].
    Raises UserError for a model or a setting that cannot be used.
    """
    if not isinstance(model, str | Path):
        raise UserError(f"model must be a directory or a hub id, not {short(model)}")
    check_overrides(overrides)
    named = {"parallel.precision": precision, "batch.tokens": batch_tokens}
    settings = [*overrides, *(f"{key}={value}" for key, value in named.items() if value is not None)]
    chosen = None if device is None else _device(device)
    with _on(chosen):
        scorer = Scorer(str(model), settings, normalise=normalise, device=chosen)
        scorer.choose_path(trial_rows())
    place = os.path.abspath(model) if os.path.isdir(model) else str(model)
    again = functools.partial(load, place, device=chosen, normalise=normalise, overrides=settings)
    return RewardModel(scorer, again)


class RewardModel:
    """A reward model, ready to score; `rmcore.load` makes it. Any number of threads may use one at the same time.

    A reward is None if its text is longer than the model's positions or has no token, or if the model computes NaN or
    Inf. Rewards of one text differ only by rounding if other texts are scored with it.

    Pickled, it is the arguments of `rmcore.load`: another process, such as a worker of a DataLoader, loads it again. A
    forked process uses it as it is, with one thread of the processor; on a GPU it raises UserError.
    """

    def __init__(self, scorer: Scorer, again: Callable[[], RewardModel]) -> None:
        self._scorer, self._again = scorer, again
        self._computing, self._process = threading.Lock(), os.getpid()  # rendering and tokenising need no lock
        self._warned: set[str] = set()
        weakref.finalize(self, trim_freed_memory).atexit = False

    def __reduce__(self) -> tuple[Callable[[], RewardModel], tuple[()]]:
        return self._again, ()

    @property
    def device(self) -> torch.device:
        """Where rewards are computed."""
        return self._scorer.device

    @property
    def precision(self) -> str:
        """The arithmetic of the model: bf16 or fp32."""
        return self._scorer.config.parallel.precision

    @property
    def notes(self) -> list[str]:
        """What `rmcore score` prints about the precision, the template and the way in which rewards are computed."""
        return [*self._scorer.notes, self._scorer.path]

    def __repr__(self) -> str:
        return f"RewardModel({self._scorer.name!r}, device={str(self.device)!r}, precision={self.precision!r})"

    def score(self, prompts: Words | Iterable[Words], answers: Iterable[Words]) -> list[float | None]:
        """The reward of each answer, in order.

        prompts: one prompt per answer, or a single one (a text, or the turns of one conversation) for all answers.
        Raises UserError for unequal numbers, and for what is neither a text nor turns, with its place.
        Example: score(["2+2?", "1+1?"], ["4", "2"]) and score("2+2?", ["4", "5"]) return two rewards each.
        """
        listed = [_words(answer, f"item {n}: answer") for n, answer in enumerate(_list(answers, "answers"))]
        if _is_one(prompts):
            prompt = _words(prompts, "prompt")
            return self._rewards([{"prompt": prompt, "answers": listed}] if listed else [])
        each = [_words(prompt, f"item {n}: prompt") for n, prompt in enumerate(_list(prompts, "prompts"))]
        if len(each) != len(listed):
            raise UserError(f"{len(each)} prompts for {len(listed)} answers: give one prompt per answer, or one")
        return self._rewards([{"prompt": p, "answer": a} for p, a in zip(each, listed, strict=True)])

    def score_texts(self, texts: Iterable[str]) -> list[float | None]:
        """The reward of each whole text, which already is as the template writes it.

        BOS is added if the template begins with it, and EOS if the template is `none`, as in the training.
        """
        listed = _list(texts, "texts")
        for number, text in enumerate(listed):
            if not isinstance(text, str):
                raise UserError(f"item {number}: text must be text, not {short(text)}")
        return self._rewards([{"text": text} for text in listed])

    def rank(self, prompt: Words, answers: Iterable[Words]) -> list[Ranked]:
        """The answers to one prompt, the best first; of equal rewards the first. Answers without a reward come last.

        Example: rank("2+2?", ["5", "4"]) -> [Ranked(index=1, reward=1.25), Ranked(index=0, reward=-0.5)].
        """
        if not _is_one(prompt):
            raise UserError("rank takes one prompt: a text, or the turns of one conversation")
        ranked = [Ranked(index, reward) for index, reward in enumerate(self.score(prompt, answers))]
        return sorted(ranked, key=lambda one: (one.reward is None, -(one.reward or 0.0)))

    def as_reward_function(self, name: str = "rmcore") -> RewardFunction:
        """A reward function for TRL's trainers: GRPOTrainer(reward_funcs=[model.as_reward_function()], ...).

        It takes `prompts` and `completions` (texts, or lists of chat turns) and all other columns of the data set as
        keywords, one value per completion. `tools`, `system`, `documents` and `chat_template_kwargs` reach the chat
        template. It returns one reward per completion; TRL leaves a None out of its mean.
        name: what TRL logs the rewards as.
        """
        if not isinstance(name, str):
            raise UserError(f"name must be text, not {short(name)}")

        def reward(prompts: Sequence[Words], completions: Sequence[Words], **columns: Any) -> list[float | None]:
            prompts, completions = _list(prompts, "prompts"), _list(completions, "completions")
            given = {key: columns[key] for key in CONTEXT if isinstance(columns.get(key), list | tuple)}
            unequal = {key: len(values) for key, values in {"prompts": prompts, **given}.items()}
            for key, count in unequal.items():
                if count != len(completions):
                    raise UserError(f"{count} {key} for {len(completions)} completions: give one per completion")
            rows = zip(prompts, completions, *given.values(), strict=True)
            return self._rewards([dict(zip(("prompt", "completion", *given), row, strict=True)) for row in rows])

        reward.__name__ = reward.__qualname__ = name
        return reward

    def _rewards(self, rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
        """The reward of each text of all rows, in order."""
        if self._process != os.getpid():
            self._after_fork()
        rendered = [self._scorer.render(row, f"item {number}", typed=True) for number, row in enumerate(rows)]
        for number, row in enumerate(rendered):
            if not all(map(_is_unicode, row.texts)):
                raise UserError(f"item {number}: its text has a lone surrogate, which is no character")
        texts = [text for row in self._scorer.encode(rendered) for text in row]
        with self._computing, _on(self.device):
            rewards = self._scorer.score(texts)
            unread = frozenset().union(*(row.unread for row in rendered)) - self._warned
            self._warned |= unread
        if unread:
            warnings.warn(f"content that is not read: {', '.join(sorted(unread))}", stacklevel=3)
        return rewards

    def _after_fork(self) -> None:
        """Make the model usable in a forked process, which has neither OpenMP's threads nor the owner of a lock."""
        if self.device.type == "cuda":
            raise UserError(
                "a model on a GPU cannot be used in a forked process: start it by the method spawn, or load it there"
            )
        torch.set_num_threads(1)  # with more, OpenMP waits for threads for ever; workers of a DataLoader have one, too
        self._computing, self._process = threading.Lock(), os.getpid()


def _is_one(words: Any) -> bool:
    """Whether this is one text or one conversation, and not a list of them."""
    is_turns = (
        isinstance(words, Sequence | np.ndarray) and len(words) > 0 and all(isinstance(w, Mapping) for w in words)
    )
    return isinstance(words, str) or is_turns


def _words(given: Any, what: str) -> Any:
    """A text or turns. Raises UserError for anything else.

    Turns may be a tuple, or an array as pandas reads them from a parquet file; a single turn is a list of one.
    """
    if isinstance(given, str):
        return given
    turns = (
        [given] if isinstance(given, Mapping) else list(given) if isinstance(given, list | tuple | np.ndarray) else []
    )
    if not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise UserError(f"{what} must be text or a list of chat turns, not {short(given)}")
    return turns


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _list(values: Any, what: str) -> list[Any]:
    """A list of what is iterable: a list, a tuple, an array, a column of a table, a generator."""
    if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        raise UserError(f"{what} must be a list, not {type(values).__name__}")
    return list(values)


def _device(device: str | torch.device) -> torch.device:
    """Raises UserError for a device that does not exist here."""
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise UserError(f"device={device!r}: choose cpu, cuda or cuda:NUMBER") from None
    gpus = torch.cuda.device_count()
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cuda" and (chosen.index or 0) >= gpus):
        raise UserError(f"device={str(device)!r}: rewards are computed on the CPU or a GPU; {gpus} GPUs are visible")
    return chosen


def _on(device: torch.device | None) -> AbstractContextManager[object]:
    """Makes a GPU the current one, which kernels are started on."""
    return torch.cuda.device(device) if device is not None and device.type == "cuda" else nullcontext()
