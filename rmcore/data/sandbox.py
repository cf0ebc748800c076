"""A sandbox for Jinja that bounds what one rendering may do: the work, the size of its values, and its time.

Input: Jinja sources (chat templates, expressions that select rows), and the variables of a rendering. Output: jinja2
templates. A rendering inside `bounded` that exceeds its bound raises TooMuchWork.
Example: {{ "x" * 10**9 }}, {{ 9**9**9 }} and five nested loops over range(1000) end within a second, in a few MB.

Jinja's own sandbox keeps a template from Python's internals, but not from a gigabyte of text. Here every operation that
makes a value larger than its parts (operators, methods, filters, literals of lists) and every turn of a loop is paid
for before it is done, from a budget that grows with the conversation. So the same template and text are refused on
every machine alike. The clock is the second line of defence, for slow operations on values that the budget allows.
Linear templates use a hundredth of the budget.
"""

import math
import re
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor

UNITS, UNITS_A_CHARACTER = 20_000_000, 200  # of a rendering, and more for each character of its conversation
SECONDS = 10.0  # of the processor, for one rendering
MOST_BITS = 4096  # of a whole number
MOST_SOURCE = 1 << 20  # characters of a template
OBJECT, TURN = 16, 20  # units of an element of a list, and of a turn of a loop or a call
CHECK = 20_000  # units between two looks at the clock


class TooMuchWork(Exception):
    """A template does more than any conversation needs."""


class _Meter:
    """What one rendering may still do."""

    __slots__ = ("cpu_end", "end", "left", "next_look", "variables")

    def __init__(self, units: float, end: float, variables: Any = None) -> None:
        self.left, self.next_look, self.end, self.variables = units, units - CHECK, end, variables
        self.cpu_end = 0.0  # most renderings never look at the clock

    def pay(self, units: float) -> None:
        self.left -= units
        if self.left < self.next_look:
            self.look()

    def look(self) -> None:
        if self.left < 0:
            self.extend()
        if self.left < 0:
            raise TooMuchWork("it writes or computes more than any conversation needs")
        now = time.thread_time()
        self.cpu_end = self.cpu_end or now + SECONDS
        if now > self.cpu_end or time.monotonic() > self.end:
            raise TooMuchWork("it takes too long")
        self.next_look = self.left - CHECK

    def extend(self) -> None:
        """Add what the size of the conversation allows, once. Few renderings need it, so few count the size."""
        variables, self.variables, left = self.variables, None, self.left
        self.left = math.inf
        self.left = left + UNITS_A_CHARACTER * (size_of(variables) if variables is not None else 0)


class _Thread(threading.local):
    meter = _Meter(math.inf, math.inf)  # outside of `bounded`, nothing is limited
    end = math.inf  # by time.monotonic()
    room = math.inf  # characters that may still be written; both are set by `until`


_THREAD = _Thread()


@contextmanager
def bounded(variables: Mapping[str, Any]) -> Iterator[None]:
    """Inside, one rendering with these variables, or the compilation of a source, may do so much and no more."""
    before = _THREAD.meter
    _THREAD.meter = _Meter(UNITS, _THREAD.end, variables)
    try:
        yield
    finally:
        _THREAD.meter = before


@contextmanager
def until(end: float, room: float = math.inf) -> Iterator[None]:
    """Inside, the renderings of this thread also end at `end` (by time.monotonic()), and together after `room`
    characters."""
    _THREAD.end, _THREAD.room = end, room
    try:
        yield
    finally:
        _THREAD.end = _THREAD.room = math.inf


def written(text: str) -> str:
    """The text of a rendering. Raises TooMuchWork if it does not fit into the room that `until` gives."""
    _THREAD.room -= len(text)
    if _THREAD.room < 0:
        raise TooMuchWork("the texts of the request are too long")
    return text


