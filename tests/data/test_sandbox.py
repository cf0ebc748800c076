"""Chat templates that want a gigabyte, the age of the universe, or a deep recursion end soon, in a few MB, in one line.

Each attack runs in a process of its own under RLIMIT_AS, with the time that it took on its processor.
"""

# ruff: noqa: E501  (templates)

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rmcore.config import UserError
from rmcore.data.formats.comparison import Comparison
from rmcore.data.sandbox import SECONDS, Sandbox, TooMuchWork, bounded, until
from rmcore.data.tokens.templates import TemplateRefused, load_template
from tests.harness.paths import ROOT

CHAT = [
    {"role": "user", "content": "Why?\nTell me."},
    {"role": "assistant", "content": "<think>hm</think> So."},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "é\U0001f600 | <b>"},
]
GROW = "{% set n = namespace(x='abcdefgh', l=[1, 'a']) %}"
ATTACKS = [
    # one operation that gives a gigabyte
    "{{ 'a' * 10**9 }}", "{{ 10**9 * 'a' }}", "{{ [0] * 10**9 }}", "{{ ('a' * 10**9) | length }}", "{{ 9**(9**9) }}",
    "{{ 2**(10**10) }}", "{{ (9**999 * 9**999) }}", "{{ 'a' | center(10**9) }}", "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'.rjust(10**9) }}", "{{ '1'.zfill(10**9) }}", "{{ '\t'.expandtabs(10**9) }}", "{{ 'a\nb' | indent(10**9) }}",
    "{{ '%1000000000d' % 1 }}", "{{ '%*d' % (10**9, 1) }}", "{{ '%.1000000000f' % 1 }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}", "{{ '{:{}}'.format(1, 10**9) }}", "{{ '{a:{b}}'.format(a=1, b=10**9) }}",
    "{{ '{a:{b}}'.format_map({'a': 1, 'b': 10**9}) }}", "{{ [1] | batch(10**9, 0) | list }}",
    "{{ [1] | slice(10**9) | list }}", "{{ [1, [2]] | tojson(indent=10**9) }}", "{{ lipsum(n=10**7) }}",
    "{{ lipsum(n=1, min=10**8, max=10**9) }}", "{{ 'a'.encode().ljust(10**9) }}", "{{ (1).to_bytes(10**9, 'big') }}",
    "{{ 1.5 | round(10**9, 'ceil') }}", "{{ range(10**9) | list }}", "{{ 'a b' | wordwrap(1, true, 'x' * 10**9) }}",
    "{{ ['a'] | map('center', 10**9) | list }}", "{{ 'a'.__mul__(10**9) }}",
    # growth in steps
    GROW + "{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    GROW + "{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    GROW + "{% for i in range(40) %}{% set n.x = n.x * 2 %}{% endfor %}{{ n.x }}",
    GROW + "{% for i in range(40) %}{% set n.x = [n.x, n.x] | join('') %}{% endfor %}{{ n.x }}",
    GROW + "{% for i in range(40) %}{% set n.x = n.x.replace('a', n.x) %}{% endfor %}{{ n.x }}",
    GROW + "{% for i in range(40) %}{% set n.x = '%s%s' % (n.x, n.x) %}{% endfor %}{{ n.x }}",
    GROW + "{% for i in range(40) %}{% set n.x = '{0}{0}'.format(n.x) %}{% endfor %}{{ n.x }}",
    GROW + "{% for i in range(40) %}{% set n.x = n.x.join([n.x, n.x, n.x]) %}{% endfor %}{{ n.x }}",
    GROW + "{% for i in range(40) %}{% set n.x = n.x.translate({97: n.x}) %}{% endfor %}{{ n.x }}",
    GROW + "{% for i in range(40) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}{{ n.x }}",
    GROW + "{% for i in range(40) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
    GROW + "{% for i in range(40) %}{% set n.l = (n.l, n.l) %}{% endfor %}{{ n.l == n.l | list }}",
    GROW + "{% for i in range(40) %}{% set n.l = {'a': n.l, 'b': n.l} %}{% endfor %}{{ n.l | tojson }}",
    GROW + "{% for i in range(40) %}{% set n.l = dict(a=n.l, b=n.l) %}{% endfor %}{{ n.l | pprint }}",
    GROW + "{% for i in range(40) %}{% set n.l = namespace(a=n.l, b=n.l) %}{% endfor %}{{ n.l }}",
    GROW + "{% for i in range(40) %}{% set n.l = cycler(n.l, n.l).items %}{% endfor %}{{ n.l }}",
    GROW + "{% for i in range(40) %}{% set n.l = n.l + n.l %}{% endfor %}{{ n.l }}",
    GROW + "{% macro f(a) %}{{ a }}{{ a }}{% endmacro %}{% for i in range(40) %}{% set n.x = f(n.x) %}{% endfor %}",
    GROW + "{% for i in range(99999) %}{% set n.l = n.l + ['x' * 1000] %}{% endfor %}",
    "{% for i in range(99999) %}{{ 'a' * 10000 }}{% endfor %}",
    "{% macro f() %}{% for i in range(99999) %}{{ 'a' * 10000 }}{% endfor %}{% endmacro %}{{ f() }}",
    "{{ range(99999) | map('center', 10000) | join }}", "{{ range(99999) | join('x' * 10000) }}",
    "{{ ('x' * 10000).join(range(99999) | map('string')) }}", "{% set x = 'é' * 10**7 %}{{ cycler(*x) }}{{ x | list }}",
    # loops
    "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% set r = range(99999) %}{% for i in r %}{% for j in r if j > i + 99999 %}{% endfor %}{% endfor %}",
    "{% set r = 'a' * 99999 %}{% for i in r %}{% for j in r %}{% if loop.last %}{% endif %}{% endfor %}{% endfor %}",
    "{% for i in [1] recursive %}{% if loop.depth < 6 %}{{ loop(range(99999)) }}{% endif %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% for i in range(99999) %}{% set x = range(99999) | list | sort | map('string') | join %}{% endfor %}",
    # slow operations of the libraries
    "{% set x = 'a' * 10**7 %}{{ x.rfind('b' + 'a' * 5 * 10**6) }}", "{{ ('<' * 10**7) | striptags }}",
    "{% set x = 'a' * 10**7 %}{{ x.strip('b' * 10**7 + 'a') }}", "{{ ('http://' * 10**6) | urlize }}",
    "{{ ('é' * 10**7).encode('punycode') }}", "{{ ('a-' * 10**6) | wordwrap(1) }}",
]  # fmt: skip
LIMIT = 600 << 20  # bytes of address space beyond that of the process before

CHILD = """
import json, resource, sys, time
from tests.data.test_sandbox import CHAT, LIMIT, attack
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT, used + LIMIT))
for source in json.load(sys.stdin):
    began = time.process_time()
    print(json.dumps([*attack(source), time.process_time() - began]), flush=True)
"""


def attack(source: str) -> tuple[str, str]:
    """The kind of the error and its message, or the text."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>")
    tokenizer.chat_template = source
    try:
        template = load_template("tokenizer", tokenizer)
        return "text", template.render(Comparison(CHAT[:-1], (CHAT[-1:],), "", ""))[1][0]
    except UserError as error:
        return type(error).__name__, str(error)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[str, str, float]]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(ATTACKS),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(ATTACKS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("source", ATTACKS, ids=range(len(ATTACKS)))
def test_an_attack_ends_soon_in_little_memory_and_one_line(source: str, outcomes) -> None:
    kind, message, seconds = outcomes[source]
    assert kind in ("UserError", "TemplateRefused"), message[:300]
    assert message.startswith("data.template: the tokenizer's chat template") and len(message) < 600, message
    assert "\n" not in message and "MemoryError" not in message, message
    assert seconds < SECONDS + 5


HARMLESS = [
    "{% for m in messages %}{{ m.role | upper ~ ': ' ~ m['content'] | trim }}\n{% endfor %}{{ eos_token }}",
    "{% for m in messages[::-1] %}{{ loop.index }}/{{ loop.length }}/{{ loop.revindex }}{{ m.role }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.first }}{{ loop.last }}{{ loop.previtem }}{% else %}x{% endfor %}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }}{% endfor %}{{ messages[0] | dictsort }}",
    "{% for x in messages | selectattr('role', 'equalto', 'user') | list %}{{ x | tojson(indent=4) }}{% endfor %}",
    "{% for x in missing %}a{% else %}none{% endfor %}{% for x in [] %}a{% else %}none{% endfor %}",
    "{% set ns = namespace(a=0, text='') %}{% for m in messages %}{% set ns.a = ns.a + loop.index0 * 2 %}"
    "{% set ns.text = ns.text + m.content ~ loop.cycle('x', 'y') %}{% endfor %}{{ ns.a }}{{ ns.text }}{{ ns.text[2:5] }}",
    "{{ '-' * 20 }}{{ 'a=%s b=%05.2f' % ('x', 1.5) }}{{ '%s' | format(3) }}{{ '{} {x!r}'.format(1, x='y') }}{{ 2 ** 10 }}",
    "{{ 7 // 2 }}{{ 7 % 4 }}{{ 1.5 * 2 }}{{ -3 + 1 }}{{ [1] + [2] }}{{ [1, 2] * 2 }}{{ (1, 'a') }}{{ {'k': [1, none]} }}",
    "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1) }}{{ f('x', 3, 4, c=5) }}"
    "{{ f(*[7, 8]) }}{{ f(**{'a': 9}) }}{% call f(1) %}x{% endcall %}",
    "{% set content = messages[1].content %}{{ content.split('</think>')[-1].lstrip() }}{{ content.rsplit('>', 1) }}"
    "{{ content.strip('.') }}{{ content.replace('hm', 'ho') }}{{ content.startswith('<') }}{{ content | length }}",
    "{% for g in messages | groupby('role') %}{{ g.grouper }}{{ g.list | length }}{% endfor %}"
    "{{ messages | map(attribute='content') | join('|') }}{{ [3, 1, 2] | sort | first }}{{ [1, 2, 3] | batch(2) | list }}",
    "{% set x %}a{{ 1 }}b{% endset %}{{ x }}{% filter upper %}abc{{ x }}{% endfilter %}{{ 'a\nb' | indent(2, true) }}",
    "{% for i in [1, [2, [3]]] recursive %}{% if i is iterable %}({{ loop(i) }}){% else %}{{ i }}{% endif %}{% endfor %}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{% set j = joiner(', ') %}{{ j() }}{{ j() }}{{ range(3) | list }}",
    "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}{{ nothing }}{{ 'ab'[1] }}{{ 'é'.encode() }}",
    "{{ messages | tojson }}{{ 'x' in 'xyz' }}{{ messages[0].content is string }}{{ (1).bit_length() }}{{ 'a,b'.split(',') }}",
]  # fmt: skip


@pytest.mark.parametrize("source", HARMLESS, ids=range(len(HARMLESS)))
def test_the_sandbox_renders_what_transformers_renders(source: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>")
    expected = tokenizer.apply_chat_template(CHAT, chat_template=source, tokenize=False)
    assert attack(source) == ("text", expected)


def test_the_budget_grows_with_the_conversation_and_each_rendering_has_its_own() -> None:
    """A template that copies all that it has written at every turn is rendered, in several threads and repeatedly."""
    environment = Sandbox()
    template = environment.from_string(
        "{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = ns.x + m %}{% endfor %}{{ ns.x }}"
    )
    messages = ["so " * 5000] * 300  # 4.5 million characters, copied 150 times: 675 million
    texts: list[str] = []

    def render(count: int) -> None:
        for _ in range(count):
            with bounded({"messages": messages}):
                texts.append(template.render(messages=messages))

    threads = [threading.Thread(target=render, args=(2,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["".join(messages)] * 6
    with pytest.raises(TooMuchWork), bounded({}):
        template.render(messages=messages)
    assert template.render(messages=messages) == texts[0], "and outside nothing is limited"


def test_a_deadline_ends_a_rendering() -> None:
    template = Sandbox().from_string("{% for i in range(100000) %}{% endfor %}")
    with until(0.0), pytest.raises(TooMuchWork, match="too long"), bounded({}):
        template.render()
    with bounded({}):
        assert template.render() == ""


@pytest.mark.parametrize(
    "source",
    ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if 1 %}" * 3000 + "{% endif %}" * 3000, "x" * (2 << 20),
     "{{ " + "-" * 5000 + "1 }}", "{{ " + "[" * 3000 + "]" * 3000 + " }}", "{{ " + "1+" * 50_000 + "1 }}"],
    ids=["brackets", "blocks", "long", "signs", "lists", "sums"],
)  # fmt: skip
def test_a_source_that_is_too_large_or_too_deep_is_one_line(source: str) -> None:
    kind, message = attack(source)
    assert kind == "UserError" and message.startswith("data.template: the tokenizer's chat template"), message
    assert "\n" not in message and len(message) < 500


def test_the_error_of_a_template_reaches_the_message_as_one_clean_line(tmp_path: Path) -> None:
    hostile = "a\nrmcore: done \x1b[2J\x9b\u202e" + "b" * 5000
    source = "{{ raise_exception(" + json.dumps(hostile) + ") }}"
    (tmp_path / "t.jinja").write_text(source)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=source, eos_token="e")
    for name in (str(tmp_path / "t.jinja"), "tokenizer"):
        with pytest.raises(TemplateRefused) as refused:
            load_template(name, tokenizer).render(Comparison(CHAT[:-1], (CHAT[-1:],), "", ""))
        message = str(refused.value)
        assert message.isprintable() and "rmcore: done" in message and len(message) < 600
