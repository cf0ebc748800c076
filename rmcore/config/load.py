"""Configuration: a YAML file and `key.sub=value` overrides -> a typed, frozen `Config`.

Enters: a path and override texts, or a command line. Leaves: a `Config` whose sections are attributes, or one
`UserError` that lists every mistake with its file and line.
Example: `load_config("configs/hh.yaml", ["optim.lr=1e-5"]).optim.lr == 1e-05`.
Nothing here imports torch: `--help` answers at once.
"""

import sys
from pathlib import Path

from pydantic import ValidationError

from rmcore import __version__
from rmcore.config.errors import explain
from rmcore.config.help import help_text
from rmcore.config.layers import Layers, Origin, read_layers
from rmcore.config.schema import Config
from rmcore.host.command import UserError, is_first_rank


def load_config(path: str | None, overrides: list[str]) -> Config:
    """Read a YAML file (or none), set the `key.sub=value` overrides, check everything.

    An override's value is a plain scalar, or YAML when it opens with a quote, `[` or `{`. Of two overrides of one key
    the later wins. Raises UserError with every mistake, each with its place.
    """
    return _load(path, overrides)[0]


def _load(path: str | None, overrides: list[str]) -> tuple[Config, list[str]]:
    """`load_config`, and notes on what gave way to what."""
    layers = read_layers(path, overrides)
    _fill_in(layers, path)
    _settle_evaluation(layers)
    problems: list[tuple[Origin | None, str]] = list(layers.problems)
    try:
        config = Config.model_validate(layers.values)
    except ValidationError as error:
        problems += explain(error, Config, layers)
    if not problems:
        return config, layers.notes
    nowhere = Origin(path or "command line", layer=2)
    placed = sorted(
        ((place or nowhere, text) for place, text in problems), key=lambda item: (item[0].layer, item[0].line)
    )
    lines = "\n".join(f"  {place.where}: {text}" for place, text in placed)
    raise UserError(f"{len(placed)} mistake{'s' * (len(placed) > 1)} in the configuration:\n{lines}")


def _fill_in(layers: Layers, path: str | None) -> None:
    """Make sections that are empty (all keys commented out) or needed for what is missing; name run.dir by the file."""
    values = layers.values
    values.update({name: {} for name in Config.model_fields if values.get(name, {}) is None})
    for name in ("model", "data", "run"):
        values.setdefault(name, {})
    if isinstance(values["data"], dict):
        values["data"].setdefault("train", [{}])
    if isinstance(values["run"], dict) and path is not None:
        values["run"].setdefault("dir", f"runs/{Path(path).stem}")


def _settle_evaluation(layers: Layers) -> None:
    """Of data.eval and data.eval_fraction the one of the later layer holds; both in one layer is a mistake."""
    fraction = layers.get(("data", "eval_fraction"))
    if not layers.get(("data", "eval")) or not isinstance(fraction, int | float) or not fraction > 0:
        return
    by_fraction = layers.origins["data", "eval_fraction"]
    by_source = max((layers.origins[path] for path in layers.below(("data", "eval"))), key=lambda origin: origin.layer)
    if by_source.layer == by_fraction.layer:
        layers.problems.append(
            (by_fraction, f"data.eval_fraction and data.eval ({by_source.where}) exclude each other")
        )
    elif by_source.layer < by_fraction.layer:
        layers.notes.append(f"data.eval ({by_source.where}) gives way to {by_fraction.where}")
    else:
        layers.notes.append(f"data.eval_fraction ({by_fraction.where}) gives way to {by_source.where}")
    del layers.values["data"]["eval" if by_source.layer < by_fraction.layer else "eval_fraction"]


def config_from_argv(argv: list[str], prog: str, about: str = "") -> Config:
    """`[CONFIG] [key=value ...]` -> Config, for every command that takes a configuration.

    `prog` is the command as the user types it, `about` a sentence on what it does. Answers --help and --version. On a
    mistake rank 0 (by the environment) prints it; every rank raises SystemExit(2).
    """
    speaks = is_first_rank()
    if "--help" in argv or "-h" in argv:
        print(help_text(Config, prog, about), end="")
        raise SystemExit(0)
    if "--version" in argv:
        print(f"rmcore {__version__}")
        raise SystemExit(0)
    path = argv[0] if argv and "=" not in argv[0] and not argv[0].startswith("-") else None
    try:
        config, notes = _load(path, argv[1:] if path is not None else argv)
    except UserError as error:
        if speaks:
            print(f"{prog}: {error}\n(--help lists every key)", file=sys.stderr)
        raise SystemExit(2) from None
    for note in notes if speaks else []:
        print(f"{prog}: {note}", file=sys.stderr)
    return config