def size_of(value: Any) -> int:
    """Characters of a value with all that it contains, each time that it contains it, plus OBJECT for each element.

    Counting stops above what the rendering may still do, because a list of lists of lists can contain its parts
    exponentially often.
    """
    if type(value) is str:
        return len(value)
    meter = _THREAD.meter
    total, rest = 0, [value]
    while rest:
        one = rest.pop()
        kind = type(one)
        total += OBJECT
        if kind is str:
            total += len(one)
        elif kind is dict:
            rest.extend(one)
            rest.extend(one.values())
        elif kind is list or kind is tuple:
            rest.extend(one)
        elif kind is jinja2.utils.Namespace:
            rest.append(object.__getattribute__(one, "_Namespace__attrs"))
        elif isinstance(one, str | bytes | range):
            total += len(one)
        elif isinstance(one, list | tuple | set | frozenset):
            rest.extend(one)
        elif isinstance(one, Mapping):
            rest.extend(one.items())
        if total > meter.left:
            meter.extend()
            if total > meter.left:
                break
    return total


def _pay(units: float) -> None:
    _THREAD.meter.pay(units)


def _whole(*values: Any) -> int:
    """The sum of the whole numbers among the values: widths, counts, and indents."""
    return sum(abs(value) for value in values if isinstance(value, int))


def _formatted(text: Any, arguments: Any) -> float:
    """Most characters of `text % arguments` or `text.format(arguments)`: each field may show all arguments, in a width
    that stands in the text or, as a `*` or a nested field, in the arguments."""
    found = str(text)
    widths = sum(int(digits) if len(digits) < 10 else 10**10 for digits in re.findall(r"\d+", found))
    if "*" in found or re.search(r"\{[^}]*\{", found):
        widths += _whole(*_flat(arguments)) * (found.count("%") + found.count("{"))
    fields = found.count("%") + found.count("{")
    return len(found) + widths + fields * size_of(arguments)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _flat(item)]
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, list | tuple) else [value]


def _square(value: Any, *_: Any) -> float:
    """The cost of what may take the square of its input, such as the regular expressions of Jinja and textwrap."""
    return size_of(value) ** 2 / 1000


def _product(text: Any, *arguments: Any) -> float:
    """The cost of what may compare each place of the text with each place of an argument."""
    return size_of(text) * size_of(arguments) / 1000


def _widened(value: Any, *arguments: Any) -> float:
    """Most characters of what adds a width or an indent, a number or a text, to each part or line of its input."""
    lines = value.count("\n") + 1 if isinstance(value, str) else 1
    texts = sum(len(argument) for argument in arguments if isinstance(argument, str))
    return _whole(*arguments) * (OBJECT + size_of(value)) + lines * texts


def _replaced(text: Any, old: Any = "", new: Any = "", *_: Any) -> float:
    return str(text).count(str(old)) * size_of(new)


def _joined(first: Any, second: Any = "", *_: Any) -> float:
    """Of `separator.join(parts)` and of `parts | join(separator)`: the separator between all parts."""
    return float(
        sum(
            len(a) * len(b) + (OBJECT * len(b) if isinstance(b, str) else 0)
            for a, b in ((first, second), (second, first))
            if isinstance(a, str | bytes) and hasattr(b, "__len__")
        )
    )


def _split(text: Any, separator: Any = None, *_: Any) -> float:
    """Of `text.split`: an object for each part."""
    parts = len(text) / 2 if separator is None or isinstance(separator, bool | int) else text.count(separator)
    return OBJECT * parts


def _wrapped(text: Any, *arguments: Any) -> float:
    return _square(text) + len(str(text)) * size_of(arguments)


def _dumped(value: Any, *arguments: Any) -> float:
    """Of JSON with an indent, which each line repeats for each level."""
    level, depth = [value], 0
    while level and depth < 1000:
        inner = [one for one in level if isinstance(one, list | tuple | Mapping) and one]
        level = [item for one in inner for item in (one.values() if isinstance(one, Mapping) else one)]
        depth += 1
    return (1 + _whole(*arguments) * depth) * size_of(value)


def _coded(text: Any, encoding: Any = "utf-8", *_: Any) -> float:
    common = str(encoding).lower().replace("_", "-") in ("utf-8", "utf8", "ascii", "latin-1")
    return 0.0 if common else _square(text)


