"""YAML text and `key.sub=value` overrides -> plain values, each with the place it came from.

Enters: a path (or None) and override texts. Leaves: `Layers`. Example: `lr: 1e-5` on line 7, under `optim:`, gives
`values == {"optim": {"lr": 1e-05}}` and `origin(("optim", "lr")).where == "configs/hh.yaml:7"`.

Plain scalars are null, booleans (YAML 1.1: yes/no/on/off too), decimal integers, decimal floats (`1e-5` too) or text.
Dates, octal, hexadecimal and sexagesimal numbers stay text: `12:30` never turns into 750. Aliases are refused.
"""

import difflib
import os
import re
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
SOURCE_LISTS = (("data", "train"), ("data", "eval"))  # each takes one mapping or a list of them
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Origin:
    """Where a value was written: `configs/hh.yaml:7`, or "override `optim.lr=x`"; `text`: a scalar as it was typed."""

    where: str
    text: str | None = None
    layer: int = 0  # 0: the file, 1: the overrides
    line: int = 0  # of the file, or the override's place among the overrides


@dataclass
class Layers:
    """What the file and the overrides say together, and what is wrong with how they say it."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    problems: list[tuple[Origin, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unread: set[KeyPath] = field(default_factory=set)  # scalars that are a problem already: their value here is None

    def origin(self, path: KeyPath) -> Origin | None:
        """The place that set `path`, or the nearest value around it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return None

    def below(self, path: KeyPath) -> list[KeyPath]:
        """The known paths at `path` and under it."""
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
        """Put a value in an existing mapping or list, in place of all that was there."""
        for known in self.below(path):
            del self.origins[known]
        self.origins[path] = origin
        self.get(path[:-1])[path[-1]] = value


class _Loader(yaml.SafeLoader):
    """SafeLoader, used to compose nodes only: with the plain scalars above, and no aliases."""

    def resolve(self, kind: type[yaml.Node], value: str, implicit: tuple[bool, bool]) -> str:
        if kind is yaml.ScalarNode:
            return TAG + plain_kind(value) if implicit[0] else f"{TAG}str"
        return str(super().resolve(kind, value, implicit))

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read: write the value out", mark)
        return super().compose_node(parent, index)


def plain_kind(text: str) -> str:
    """What an unquoted scalar is: null, bool, int, float or str."""
    return next((kind for kind, pattern in PLAIN.items() if pattern.fullmatch(text)), "str")


def read_layers(path: str | None, overrides: list[str]) -> Layers:
    """Read the file (if any), then set each override. Raises UserError when the file cannot be read as YAML at all."""
    layers = Layers()
    if path is not None:
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
    seen: dict[str, str] = {}
    for number, override in enumerate(overrides):
        _override(layers, override, number)
        key = override.partition("=")[0]
        if seen.get(key, override) != override:
            layers.notes.append(f"override `{seen[key]}` gives way to `{override}`")
        seen[key] = override
    return layers


def _text(path: str) -> str:
    """The file's text; raises UserError that says why it cannot be had."""
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
    """YAML text as nodes; raises UserError at bad syntax, with its line."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        raise UserError(f"{where}: not a text file (strange character at {error.position})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}" if mark and is_file else where
        raise UserError(f"{place}: not valid YAML: {', '.join(filter(None, (error.context, error.problem)))}") from None
    except (RecursionError, ValueError, OverflowError) as error:  # the last two: an escape that is no character
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{where}: not valid YAML: {reason}") from None


def _build(node: yaml.Node, path: KeyPath, layers: Layers, file: str, override: Origin | None) -> Any:
    """A node's plain value; notes the origin of everything below `path`, and the problems met on the way."""

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
    """A scalar's value; raises ValueError at explicit tags that are foreign here, or do not fit their text."""
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
        raise ValueError("a whole number beyond 64 bits")
    return int(digits)


def dotted(path: KeyPath, *more: str) -> str:
    """`("optim", "lr")` -> `optim.lr`."""
    return ".".join(str(part) for part in (*path, *more))


def _make_list(layers: Layers, path: KeyPath) -> None:
    """Turn the one mapping at `path` into a list of one, its origins with it."""
    if isinstance(mapping := layers.get(path), dict):
        layers.get(path[:-1])[path[-1]] = [mapping]
        for known in layers.below(path):
            moved = (*path, 0, *known[len(path) :]) if known != path else path
            layers.origins[moved] = layers.origins.pop(known)


def _override(layers: Layers, override: str, number: int) -> None:
    """Set one `key.sub=value`: a plain scalar as it stands (`*.jsonl`, `a: b`), or YAML after a quote, `[` or `{`."""
    key, equals, text = override.partition("=")
    text = text.strip()
    is_yaml = text[:1] in ("[", "{", '"', "'")
    origin = Origin(f"override `{override}`", None if text[:1] in ("[", "{") else text, layer=1, line=number)
    if not equals or not all(key.split(".")) or key.startswith("-"):
        hint = f"; leave out the dashes: {override.lstrip('-')}" if equals and key.startswith("-") else ""
        layers.problems.append((origin, f"not of the form key.sub=value{hint}"))
        return
    try:
        node = _compose(text, key, False) if is_yaml else yaml.ScalarNode(TAG + plain_kind(text), text)
        path = _walk(layers, key.split("."), replace(origin, text=None))
    except UserError as error:
        layers.problems.append((origin, str(error)))
        return
    assert node is not None  # text that opens with a quote or a bracket is never an empty document
    layers.set(path, None, origin)
    layers.get(path[:-1])[path[-1]] = _build(node, path, layers, "", origin)
    if path in SOURCE_LISTS:
        _make_list(layers, path)


def _walk(layers: Layers, parts: list[str], origin: Origin) -> KeyPath:
    """The path of a dotted key; makes the sections on the way. `data.train.path` means the one source of data.train."""
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
                raise UserError(f"{dotted(path)} is a list of {len(here)}: it has no `{parts[0]}`")
            here.extend([None] if int(parts[0]) == len(here) else [])
            path = (*path, int(parts[0]))
        elif isinstance(here, dict):
            path = (*path, parts[0])
        else:
            raise UserError(f"{dotted(path)} holds a value, not keys: it has no `{parts[0]}`")
        parts = parts[1:]
    return path
