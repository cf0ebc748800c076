"""Compares the configuration of a checkpoint with the present one, and refuses changes that make it another run.

Input: two configurations as plain values.
Output: the changes, e.g. "optim.lr: 3e-06 -> 1e-05"; or a UserError.
Example: run.seed decides the data order, so it may change only if run.allow_changes contains it. parallel.strategy may
change freely.
"""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from rmcore.config import UserError
from rmcore.config.schema import Config
from rmcore.config.section import Section

# The identity of a run: on resume these may change only if run.allow_changes contains them.
DECISIVE = ("model", "data", "batch.pairs", "loss", "run.seed")
# These change no result, except for the rounding of fp32 sums, so a change is not reported.
FREE: tuple[str, ...] = (
    *(
        "model.attention",
        "model.trust_remote_code",
        "data.cache",
        "data.workers",
        "batch.tokens",
        "batch.shrink",
        "parallel",
    ),
    *("log", "export", "hub"),
    *("run.dir", "run.resume", "run.allow_changes", "run.keep", "run.keep_best", "run.save_every", "run.save_minutes"),
    *("run.evals", "run.metrics", "run.background_save", "run.max_bad_steps"),
)
# What runs had before these keys existed. Other keys that an older checkpoint does not have are not compared.
FORMERLY = {"model.weights": "fp32", "optim.states": "fp32"}
# A completed run continues, or exports another checkpoint, if only these differ.
LENGTH = ("run.epochs", "run.max_steps", "run.patience", "run.best_metric")


class Change(NamedTuple):
    """One key with its two values, as JSON."""

    key: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.after}"


def changes(before: dict[str, Any], config: Config) -> list[Change]:
    """Every key whose value differs, except `FREE` ones and new keys that the older configuration does not have.

    Without data.date a run keeps the date on which it began, so the date counts as unchanged.
    """
    after = config.model_dump(mode="json")
    found = []
    for section, values in after.items():
        for name, value in values.items():
            key = f"{section}.{name}"
            old = before.get(section, {}).get(name, FORMERLY.get(key, value))
            now = getattr(getattr(config, section), name)
            if isinstance(now, Section) and isinstance(old, dict):  # with the defaults of keys that came since
                old = type(now).model_construct(**old).model_dump(mode="json")
            if old != value and not _among(key, FREE) and not (key == "data.date" and value is None):
                found.append(Change(key, json.dumps(old), json.dumps(value)))
    return found


def check_changes(before: dict[str, Any], config: Config, path: str) -> list[Change]:
    """The changes since the checkpoint at `path`. Raises UserError if one of them makes it another run."""
    found = changes(before, config)
    refused = [change for change in found if _among(change.key, DECISIVE) and not allowed(config, change.key)]
    if refused:
        lines = "\n".join(f"  {change}" for change in refused)
        raise UserError(
            f"{path} belongs to a run with other settings:\n{lines}\n"
            f"set them back, choose another run.dir, start anew with run.resume=never, or accept them with "
            f"'run.allow_changes=[{', '.join(change.key for change in refused)}]'"
        )
    return found


def allowed(config: Config, key: str) -> bool:
    """Whether run.allow_changes contains the key or its section."""
    return _among(key, config.run.allow_changes)


def _among(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
