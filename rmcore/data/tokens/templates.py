"""Renders comparisons as text, with one of six named chat templates, the tokenizer's own, a Jinja file, or none.

Input: a Comparison, and the special tokens of a tokenizer.
Output: the text of the prompt, and one full text per answer.
Example: simple_chat renders the prompt [user "2+2?"] with the answers ([assistant "4"], [assistant "5"]) as
("User: 2+2?", ("User: 2+2?\n\nAssistant: 4<eos>", "User: 2+2?\n\nAssistant: 5<eos>")).

Every template has one definition, its Jinja source: it is rendered here, and exported as the tokenizer's chat template.
The text of the prompt does not have to be a prefix of the full texts; only the length limits and the samples table use
it.
"""

import difflib
import functools
import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import xxhash

from rmcore.config import UserError
from rmcore.data.formats.comparison import Comparison, Turns
from rmcore.data.formats.fields import short
from rmcore.data.tokens.sandbox import Sandbox, TooMuchWork, bounded, written
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


class TemplateRefused(UserError):
    """A template refused one conversation (roles that do not alternate, for example); its row may be dropped."""


@dataclass(frozen=True)
class Template:
    """A way to write comparisons as text."""

    name: str
    chat_template: str | None  # Jinja source for the exported tokenizer; None: texts are taken unchanged
    special_tokens: dict[str, str]  # variables of the template: {"eos_token": "</s>", ...}
    _render_turns: Callable[[Turns, bool], str] | None = field(default=None, repr=False, compare=False)

    @property
    def wants_text(self) -> bool:
        """True if it takes comparisons of plain texts, False if it takes chat turns."""
        return self.chat_template is None

    @property
    def fingerprint(self) -> str:
        """A hash that changes if the same comparison would be rendered differently; part of the token cache's key."""
        parts = [str(self.chat_template), *(f"{name}={token}" for name, token in sorted(self.special_tokens.items()))]
        return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())

    def render(self, comparison: Comparison) -> tuple[str, tuple[str, ...]]:
        """-> (text of the prompt, one full text per answer).

        The text of the prompt is the conversation of the first answer without its last turn, and then the generation
        prompt. The template writes EOS, so the tokenizer must not add it again.
        Raises TemplateRefused if the template refuses the conversation, and ValueError for turns with `none`, or texts
        with the others.
        """
        prompt = comparison.prompt
        if self._render_turns is None:
            if not isinstance(prompt, str):
                raise ValueError("template none takes text; make the comparison with wants_text=True")
            eos = self.special_tokens["eos_token"]
            return prompt, tuple(f"{prompt}{answer}{eos}" for answer in comparison.answers)
        if isinstance(prompt, str):
            raise ValueError(f"template {self.name} takes turns; make the comparison with wants_text=False")
        conversations = [[*prompt, *answer] for answer in comparison.answers if not isinstance(answer, str)]
        texts = tuple(self._render_turns(conversation, False) for conversation in conversations)
        before = conversations[0][:-1]
        return (self._render_turns(before, True) if before else ""), texts


def load_template(name: str, tokenizer: Any) -> Template:
    """`data.template` -> Template. Only the special tokens and the chat template of `tokenizer` are read.

    Raises UserError for an unknown name, a missing chat template or EOS token, and a missing or malformed file.
    """
    special_tokens = {
        key: str(token) for key, token in tokenizer.special_tokens_map.items() if not isinstance(token, list)
    }
    if name == "none":
        _require_eos(name, special_tokens)
        return Template(name, None, special_tokens)
    if name == "tokenizer":
        return _tokenizer_template(tokenizer, special_tokens)
    if name in NAMED_TEMPLATES:
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
    if "eos_token" in source:
        _require_eos(name, special_tokens)
    compiled = _compile(source, origin, sandboxed=name not in NAMED_TEMPLATES)
    return Template(name, source, special_tokens, functools.partial(_render_jinja, compiled, origin, special_tokens))


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


def _tokenizer_template(tokenizer: Any, special_tokens: dict[str, str]) -> Template:
    """The tokenizer's own chat template, rendered as transformers' apply_chat_template renders it."""
    if not tokenizer.chat_template:
        raise UserError(
            "data.template=tokenizer: the tokenizer has no chat template; "
            f"set data.template to one of {', '.join(NAMED_TEMPLATES)}, none, or the path of a .jinja file"
        )
    try:
        source = tokenizer.get_chat_template()  # picks "default" where a tokenizer has several
    except ValueError as error:
        raise UserError(f"data.template: the tokenizer's chat templates cannot be used: {error}") from None

    origin = "the tokenizer's chat template"
    compiled = _compile(source, origin, sandboxed=True)
    variables = dict(tokenizer.special_tokens_map)  # with the lists of further tokens, which files do not get
    return Template("tokenizer", source, special_tokens, functools.partial(_render_jinja, compiled, origin, variables))


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
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Replaces Jinja's own filter, which escapes HTML; chat templates need plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _compile(source: str, origin: str, *, sandboxed: bool) -> jinja2.Template:
    """Compiles under the name of the file, so that a traceback into the template has its line."""
    environment = _environment(sandboxed)
    try:
        with bounded({"": source}):
            code = environment.compile(source, filename=origin)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"data.template: {origin}:{error.lineno}: {one_line(error.message)}") from None
    except (RecursionError, MemoryError, SyntaxError, TooMuchWork) as error:  # of the code that Jinja makes of it
        raise UserError(f"data.template: {origin}: too deeply nested or too large: {one_line(error)}") from None
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


def _render_jinja(
    template: jinja2.Template, origin: str, special_tokens: dict[str, str], messages: Turns, add_generation_prompt: bool
) -> str:
    variables = {**special_tokens, "messages": messages, "add_generation_prompt": add_generation_prompt}
    try:
        with bounded(variables):
            return written(template.render(variables, tools=None, documents=None))
    except Exception as error:  # a template is a program of the user and can raise anything
        frames = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames if frame.f_code.co_filename == origin]
        where = f"{origin}:{lines[-1]}" if lines else origin
        if isinstance(error, TooMuchWork):
            raise UserError(
                f"data.template: {where}: refused, because {error}; the conversation begins {short(messages[:1])}"
            ) from None
        raise TemplateRefused(f"data.template: {where}: {type(error).__name__}: {one_line(error)}") from None
