"""Reads a YAML file and `key.sub=value` overrides into plain values, and records where each value was written.

Input: a path or a nested dict, and the texts of overrides. Output: `Layers`.
Example: `lr: 1e-5` on line 7 of configs/hh.yaml, under `optim:`, gives `values == {"optim": {"lr": 1e-05}}` and
`origin(("optim", "lr")).where == "configs/hh.yaml:7"`.

A plain scalar is null, a boolean (as in YAML 1.1 also yes, no, on, off), a decimal integer, a decimal float (also
`1e-5`) or text. Dates and octal, hexadecimal and sexagesimal numbers remain text, so `12:30` never becomes 750. YAML
aliases are an error.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from rmcore.host.command import UserError

MAX_BYTES = 1_000_000
TAG = "tag:yaml.org,2002:"
PLAIN = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"(?i:yes|no|true|false|on|off)"),
    "int": re.compile(r"[-+]?(0|[1-9][0-9_]*)"),
    "float": re.compile(
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(?i:inf)|\.(?i:nan)"
    ),
}
SOURCE_LISTS = (("data", "train"), ("data", "eval"))  # each holds one mapping or a list of mappings
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Origin:
    """Where a value was written: `configs/hh.yaml:7`, or "override `optim.lr=x`"."""

    where: str
    text: str | None = None  # a scalar as it was typed
    layer: int = 0  # 0: the file, 1: the overrides
    line: int = 0  # line of the file, or number of the override


@dataclass
class Layers:
    """The values of the file with the overrides on top, and the problems found while reading them."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    problems: list[tuple[Origin, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # which override replaced which value
    unread: set[KeyPath] = field(default_factory=set)  # scalars reported in `problems` already; their value is None

    def origin(self, path: KeyPath) -> Origin | None:
        """The place where `path` was set, or else the nearest section around it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return None

    def below(self, path: KeyPath) -> list[KeyPath]:
        """The known paths at `path` and below it."""
        return [known for known in self.origins if known[: len(path)] == path]

    def get(self, path: KeyPath) -> Any:
        """The value at `path`, or None."""
        value: Any = self.values
        for part in path:
            if isinstance(value, dict):
                value = value.get(part)
            elif isinstance(value, list) and isinstance(part, int) and part < len(value):
                value = value[part]
            else:
                return None
        return value

    def set(self, path: KeyPath, value: Any, origin: Origin) -> None:
        """Set a value in an existing mapping or list and forget the origins of what it replaces."""
        for known in self.below(path):
            del self.origins[known]
        self.origins[path] = origin
        self.get(path[:-1])[path[-1]] = value


class _Loader(yaml.SafeLoader):
    """SafeLoader with the plain scalars above and without aliases; it is only used to compose nodes."""

    def resolve(self, kind: type[yaml.Node], value: str, implicit: tuple[bool, bool]) -> str:
        if kind is yaml.ScalarNode:
            return TAG + plain_kind(value) if implicit[0] else f"{TAG}str"
        return str(super().resolve(kind, value, implicit))

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read: repeat the value", mark)
        return super().compose_node(parent, index)


def plain_kind(text: str) -> str:
    """The kind of an unquoted scalar: null, bool, int, float or str."""
    return next((kind for kind, pattern in PLAIN.items() if pattern.fullmatch(text)), "str")


def read_file(path: str) -> Layers:
    """The values of a YAML file. Raises UserError if the file cannot be read or is not a YAML mapping."""
    layers = Layers()
    root = _compose(_text(path), path)
    if root is None:
        raise UserError(f"{path}: the file is empty; it needs at least model.name and data.train.path")
    if not isinstance(root, yaml.MappingNode):
        raise UserError(
            f"{path}:{root.start_mark.line + 1}: expected a mapping of sections (model:, data:, ...) at the top"
        )
    layers.values = _build(root, (), layers, path, None) or {}
    for list_path in SOURCE_LISTS:
        _make_list(layers, list_path)
    return layers


def take_values(values: Mapping[str, Any], where: str) -> Layers:
    """The values of a nested dict in place of a file; `where` is their place in error messages."""
    layers, origin = Layers(), Origin(where)

    def copy(value: Any, path: KeyPath) -> Any:
        layers.origins[path] = origin
        if isinstance(value, Mapping):
            return {key: copy(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [copy(item, (*path, index)) for index, item in enumerate(value)]
        return value

    layers.values = {section: copy(value, (section,)) for section, value in values.items()}
    for list_path in SOURCE_LISTS:
        _make_list(layers, list_path)
    return layers


def check_overrides(overrides: Any) -> None:
    """Raises UserError for what is not a list of texts."""
    listed = isinstance(overrides, list | tuple)
    if not listed or not all(isinstance(override, str) for override in overrides):
        raise UserError(f'overrides must be a list of texts such as ["optim.lr=1e-5"], not {overrides!r:.80}')


def set_overrides(layers: Layers, overrides: Sequence[str]) -> None:
    """Set each `key.sub=value` on top of the values; an override that cannot be read becomes a problem.

    Raises UserError for what is not a list of texts.
    """
    check_overrides(overrides)
    seen: dict[str, str] = {}
    for number, override in enumerate(overrides):
        _override(layers, override, number)
        key = override.partition("=")[0]
        if seen.get(key, override) != override:
            layers.notes.append(f"override `{override}` replaces `{seen[key]}`")
        seen[key] = override


def _text(path: str) -> str:
    """The text of the file. Raises UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES} bytes: this is not a configuration file")
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        folder = Path(path).parent
        near = difflib.get_close_matches(Path(path).name, os.listdir(folder) if folder.is_dir() else [], n=1)
        hint = f"; did you mean {folder / near[0]}?" if near else ""
        raise UserError(f"{path}: no such file{hint}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a directory; expected a YAML file such as {Path(path, 'config.yaml')}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 (byte {error.start})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _compose(text: str, where: str, is_file: bool = True) -> yaml.Node | None:
    """Parse YAML text into nodes. Raises UserError at a syntax error, with its line."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        raise UserError(f"{where}: not a text file (control character at position {error.position})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}" if mark and is_file else where
        raise UserError(f"{place}: not valid YAML: {', '.join(filter(None, (error.context, error.problem)))}") from None
    except (RecursionError, ValueError, OverflowError) as error:  # the last two: a bad escape sequence
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{where}: not valid YAML: {reason}") from None


def _build(node: yaml.Node, path: KeyPath, layers: Layers, file: str, override: Origin | None) -> Any:
    """The plain value of a node; records in `layers` the origin of everything below `path`, and problems."""

    def place(at: yaml.Node, value: yaml.Node) -> Origin:
        if override:
            return override
        line = int(at.start_mark.line) + 1
        return Origin(f"{file}:{line}", value.value if isinstance(value, yaml.ScalarNode) else None, line=line)

    if isinstance(node, yaml.MappingNode) and node.tag == f"{TAG}map":
        values: dict[str, Any] = {}
        for key, value in node.value:
            below = (*path, str(key.value))
            if not isinstance(key, yaml.ScalarNode) or key.tag != f"{TAG}str":
                shown = f"`{key.value}`" if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                layers.problems.append((place(key, key), f"{dotted(path, shown)}: a key must be text: quote it"))
            elif key.value in values:
                first = f" (first at {layers.origins[below].where})"
                layers.problems.append((place(key, key), f"{dotted(below)}: given twice{'' if override else first}"))
            else:
                layers.origins[below] = place(key, value)
                values[key.value] = _build(value, below, layers, file, override)
        return values
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{TAG}seq":
        items = []
        for index, item in enumerate(node.value):
            below = (*path, index)
            layers.origins[below] = place(item, item)
            items.append(_build(item, below, layers, file, override))
        return items
    try:
        return _scalar(node)
    except ValueError as error:
        layers.unread.add(path)
        layers.problems.append((place(node, node), f"{dotted(path) or 'the file'}: {error}"))
        return None


def _scalar(node: yaml.Node) -> Any:
    """The value of a scalar. Raises ValueError if its explicit tag is not allowed or does not fit its text."""
    kind = node.tag.removeprefix(TAG)
    if not isinstance(node, yaml.ScalarNode) or kind not in (*PLAIN, "str"):
        raise ValueError(f"the YAML tag {node.tag.replace(TAG, '!!')} is not read here")
    text = str(node.value)
    if kind == "str":
        return text
    if not PLAIN[kind].fullmatch(text):
        raise ValueError(f"`{text}` does not fit the YAML tag !!{kind}")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in ("yes", "true", "on")
    digits = text.replace("_", "")
    if kind == "float":
        return float(re.sub(r"(?i)\.(inf|nan)", r"\1", digits))
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError("whole numbers are limited to 64 bits")
    return int(digits)


def dotted(path: KeyPath, *more: str) -> str:
    """`("optim", "lr")` -> `optim.lr`."""
    return ".".join(str(part) for part in (*path, *more))


def _make_list(layers: Layers, path: KeyPath) -> None:
    """Turn a single mapping at `path` into a list of one mapping, and move the origins below it."""
    if isinstance(mapping := layers.get(path), dict):
        layers.get(path[:-1])[path[-1]] = [mapping]
        for known in layers.below(path):
            moved = (*path, 0, *known[len(path) :]) if known != path else path
            layers.origins[moved] = layers.origins.pop(known)


def _override(layers: Layers, override: str, number: int) -> None:
    """Set one `key.sub=value`. A value that opens with a quote, `[` or `{` is YAML; any other is one plain scalar."""
    key, equals, text = override.partition("=")
    text = text.strip()
    is_yaml = text[:1] in ("[", "{", '"', "'")
    origin = Origin(f"override `{override}`", None if text[:1] in ("[", "{") else text, layer=1, line=number)
    if not equals or not all(key.split(".")) or key.startswith("-"):
        hint = f"; remove the dashes: {override.lstrip('-')}" if equals and key.startswith("-") else ""
        layers.problems.append((origin, f"not of the form key.sub=value{hint}"))
        return
    try:
        node = _compose(text, key, False) if is_yaml else yaml.ScalarNode(TAG + plain_kind(text), text)
        path = _walk(layers, key.split("."), replace(origin, text=None))
    except UserError as error:
        layers.problems.append((origin, str(error)))
        return
    assert node is not None  # text that opens with a quote or a bracket is not an empty document
    layers.set(path, None, origin)
    layers.get(path[:-1])[path[-1]] = _build(node, path, layers, "", origin)
    if path in SOURCE_LISTS:
        _make_list(layers, path)


def _walk(layers: Layers, parts: list[str], origin: Origin) -> KeyPath:
    """The path of a dotted key; creates missing sections. `data.train.path` means the only source of data.train."""
    path: KeyPath = ()
    while parts:
        here = layers.get(path)
        if here is None:
            here = [] if path in SOURCE_LISTS else {}
            layers.set(path, here, origin)
        if isinstance(here, list):
            if path in SOURCE_LISTS and not parts[0].isdecimal():
                parts = ["0", *parts]
                if len(here) > 1:
                    raise UserError(f"{dotted(path)} is a list of {len(here)}: write {dotted(path, *parts)}")
            if not re.fullmatch("[0-9]{1,9}", parts[0]) or int(parts[0]) > len(here):
                raise UserError(f"{dotted(path)} is a list of {len(here)} and has no `{parts[0]}`")
            here.extend([None] if int(parts[0]) == len(here) else [])
            path = (*path, int(parts[0]))
        elif isinstance(here, dict):
            path = (*path, parts[0])
        else:
            raise UserError(f"{dotted(path)} is a single value and has no key `{parts[0]}`")
        parts = parts[1:]
    return path
