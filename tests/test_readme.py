"""The README against the project: its map, its paths, its keys and its commands."""

import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from rmcore.config import Config, load_config
from tests.harness.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))


def test_every_config_is_named() -> None:
    assert [path for path in CONFIGS if path not in README] == []


def test_every_path_exists() -> None:
    named = set(re.findall(r"(?<![\w/.])((?:rmcore|configs|launch|tests|\.ci)/[\w./-]*[\w/])", README))
    assert len(named) > 10
    assert sorted(path for path in named if not (ROOT / path).exists()) == []


def section_of(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model under a field: its own type, or what a list of it holds."""
    annotations: list[Any] = [model.model_fields[name].annotation]
    while annotations:
        annotation = annotations.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        annotations += get_args(annotation)
    return None


def is_key(dotted: str) -> bool:
    """Whether `data.train.path` and the like is a key of the configuration, or a section of it."""
    model: type[BaseModel] | None = Config
    for part in dotted.split("."):
        if model is None or part not in model.model_fields:
            return False
        model = section_of(model, part)
    return True


def test_every_key_is_a_key() -> None:
    sections = "|".join(Config.model_fields)
    marked = " ".join(re.findall(r"`[^`\n]+`", README)) + "\n".join(re.findall(r"^    .*$", README, re.MULTILINE))
    keys = set(re.findall(rf"(?<![\w/.<-])((?:{sections})(?:\.[a-z_]+)+)(?![\w/(])", marked))
    assert len(keys) > 30
    assert sorted(key for key in keys if not is_key(key)) == []
    assert not is_key("optim.learning_rate")
    assert is_key("data.train.path")


def commands() -> Iterator[str]:
    """Every training command that the README shows, continuation lines joined."""
    text = README.replace("\\\n", " ")
    yield from re.findall(r"(?:torchrun --nproc_per_node \d+|python) -m rmcore\.train (configs/[^`\n]+)", text)


@pytest.mark.parametrize("command", list(commands()))
def test_every_command_is_accepted(command: str) -> None:
    """As far as the configuration goes; the data and models are not looked for."""
    path, *overrides = command.split()
    load_config(str(ROOT / path), overrides)


def test_there_are_commands() -> None:
    assert len(list(commands())) >= 7
