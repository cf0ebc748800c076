"""Loads the configuration: a YAML file and `key.sub=value` overrides become a typed, frozen `Config`.

Input: a path (or a nested dict) and the texts of overrides, or a command line. Output: a `Config` whose sections are
attributes, or one `UserError` that lists every mistake with its file and line.
Example: `load_config("configs/hh.yaml", ["optim.lr=1e-5"]).optim.lr == 1e-05`.

Nothing in this folder imports torch, so that `--help` answers at once.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rmcore import __version__
from rmcore.config.errors import explain
from rmcore.config.help import help_text
from rmcore.config.layers import Layers, Origin, read_file, set_overrides, take_values
from rmcore.config.schema import Config
from rmcore.host.command import UserError, is_first_rank, run_command
from rmcore.host.terminal import print_text


def load_config(path: str | None, overrides: Sequence[str]) -> Config:
    """Read a YAML file (or none), set the `key.sub=value` overrides on top, and check everything.

    The value of an override is one plain scalar, or YAML if it opens with a quote, `[` or `{`. If a key is overridden
    twice, the later override wins. Raises UserError with every mistake, each with its place.
    """
    return _load(path, overrides)[0]


def config_from_values(values: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "the settings") -> Config:
    """Check the values of a nested dict as if they came from a file, with the `key.sub=value` overrides on top.

    `where` is the place that error messages give for the values. Raises UserError with every mistake, as `load_config`.
    Example: `config_from_values({"model": {"name": "m"}, "data": {"train": {"path": "rows.jsonl"}}})`.
    """
    layers = take_values(values, where)
    set_overrides(layers, overrides)
    return _checked(layers, where)


def _load(path: str | None, overrides: Sequence[str]) -> tuple[Config, list[str]]:
    """`load_config`, and notes on values that were replaced."""
    layers = Layers() if path is None else read_file(path)
    set_overrides(layers, overrides)
    config = _checked(layers, path or "command line", None if path is None else f"runs/{Path(path).stem}")
    return config, layers.notes


def _checked(layers: Layers, where: str, run_dir: str | None = None) -> Config:
    """The layers as a Config. `where`: the place of missing keys; `run_dir`: the default of run.dir.

    Raises UserError with every mistake, sorted by its place.
    """
    _complete_sections(layers, run_dir)
    _settle_evaluation(layers)
    problems: list[tuple[Origin | None, str]] = list(layers.problems)
    try:
        config = Config.model_validate(layers.values)
    except ValidationError as error:
        problems += explain(error, Config, layers)
    if not problems:
        return config
    nowhere = Origin(where, layer=2)
    placed = sorted(
        ((place or nowhere, text) for place, text in problems), key=lambda item: (item[0].layer, item[0].line)
    )
    lines = "\n".join(f"  {place.where}: {text}" for place, text in placed)
    raise UserError(f"{len(placed)} mistake{'s' * (len(placed) > 1)} in the configuration:\n{lines}")


def _complete_sections(layers: Layers, run_dir: str | None) -> None:
    """Create the sections that are empty (every key commented out) or required, and set the default of run.dir."""
    values = layers.values
    values.update({name: {} for name in Config.model_fields if values.get(name, {}) is None})
    for name in ("model", "data", "run"):
        values.setdefault(name, {})
    if isinstance(values["data"], dict):
        values["data"].setdefault("train", [{}])
    if isinstance(values["run"], dict) and run_dir is not None:
        values["run"].setdefault("dir", run_dir)


def _settle_evaluation(layers: Layers) -> None:
    """Overriding data.eval replaces data.eval_fraction of the file, and vice versa. Both in one layer are a mistake.

    Sources with a `set` are evaluated apart, so they go together with data.eval_fraction.
    """
    fraction, sources = layers.get(("data", "eval_fraction")), layers.get(("data", "eval"))
    if not sources or not isinstance(fraction, int | float) or not fraction > 0:
        return
    if isinstance(sources, list) and all(isinstance(source, dict) and source.get("set") for source in sources):
        return
    by_fraction = layers.origins["data", "eval_fraction"]
    by_source = max((layers.origins[path] for path in layers.below(("data", "eval"))), key=lambda origin: origin.layer)
    if by_source.layer == by_fraction.layer:
        layers.problems.append(
            (by_fraction, f"data.eval_fraction and data.eval ({by_source.where}) exclude each other")
        )
    elif by_source.layer < by_fraction.layer:
        layers.notes.append(f"{by_fraction.where} replaces data.eval ({by_source.where})")
    else:
        layers.notes.append(f"{by_source.where} replaces data.eval_fraction ({by_fraction.where})")
    del layers.values["data"]["eval" if by_source.layer < by_fraction.layer else "eval_fraction"]


def config_from_argv(argv: Sequence[str], prog: str, about: str = "") -> Config:
    """Load the configuration from the arguments `[CONFIG] [key=value ...]` of a command.

    `prog` is the command as the user types it, `about` a sentence on what it does. Handles --help and --version. After
    a mistake every rank raises SystemExit(2), and rank 0 prints it.
    """
    if "--help" in argv or "-h" in argv:
        raise SystemExit(run_command(prog, lambda: print_text(help_text(Config, prog, about).removesuffix("\n"))))
    if "--version" in argv:
        print_text(f"rmcore {__version__}")
        raise SystemExit(0)
    path = argv[0] if argv and "=" not in argv[0] and not argv[0].startswith("-") else None
    try:
        config, notes = _load(path, argv[1:] if path is not None else argv)
    except UserError as error:
        if is_first_rank():
            print_text(f"{prog}: {error}\n(--help lists every key)", sys.stderr)
        raise SystemExit(2) from None
    for note in notes if is_first_rank() else []:
        print_text(f"{prog}: {note}", sys.stderr)
    return config
