"""Describes the keys of the schema in words, for `--help` and for the `expected ...` of error messages.

Input: the pydantic classes of schema.py. Output: text.
Example: the key `batch.pairs` (int, ge=1, default 64) becomes `batch.pairs = 64    whole number >= 1`, with its meaning
on the next line.
"""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rmcore.config.section import Words

WORDS: dict[Any, str] = {
    Any: "anything",
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true | false",
    NoneType: "null",
    dict: "mapping",
}
SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class Key:
    """One key of the schema: its dotted name, its type in words, its default as text, and its meaning."""

    name: str
    kind: str
    default: str
    meaning: str


def kind_of(annotation: Any, limits: tuple[Any, ...] = ()) -> str:
    """A type in words: `int` with `Ge(1)` -> `whole number >= 1`; a Literal -> its choices."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        own = [bound for each in extra for bound in getattr(each, "metadata", [each])]  # Field(ge=1) contains Ge(1)
        return kind_of(inner, (*limits, *own))
    if origin is Literal:
        return " | ".join(str(choice) for choice in get_args(annotation))
    if origin in (Union, UnionType):
        return " | ".join(kind_of(part, limits) for part in get_args(annotation))
    if origin is tuple:
        first, *rest = get_args(annotation)
        return "source or list of sources" if rest == [...] else f"list of {1 + len(rest)}: {kind_of(first)}"
    if origin is list:
        return f"list of {kind_of(get_args(annotation)[0])}"
    if origin is dict:
        return "mapping of {} to {}".format(*map(kind_of, get_args(annotation)))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping of keys"
    if written := next((limit.text for limit in limits if isinstance(limit, Words)), ""):
        return written
    names = [(sign, getattr(limit, name, None)) for limit in limits for name, sign in SIGNS.items()]
    bounds = ", ".join(f"{sign} {bound}" for sign, bound in names if bound is not None)
    return f"{WORDS[annotation]} {bounds}".strip() if annotation in (int, float) else WORDS[annotation]


def kind_of_field(field: FieldInfo) -> str:
    """The type of a pydantic field in words, with its limits."""
    return kind_of(field.annotation, tuple(field.metadata))


def section_class(annotation: Any) -> type[BaseModel] | None:
    """The class of a section or of a list of sections; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (tuple, Annotated):
        return section_class(get_args(annotation)[0])
    return None


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Every key below a section, in order. The keys of a data source follow data.train."""
    for name, field in section.model_fields.items():
        inner = section_class(field.annotation)
        if inner is None or get_origin(field.annotation) is tuple:
            default = "(required)" if field.is_required() else _shown(field.default)
            yield Key(prefix + name, kind_of_field(field), default, field.description or "")
        if inner is not None and not (get_origin(field.annotation) is tuple and name != "train"):
            yield from keys_of(inner, f"{prefix}{name}.")


def _shown(value: Any) -> str:
    """A default value as YAML text."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(_shown(part) for part in value)}]" if value else "null"
    return f"{value:g}" if isinstance(value, float) else str(value)


def help_text(config: type[BaseModel], prog: str, about: str) -> str:
    """The text of `--help`: usage, examples, and every key with default, type and meaning, by section."""
    lines = [
        f"usage: {prog} [CONFIG] [key=value ...]",
        "",
        *([about, ""] if about else []),
        "CONFIG is a YAML file. Without it, the defaults below apply. key=value pairs follow it and override it.",
        "",
        "examples:",
        f"  {prog} configs/quickstart.yaml",
        f"  {prog} configs/hh.yaml optim.lr=1e-5 data.limit=100",
        f"  {prog} model.name=Qwen/Qwen3-0.6B data.train.path=pairs.jsonl data.eval_fraction=0.1",
        "  torchrun --nproc_per_node 8 -m rmcore.train configs/hh.yaml optim.betas=[0.9,0.95]",
        "",
        "options: --help, --version; `python -m rmcore.config --schema` prints the JSON schema for editors",
    ]
    section = ""
    for key in keys_of(config):
        if (head := key.name.split(".")[0]) != section:
            section = head
            holder = section_class(config.model_fields[head].annotation)
            lines += ["", f"{head}: {(holder.__doc__ or '').strip() if holder else ''}"]
        lines += textwrap.wrap(f"  {f'{key.name} = {key.default}':<42} {key.kind}", 118, subsequent_indent=" " * 45)
        lines += textwrap.wrap(key.meaning, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"