# The cost of what may give more than goes in, or take more than linear time, by the name of the method or filter. All
# others give at most a few times what goes in.
_COSTS: dict[str, Callable[..., float]] = {
    **dict.fromkeys(
        ("center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes", "indent", "batch", "slice", "round"), _widened
    ),
    **dict.fromkeys(("rfind", "rindex", "rpartition", "strip", "lstrip", "rstrip", "trim"), _product),
    **dict.fromkeys(("striptags", "urlize", "pprint", "xmlattr", "sum"), _square),
    **dict.fromkeys(("format", "format_map"), lambda text, *arguments: _formatted(text, arguments)),
    **dict.fromkeys(("encode", "decode"), _coded),
    **dict.fromkeys(("split", "splitlines"), _split),
    "rsplit": lambda text, *arguments: _split(text, *arguments) + _product(text, *arguments),
    "translate": lambda text, table: size_of(text) * (1 + size_of(table)),
    "replace": _replaced,
    "join": _joined,
    "wordwrap": _wrapped,
    "tojson": _dumped,
}
# Filters that make a list of their input, of the characters if it is text.
_LISTING = {"list", "sort", "batch", "slice", "unique", "groupby", "map", "select", "reject", "max", "min", "random"}


def _listed(value: Any) -> Any:
    """An iterator as a list, so that its length is known before its parts are joined."""
    return list(value) if isinstance(value, Iterator) else value


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is paid for before and after, with the marks of filters that take the context."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    def cheap(*arguments: Any, **named: Any) -> Any:
        return _value(function(*arguments, **named))

    def costly(*arguments: Any, **named: Any) -> Any:
        if name == "join":
            arguments = (*arguments[:first], _listed(arguments[first]), *arguments[first + 1 :])
        given = (*arguments[first:], *named.values())
        _pay(_COSTS[name](*given) if name in _COSTS else OBJECT)
        if name in _LISTING and isinstance(given[0], str):
            _pay(OBJECT * len(given[0]))
        return _value(function(*arguments, **named))

    made = costly if name in _COSTS or name in _LISTING else cheap
    made.__dict__.update(getattr(function, "__dict__", {}))  # functions in C have no marks
    return made


class _Filters(dict[str, Callable[..., Any]]):
    """The filters of an environment; each is metered when it is set."""

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        super().__setitem__(name, _metered(name, function))


class _Paid(jinja2.visitor.NodeTransformer):
    """Sends loops, concatenations, slices and literals of containers through the filters "(...)" of the sandbox."""

    def _through(self, name: str, node: Any) -> jinja2.nodes.Expr:
        return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.For:
        self.generic_visit(node)
        node.iter = self._through("(loop)", node.iter)
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Expr:
        self.generic_visit(node)
        return self._through("(concat)", jinja2.nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: jinja2.nodes.Getitem) -> jinja2.nodes.Expr:
        self.generic_visit(node)
        return self._through("(slice)", node) if isinstance(node.arg, jinja2.nodes.Slice) else node

    def visit_List(self, node: jinja2.nodes.List) -> jinja2.nodes.Expr:
        self.generic_visit(node)
        return self._through("(value)", node) if node.items else node

    def visit_Dict(self, node: jinja2.nodes.Dict) -> jinja2.nodes.Expr:
        self.generic_visit(node)
        return self._through("(value)", node) if node.items else node

    def visit_Call(self, node: jinja2.nodes.Call) -> jinja2.nodes.Call:
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = self._through("(unpacked)", node.dyn_args)
        return node

    def visit_Tuple(self, node: jinja2.nodes.Tuple) -> jinja2.nodes.Expr:
        self.generic_visit(node)
        return self._through("(value)", node) if node.ctx == "load" else node


