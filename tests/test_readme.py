"""Every README.md of the project against the code: paths and links exist, keys are keys, commands are accepted."""

import contextlib
import io
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from rmcore.__main__ import COMMANDS, MODULES
from rmcore.bench.__main__ import COMMANDS as BENCHMARKS
from rmcore.config import Config, UserError, load_config
from rmcore.config.errors import ELSEWHERE
from tests.harness.paths import ROOT

CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))
FOLDERS = ("rmcore", "configs", "launch", "tests", ".ci")
READMES = [ROOT / "README.md", *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in READMES}
every_readme = pytest.mark.parametrize("name", TEXTS)


def code_of(text: str) -> list[str]:
    """The pieces of code in a README: spans in backticks, fenced and indented lines; continued lines are joined."""
    text = text.replace("\\\n", " ")
    fenced = [
        line
        for block in re.findall(r"^```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
    ]
    return [*re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text), *re.findall(r"^    (.*)$", text, re.MULTILINE), *fenced]


# --- paths and links


def paths_in(text: str) -> set[str]:
    """Paths from the root of the checkout; of a pattern such as rmcore/bench/results/*.json the folder."""
    folders = "|".join(re.escape(folder) for folder in FOLDERS)
    return set(re.findall(rf"(?<![\w/.])((?:{folders})/[\w./-]*[\w/])(?![\w*<{{])", text))


def links_in(text: str) -> set[str]:
    return set(re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text))


@every_readme
def test_every_path_and_link_exists(name: str) -> None:
    text, folder = TEXTS[name], (ROOT / name).parent
    missing = {path for path in paths_in(text) if not (ROOT / path).exists()}
    missing |= {link for link in links_in(text) if not (folder / link).exists()}
    assert sorted(missing) == []


def test_wrong_paths_are_found() -> None:
    assert paths_in("see rmcore/nothing.py and `tests/x/`") == {"rmcore/nothing.py", "tests/x/"}
    assert paths_in("rmcore/bench/results/*.json, /etc/rmcore/x, me/configs/hh.yaml") == {"rmcore/bench/results"}
    assert links_in("[a](../x.md), [b](https://example.org/x), [c](#here), [d](y/z.md#part)") == {"../x.md", "y/z.md"}
    assert sum(len(paths_in(text)) for text in TEXTS.values()) > 30


def test_every_config_and_script_is_described() -> None:
    assert [path for path in CONFIGS if path not in TEXTS["configs/README.md"]] == []
    scripts = [f"launch/{path.name}" for path in (ROOT / "launch").iterdir() if path.suffix != ".md"]
    assert [path for path in scripts if path not in TEXTS["launch/README.md"]] == []


# --- keys


