"""Renders comparisons as text, with one of six named chat templates, the tokenizer's own, a Jinja file, or none.

Input: a Comparison, and the special tokens of a tokenizer.
Output: the text of the prompt, and one full text per answer.
Example: simple_chat renders the prompt [user "2+2?"] with the answers ([assistant "4"], [assistant "5"]) as
("User: 2+2?", ("User: 2+2?\n\nAssistant: 4<eos>", "User: 2+2?\n\nAssistant: 5<eos>")).

Every template has one definition, its Jinja source: it is rendered here, and exported as the tokenizer's chat template.
What a render would otherwise depend on is written at the top of that source: the variables of the configuration
(data.chat_template_kwargs), and the date, if the template reads the clock. So the export renders the same text later.
The text of the prompt does not have to be a prefix of the full texts; only the length limits and the samples table use
it.
"""

import difflib
import functools
import json
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import xxhash

from rmcore.config import Config, UserError
from rmcore.data.formats.comparison import Comparison, Turns
from rmcore.data.formats.fields import short
from rmcore.data.formats.turns import EVERYTHING, REASONING, TemplateReads, all_texts
from rmcore.data.sandbox import Sandbox, TooMuchWork, bounded, written
from rmcore.host.terminal import one_line

_END = "{% if loop.last and not add_generation_prompt %}{{ eos_token }}{% endif %}"

NAMED_TEMPLATES = {
    "simple_concat_with_space": (
        "{% for message in messages %}{{ ' ' if not loop.first else '' }}{{ message['content'] }}"
        + _END
        + "{% endfor %}"
    ),
    "simple_concat_with_new_line": (
        "{% for message in messages %}{{ '\\n' if not loop.first else '' }}{{ message['content'] }}"
        + _END
        + "{% endfor %}"
    ),
    "simple_chat": (
        "{% for message in messages %}{{ '\\n\\n' if not loop.first else '' }}"
        "{{ message['role'] | capitalize + ': ' + message['content'] }}" + _END + "{% endfor %}"
    ),
    "assistant_message_only": (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] }}"
        "{% endif %}{% endfor %}"
    ),
    # A newline follows the last EOS, so the scored token is that newline.
    "zephyr": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"
    ),
    "tulu": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% if message['role'] != 'assistant' or not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"
    ),
}


CLOCK = "strftime_now"  # the function by which templates read the clock


class TemplateRefused(UserError):
    """A template refused one conversation (roles that do not alternate, for example); its row may be dropped."""


# What a Jinja template is rendered with: turns, generation prompt, further variables (tools, documents, ...).
_Render = Callable[[Turns, bool, Mapping[str, Any]], str]