class _Turns:
    """An iterable that pays for each turn of a loop."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        meter = _THREAD.meter
        for item in self._items:
            meter.left -= TURN
            if meter.left < meter.next_look:
                meter.look()
            yield item

    def __getattr__(self, name: str) -> Any:
        return getattr(self._items, name)


class _SizedTurns(_Turns):
    """The same with a length, which `loop.length` and `loop.last` read."""

    def __len__(self) -> int:
        return len(self._items)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, with a budget. Renderings outside of `bounded` are not limited."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        own = {"loop": _turns, "concat": _concat, "value": _value, "slice": _sliced, "unpacked": _unpacked}
        filters = _Filters({f"({name})": function for name, function in own.items()})
        for name, function in self.filters.items():
            filters[name] = function
        self.filters = filters
        self.finalize = _value  # called for each value that a template writes

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        if len(source) > MOST_SOURCE:
            raise jinja2.TemplateSyntaxError(f"more than {MOST_SOURCE:,} characters", 1, name, filename)
        return super()._parse(source, name, filename)

    def _generate(
        self, source: jinja2.nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        return super()._generate(_Paid().visit(source), name, filename, defer_init)

    def concat(self, pieces: Any) -> str:  # type: ignore[override]
        """The pieces of a rendering, a macro or a block as one text."""
        meter, found = _THREAD.meter, []
        for piece in pieces:
            meter.left -= len(piece)
            if meter.left < meter.next_look:
                meter.look()
            found.append(piece)
        return "".join(found)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            if type(left) is str and type(right) is str:
                _THREAD.meter.pay(len(left) + len(right))
            elif not isinstance(left, int | float):
                _pay(size_of(left) + size_of(right))
            return left + right
        if operator == "%":
            if isinstance(left, str | bytes):
                _pay(_formatted(left, right))
            return left % right
        if isinstance(left, int | float) and isinstance(right, int | float):
            if isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
                if bits > MOST_BITS:
                    raise TooMuchWork(f"it computes a number of more than {MOST_BITS} bits")
        else:
            _pay(max(_whole(left, right), 1) * sum(size_of(one) for one in (left, right) if not isinstance(one, int)))
        return left**right if operator == "**" else left * right

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _pay(TURN)
        given = args
        if kwargs:  # Jinja adds two of its own
            given = (*args, *(v for name, v in kwargs.items() if name not in ("_loop_vars", "_block_vars")))
        if type(__obj) is types.BuiltinMethodType or hasattr(__obj, "__wrapped__"):
            # A method of a value, or Jinja's wrapper of str.format. It makes no object that holds its arguments.
            owner = getattr(__obj, "__wrapped__", __obj).__self__
            cost = _COSTS.get(__obj.__name__)
            if cost is not None:
                if __obj.__name__ == "join":
                    args = given = tuple(map(_listed, args))
                _pay(cost(owner, *given))
        elif type(__obj) is jinja2.runtime.LoopContext:  # the next level of a recursive loop
            args = tuple(map(_turns, args))
        elif given:
            _pay(sum(map(size_of, given)))
            if getattr(__obj, "__name__", "") == "generate_lorem_ipsum":  # Jinja's global `lipsum`
                numbers = _whole(*given)
                _pay(100 * numbers * max(numbers, 20))
        return _value(super().call(__context, __obj, *args, **kwargs))


def _turns(items: Any) -> Any:
    if isinstance(items, jinja2.Undefined):
        return items  # it is empty, or raises its own error
    return _SizedTurns(items) if hasattr(items, "__len__") else _Turns(items)


def _value(value: Any) -> Any:
    """The value, paid for; called also for each value that a template writes."""
    if type(value) is str:
        _THREAD.meter.pay(len(value))
    elif value is not None and type(value) is not bool and type(value) is not int:
        _pay(size_of(value))
    return value


def _sliced(value: Any) -> Any:
    """A slice, which copies a text, or the places of a list and not what it holds."""
    _pay(len(value) if isinstance(value, str) else OBJECT * len(value) if hasattr(value, "__len__") else OBJECT)
    return value


def _concat(parts: list[Any]) -> str:
    _pay(sum(map(size_of, parts)))
    return "".join(map(str, parts))


def _unpacked(value: Any) -> Any:
    """The argument of a call f(*value)."""
    _pay(OBJECT * len(value) if hasattr(value, "__len__") else 0)
    return value