def section_of(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model of a field: its own type, or the type of the items of a list."""
    annotations: list[Any] = [model.model_fields[name].annotation]
    while annotations:
        annotation = annotations.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        annotations += get_args(annotation)
    return None


# `rmcore evaluate` and `rmcore score` read one source, whose keys follow `data` directly.
SHORT = {f"data.{key}" for key in ("split", "name", "revision", "amount", "columns", "format")}
FILES = {
    "safetensors",
    "unverified",
    "json",
    "jsonl",
    "yaml",
    "py",
    "md",
    "h",
    "cpp",
    "html",
}  # model.safetensors and the like are files


def is_key(dotted: str) -> bool:
    """Whether `data.train.path` and the like is a key of the configuration, or a section of it."""
    model: type[BaseModel] | None = Config
    for part in dotted.split("."):
        if part.isdecimal():  # data.train.1.path
            continue
        if model is None or part not in model.model_fields:
            return dotted.startswith("data.train.columns.")
        model = section_of(model, part)
    return True


def keys_in(text: str) -> set[str]:
    sections = "|".join(Config.model_fields)
    keys = re.findall(rf"(?<![\w/.<-])((?:{sections})(?:\.[a-z_0-9]+)+)(?![\w/(])", "\n".join(code_of(text)))
    return {key for key in keys if key.rsplit(".", 1)[-1] not in FILES}


@every_readme
def test_every_key_is_a_key(name: str) -> None:
    assert sorted(key for key in keys_in(TEXTS[name]) - SHORT if not is_key(key)) == []


def test_wrong_keys_are_found() -> None:
    assert keys_in("`optim.learning_rate=1`, `model.safetensors`, log.x") == {"optim.learning_rate"}
    assert not is_key("optim.learning_rate") and is_key("data.train.1.path") and is_key("optim")
    assert len(keys_in("\n".join(TEXTS.values()))) > 30


# --- commands


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command of rmcore in a README: `rmcore X`, `python -m rmcore.X` or under torchrun -> ("X", arguments)."""
    for text in TEXTS.values():
        for piece in code_of(text):
            found = re.match(r"(?:[A-Z_]+=\S+ )*(?:(?:python|torchrun) .*?-m rmcore\.|rmcore )([a-z]\w*)\b(.*)", piece)
            if found and not re.search(r"\.\.\.|(^| )\[|key=value|\bCOMMAND\b", found[2]):  # not a synopsis
                yield found[1], shlex.split(found[2], comments=True)


ALL_COMMANDS = sorted({(name, *arguments) for name, arguments in commands()})


@cache
def help_of(command: str) -> str:
    """What `rmcore COMMAND --help` prints."""
    module = import_module(f"rmcore.{MODULES.get(command, command)}")
    main: Callable[[list[str]], int] | None = getattr(module, "main", None)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        assert main is not None
        main(["--help"])
    return printed.getvalue()


def mistake_in(command: str, *arguments: str) -> str | None:
    """What is wrong with a command, as far as its options and its configuration go; data and models are not read."""
    if command == "bench":
        if not arguments or arguments[0] not in BENCHMARKS:
            return f"no benchmark {arguments[:1]}"
        source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "rmcore" / "bench").rglob("*.py"))
        options = {word for word in arguments if word.startswith("--")} - {"--help"}
        unknown = [word for word in options if f'"{word}"' not in source]
        return f"unknown {unknown}" if unknown else None
    if command not in COMMANDS:
        return None if (command, *arguments[:1]) == ("config", "--schema") else "no such command"
    if command != "train":
        shown = help_of(command)
        unknown = [word for word in arguments if re.match(r"--?[a-z]", word) and word.split("=")[0] not in shown]
        if unknown:
            return f"unknown {unknown}"
    if command in ("train", "validate", "inspect", "prepare", "plan"):
        words = [word for word in arguments if "=" in word and not word.startswith("-")]
        path = arguments[0] if arguments and "=" not in arguments[0] else None
        if path is not None and not path.startswith("configs/"):  # a file of the reader
            path, words = None, ["model.name=m", "data.train.path=p", *words]
        if arguments and not arguments[0].startswith("-"):
            try:
                load_config(str(ROOT / path) if path else None, words)
            except UserError as error:
                return str(error)
    return None


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=" ".join)
def test_every_command_is_accepted(command: tuple[str, ...]) -> None:
    assert mistake_in(*command) is None


def test_wrong_commands_are_found() -> None:
    assert mistake_in("train", "configs/hh.yaml", "optim.lrr=1")
    assert mistake_in("train", "configs/nothing.yaml")
    assert mistake_in("plan", "configs/hh.yaml", "--gpu-count", "8")
    assert mistake_in("evaluate", "m", "d", "--jsno")
    assert mistake_in("evalaute", "m", "d")
    assert mistake_in("bench", "trian")
    assert mistake_in("plan", "configs/hh.yaml", "--gpus", "8") is None
    assert sum(command == "train" for command, *_ in ALL_COMMANDS) >= 7


# --- the keys of other trainers


def test_the_table_of_other_trainers_keys_agrees_with_the_error_messages() -> None:
    table = TEXTS["configs/README.md"].split("## Coming from open-instruct or TRL")[1]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `")]
    there = {name: here for names, here in rows for name in re.findall(r"`(\w+)`", names)}
    assert sorted(set(ELSEWHERE) - set(there)) == []
    for name, here in there.items():
        if name == "cache_dataset_only":  # a command here
            continue
        with pytest.raises(UserError) as raised:
            load_config(None, ["model.name=m", "data.train.path=p", f"{name}=1"])
        suggested = re.search(r"did you mean ([\w.]+)\?", str(raised.value))
        assert suggested and f"`{suggested[1]}" in here, (name, here, str(raised.value))