@dataclass(frozen=True)
class Template:
    """A way to write comparisons as text."""

    name: str
    chat_template: str | None  # Jinja source for the exported tokenizer; None: texts are taken unchanged
    special_tokens: dict[str, str]  # variables of the template: {"eos_token": "</s>", ...}
    date: str | None = None  # as of which it renders, if it reads the clock
    warnings: tuple[str, ...] = ()  # configured variables that it does not read
    reads: TemplateReads = EVERYTHING  # what of a row it uses
    _render_turns: _Render | None = field(default=None, repr=False, compare=False)

    @property
    def wants_text(self) -> bool:
        """True if it takes comparisons of plain texts, False if it takes chat turns."""
        return self.chat_template is None

    @property
    def front(self) -> str:
        """BOS, perhaps with a space behind it, if its source begins with it, as in exported models; else "" """
        written = re.match(r"\{\{-?\s*bos_token\s*\}\}( ?)", self.chat_template or "")
        return self.special_tokens.get("bos_token", "") + written[1] if written else ""

    @property
    def fingerprint(self) -> str:
        """A hash that changes if the same comparison would be rendered differently; part of the token cache's key."""
        parts = [str(self.chat_template), *(f"{name}={token}" for name, token in sorted(self.special_tokens.items()))]
        return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())

    @property
    def notes(self) -> tuple[str, ...]:
        """A line about its date, if it reads the clock."""
        if self.date is None:
            return ()
        return (
            f"data.template={self.name} reads the clock: all texts are rendered as of {self.date}, also by the "
            f"exported model; data.date={self.date} gives the same texts on another day",
        )

    def render(self, comparison: Comparison) -> tuple[str, tuple[str, ...]]:
        """-> (text of the prompt, one full text per answer).

        The text of the prompt is the conversation of the first answer without its last turn, and then the generation
        prompt. The template writes EOS, so the tokenizer must not add it again.
        Raises TemplateRefused if the template refuses the conversation, and ValueError for turns with `none`, or texts
        with the others.
        """
        prompt, variables = comparison.prompt, comparison.variables
        if self._render_turns is None:
            if not isinstance(prompt, str):
                raise ValueError("template none takes text; make the comparison with wants_text=True")
            eos = self.special_tokens["eos_token"]
            return prompt, tuple(f"{prompt}{answer}{eos}" for answer in comparison.answers)
        if isinstance(prompt, str):
            raise ValueError(f"template {self.name} takes turns; make the comparison with wants_text=False")
        conversations = [[*prompt, *answer] for answer in comparison.answers if not isinstance(answer, str)]
        texts = tuple(self._text(conversation, False, variables) for conversation in conversations)
        before = conversations[0][:-1]
        return (self._text(before, True, variables) if before else ""), texts

    def _text(self, turns: Turns, cue: bool, variables: Mapping[str, Any]) -> str:
        """The text of a conversation. A template that cannot take a turn without content gets an empty content."""
        assert self._render_turns is not None
        try:
            return self._render_turns(turns, cue, variables)
        except TemplateRefused:
            if all("content" in turn for turn in turns):
                raise
            return self._render_turns([{"content": "", **turn} for turn in turns], cue, variables)

    def missing(self, comparison: Comparison, texts: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        """Yields (what, text) for each text of the data that the rendered `texts` of a comparison do not contain.

        White space does not count, because templates strip it. The named templates write all contents, but those that
        `assistant_message_only` leaves out by its name.
        """
        if self.name in NAMED_TEMPLATES or isinstance(comparison.prompt, str):
            return
        for answer, text in zip(comparison.answers, texts, strict=True):
            packed = ""
            for what, part in _parts([*comparison.prompt, *answer], comparison.variables):  # type: ignore[list-item]
                if part in text or not part.strip():
                    continue
                packed = packed or "".join(text.split())
                if "".join(part.split()) not in packed and json.dumps(part, ensure_ascii=False)[1:-1] not in text:
                    yield what, part


def _parts(turns: Turns, variables: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(what, text) of everything in a conversation that a template should write."""
    for turn in turns:
        role = turn["role"]
        yield f"the content of {role} turns", turn.get("content", "")
        for key, value in turn.items():
            if key == "tool_calls":
                for call in value:
                    yield f"tool calls of {role} turns", _function_name(call)
            elif key in REASONING and isinstance(value, str):
                yield f"the {key} of {role} turns", value
    for tool in variables.get("tools", ()):
        yield "tools", _function_name(tool)
    for document in variables.get("documents", ()):
        for text in all_texts(document):
            yield "documents", text


def _function_name(tool: Mapping[str, Any]) -> str:
    inner = tool.get("function")
    name = (inner if isinstance(inner, Mapping) else tool).get("name")
    return name if isinstance(name, str) else ""


def template_of(config: Config, tokenizer: Any) -> Template:
    """The template of a configuration; see `load_template`."""
    data = config.data
    return load_template(data.template, tokenizer, data.chat_template_kwargs, data.date)


def load_template(
    name: str, tokenizer: Any, variables: Mapping[str, Any] | None = None, today: str | None = None
) -> Template:
    """`data.template` -> Template. Only the special tokens and the chat template of `tokenizer` are read.

    `variables`: defaults of the template's own variables. `today` (YYYY-MM-DD; None: the present day): what a template
    that reads the clock gets, at midnight.
    Raises UserError for an unknown name, a missing chat template or EOS token, and a missing or malformed file.
    """
    special_tokens = {
        key: str(token) for key, token in tokenizer.special_tokens_map.items() if not isinstance(token, list)
    }
    if name == "none":
        _require_eos(name, special_tokens)
        return Template(name, None, special_tokens, warnings=tuple(_unread(variables or {}, frozenset(), name)))
    own, _, choice = name.partition(":")
    if own == "tokenizer":
        source, origin = _source_of(tokenizer, choice), "the tokenizer's chat template"
    elif name in NAMED_TEMPLATES:
        source, origin = NAMED_TEMPLATES[name], f"template {name}"
    elif name.endswith((".jinja", ".jinja2", ".j2")):
        source, origin = _read_jinja_file(Path(name)), name
    else:
        known = [*NAMED_TEMPLATES, "tokenizer", "none"]
        guess = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {guess[0]}?)" if guess else ""
        raise UserError(
            f"data.template: unknown name {name!r}{hint}; known: {', '.join(known)}, or the path of a .jinja file"
        )
    if "eos_token" in source and own != "tokenizer":
        _require_eos(name, special_tokens)
    tree = _parsed(source, origin)
    try:
        reads = what_it_reads(tree)
    except RecursionError as error:
        raise _too_large(origin, error) from None
    own_names, day = reads.variables or frozenset(), None
    warnings = tuple(_unread(variables or {}, own_names, name))
    source = "".join(f"{{%- if {key} is not defined %}}{{%- set {key} = {value!r} %}}{{%- endif %}}"
                     for key, value in (variables or {}).items() if key in own_names) + source  # fmt: skip
    if _reads_clock(tree):
        day = today or date.today().isoformat()
        source = _stopped_clock(tree, date.fromisoformat(day)) + source
    compiled = _compile(source, origin, sandboxed=name not in NAMED_TEMPLATES)
    # A tokenizer's own template gets what transformers gives it: also the lists of further tokens.
    tokens = dict(tokenizer.special_tokens_map) if own == "tokenizer" else special_tokens
    render = functools.partial(_render_jinja, compiled, origin, tokens)
    return Template(name, source, special_tokens, day, warnings, reads, render)


def what_it_reads(tree: jinja2.nodes.Template) -> TemplateReads:
    """The names that a template may look up in a message, the roles that it knows, and its variables.

    A template that writes whole messages (`message | tojson`, `message.items()`) reads every key.
    """
    names = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    names |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    if names.intersection(REASONING):
        names.update(REASONING)
    roles = set()
    for test in tree.find_all(jinja2.nodes.Compare):
        if _is_role(test.expr):
            roles |= {node.value for operand in test.ops for node in (operand.expr, *operand.expr.find_all(_CONST))
                      if isinstance(node, _CONST)}  # fmt: skip
    free = jinja2.meta.find_undeclared_variables(tree) - {"messages", "add_generation_prompt"}
    variables = frozenset(name for name in free if not name.endswith("_token"))
    turns = {"messages"}
    for loop in tree.find_all(jinja2.nodes.For):
        if isinstance(loop.target, jinja2.nodes.Name) and "message" in str(loop.iter):
            turns.add(loop.target.name)
    whole = [node.node for node in tree.find_all(jinja2.nodes.Filter) if node.name in _WHOLE]
    whole += [node.node for node in tree.find_all(jinja2.nodes.Getattr) if node.attr in ("items", "values")]
    dumps = any(isinstance(node, jinja2.nodes.Name) and node.name in turns for node in whole)
    return TemplateReads(None if dumps else frozenset(names), frozenset(roles), variables)


def _is_role(node: jinja2.nodes.Node) -> bool:
    if isinstance(node, jinja2.nodes.Getitem):
        return isinstance(node.arg, _CONST) and node.arg.value == "role"
    name = node.attr if isinstance(node, jinja2.nodes.Getattr) else getattr(node, "name", "")
    return "role" in str(name)


_CONST = jinja2.nodes.Const
_WHOLE = ("tojson", "items", "dictsort", "string", "pprint")


def _unread(variables: Mapping[str, Any], known: frozenset[str], name: str) -> Iterator[str]:
    for key in variables:
        if key in ("messages", "tools", "documents", "add_generation_prompt"):
            raise UserError(
                f"data.chat_template_kwargs: {key} comes with the rows; give variables of the template only"
            )
        if key not in known:
            yield f"data.chat_template_kwargs.{key} has no effect: data.template={name} does not read it"


def _reads_clock(tree: jinja2.nodes.Template) -> bool:
    """Whether the template uses transformers' clock, and not the macro of that name with which an export stops it."""
    macros = {node.name for node in tree.find_all(jinja2.nodes.Macro)}
    return any(node.name == CLOCK for node in tree.find_all(jinja2.nodes.Name)) and CLOCK not in macros


def _stopped_clock(tree: jinja2.nodes.Template, day: date) -> str:
    """Jinja source in which strftime_now gives midnight of `day`, for every format in the template."""
    formats = sorted({node.value for node in tree.find_all(jinja2.nodes.Const)
                      if isinstance(node.value, str) and "%" in node.value})  # fmt: skip
    moment = datetime.combine(day, time())
    table = {text: moment.strftime(text) for text in formats}
    return (
        f"{{%- macro {CLOCK}(format) %}}"
        "{%- set texts = " + repr(table) + " %}{{- texts[format] if format in texts "
        "else raise_exception('the date in this format was not fixed: ' ~ format) }}{%- endmacro %}"
    )


def _require_eos(name: str, special_tokens: dict[str, str]) -> None:
    if not special_tokens.get("eos_token"):
        raise UserError(
            f"data.template: {name} writes the EOS token, but the tokenizer has none; "
            "set eos_token in its tokenizer_config.json or choose another template"
        )


def _read_jinja_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"data.template: cannot read {path}: {reason}") from None


def _source_of(tokenizer: Any, choice: str) -> str:
    """The Jinja source of a tokenizer's chat template: of the one named `choice`, or of the default one."""
    found = tokenizer.chat_template
    if not found:
        raise UserError(
            "data.template=tokenizer: the tokenizer has no chat template; "
            f"set data.template to one of {', '.join(NAMED_TEMPLATES)}, none, or the path of a .jinja file"
        )
    if isinstance(found, str):
        if choice:
            raise UserError(f"data.template=tokenizer:{choice}: the tokenizer has a single chat template; "
                            "set data.template=tokenizer")  # fmt: skip
        return found
    if (choice or "default") not in found:
        raise UserError(
            f"data.template={'tokenizer:' + choice if choice else 'tokenizer'}: the tokenizer has the chat templates "
            f"{', '.join(sorted(found))}; choose one: data.template=tokenizer:{min(found)}"
        )
    return str(found[choice or "default"])


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the two names that templates read, as newer transformers versions do."""
    reasoning = next((message[key] for key in REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's tokens in transformers; it renders as its body."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


@functools.cache
def _environment(sandboxed: bool) -> jinja2.Environment:
    """A copy of the sandbox in which transformers renders chat templates, with bounds. The named templates are part of
    this file, so they render outside of the sandbox, which takes half the time."""
    kind = Sandbox if sandboxed else jinja2.Environment
    environment = kind(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals[CLOCK] = lambda format: datetime.now().strftime(format)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Replaces Jinja's own filter, which escapes HTML; chat templates need plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _parsed(source: str, origin: str) -> jinja2.nodes.Template:
    try:
        with bounded({"": source}):
            return _environment(True).parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"data.template: {origin}:{error.lineno}: {one_line(error.message)}") from None
    except (RecursionError, MemoryError, TooMuchWork) as error:
        raise _too_large(origin, error) from None


def _too_large(origin: str, error: BaseException) -> UserError:
    return UserError(f"data.template: {origin}: too deeply nested or too large: {one_line(error)}")


def _compile(source: str, origin: str, *, sandboxed: bool) -> jinja2.Template:
    """Compiles under the name of the file, so that a traceback into the template has its line."""
    environment = _environment(sandboxed)
    try:
        with bounded({"": source}):
            code = environment.compile(source, filename=origin)
    except (RecursionError, MemoryError, SyntaxError, TooMuchWork) as error:  # of the code that Jinja makes of it
        raise _too_large(origin, error) from None
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


def _render_jinja(
    template: jinja2.Template,
    origin: str,
    special_tokens: dict[str, str],
    messages: Turns,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> str:
    given = {"tools": None, "documents": None, **special_tokens, **variables}
    given |= {"messages": [_with_reasoning(message) for message in messages]}
    given["add_generation_prompt"] = add_generation_prompt
    try:
        with bounded(given):
            return written(template.render(given))
    except Exception as error:  # a template is a program of the user and can raise anything
        frames = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames if frame.f_code.co_filename == origin]
        where = f"{origin}:{lines[-1]}" if lines else origin
        if isinstance(error, TooMuchWork):
            raise UserError(
                f"data.template: {where}: refused, because {error}; the conversation begins {short(messages[:1])}"
            ) from None
        raise TemplateRefused(f"data.template: {where}: {type(error).__name__}: {one_line(error)}") from None
