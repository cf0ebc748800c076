"""Every error in the data gives one clear message with the place, and exit code 2; nothing is accepted silently.

The numbers are rows of the fault matrix. The fuzz changes one thing in good rows, or in a YAML file, in ways drawn by
hypothesis: RMCORE_FUZZ sets how many cases a property gets (10,000 in the slow run).
"""

import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
import textwrap

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rmcore import validate
from rmcore.config import UserError, load_config
from rmcore.data.formats.comparison import Comparison, comparison_from_row, detect_format
from rmcore.data.synthetic import byte_tokenizer
from rmcore.data.tokens.templates import load_template
from tests.harness.paths import ROOT, SHARED, needs_shared

GOOD = {"prompt": "What is 2 + 2?", "chosen": " It is 4.", "rejected": " It is 5."}
LINES = [json.dumps({**GOOD, "prompt": f"What is {i} + {i}?"}) for i in range(30)]
BASE = ["model.name=synthetic", "model.init=random", "data.max_tokens=512", "data.template=none", "run.evals=0"]


def with_line(number: int, line: bytes | str) -> bytes:
    lines = [text.encode() for text in LINES]
    lines[number - 1] = line if isinstance(line, bytes) else line.encode()
    return b"\n".join(lines) + b"\n"


def row(**change) -> str:
    return json.dumps({key: value for key, value in {**GOOD, **change}.items() if value is not ...})


# number and name -> (content of rows.jsonl, further arguments, what the message must hold)
FAULTS: dict[str, tuple[bytes, list[str], list[str]]] = {
    "17 cut line": (with_line(12, LINES[3][:-9]), [], ["rows.jsonl:12: not JSON"]),
    "17 lone surrogate": (with_line(7, r'{"prompt": "a", "chosen": "\ud83d", "rejected": "b"}'), [],
                          ["rows.jsonl:7: a lone surrogate"]),
    "17 binary file": (b"\x00\x01\x02" * 99, [], ["rows.jsonl:1: not text"]),
    "17 not UTF-8": (with_line(4, b'{"chosen": "\xff"}'), [], ["rows.jsonl:4: not UTF-8"]),
    "18 missing field": (with_line(25, row(rejected=...)), [], ["rows.jsonl:25: rejected is missing"]),
    "18 null field": (with_line(25, row(chosen=None)), [], ["rows.jsonl:25: chosen is null"]),
    "18 wrong type": (with_line(25, row(chosen=[1])), [], ["rows.jsonl:25: chosen must be text", "[1]"]),
    "18 no number": (with_line(25, row(margin="much")), ["loss.margin=data"], ["rows.jsonl", "margin"]),
    "19 wrong columns": (json.dumps({"good": "a", "bad": "b"}).encode(), [],
                         ["need chosen and rejected; found good, bad", "set data.train.columns="]),
    "19 mapped to nothing": (with_line(1, LINES[0]), ["data.train.columns={chosen: best}"],
                             ["data.train.columns: chosen is mapped to 'best'", "has prompt, chosen, rejected"]),
    "20 empty file": (b"", [], ["rows.jsonl", "the file is empty"]),
    "20 empty split": (with_line(1, LINES[0]), ["data.train.split=train[9:9]"], ["train[9:9]", "has no rows"]),
    "20 no such split": (with_line(1, LINES[0]), ["data.train.split=test"], ["data.train.split", "'test'"]),
    "21 every pair filtered": (with_line(1, row(rejected=GOOD["chosen"])), ["data.max_tokens=9"],
                               ["no row is left to use", "30 rows read", "dropped: text too long",
                                "more than data.max_tokens=9"]),
    "21 all identical": (row(rejected=GOOD["chosen"]).encode(), [], ["dropped: identical answers"]),
    "23 prompt too long": (with_line(1, LINES[0]), ["data.max_prompt_tokens=3"],
                           ["dropped: prompt too long", "data.max_prompt_tokens=3"]),
    "23 nothing left to cut": (row(chosen="x" * 600).encode(), ["data.length_policy=truncate_left"],
                               ["dropped: answer alone too long"]),
    "25 no chat template": (with_line(1, LINES[0]), ["data.template=tokenizer"],
                            ["data.template", "the tokenizer has no chat template"]),
    "25 unknown template": (with_line(1, LINES[0]), ["data.template=zefyr"], ["data.template", "did you mean zephyr"]),
    "25 turns for none": (json.dumps({s: [{"role": "user", "content": "q"}, {"role": "assistant", "content": s}]
                                      for s in ("chosen", "rejected")}).encode(), [],
                          ["data.template=none needs texts"]),
    "27 hub, not cached": (with_line(1, LINES[0]), ["data.train.path=nobody/nothing"],
                           ["not in the cache: nobody/nothing"]),
    "27 model, not cached": (with_line(1, LINES[0]), ["model.name=nobody/nothing"],
                             ["model.name=nobody/nothing: not in the cache", "hf download nobody/nothing"]),
}  # fmt: skip


def refused(arguments: list[str]) -> str:
    """stderr of `rmcore validate`, which must fail with one message and no traceback."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = validate.main(arguments)
        except SystemExit as exit:  # a mistake in the config itself
            code = exit.code
    assert code == 2, errors.getvalue()
    return errors.getvalue()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_clear_message(fault, tmp_path):
    content, more, wanted = FAULTS[fault]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    told = refused([*BASE, f"data.train.path={file}", f"data.cache={tmp_path / 'cache'}", *more])
    assert all(part in told for part in wanted), told
    assert "Traceback" not in told and "1 of 8 checks failed" in told and len(told) < 1500 + 3 * len(str(tmp_path))


TRAINED = ["18 missing field", "21 every pair filtered", "25 unknown template", "27 model, not cached"]


@pytest.mark.parametrize("fault", [TRAINED[0], *(pytest.param(f, marks=pytest.mark.slow) for f in TRAINED[1:])])
def test_training_refuses_alike_before_a_model_is_loaded(fault, tmp_path):
    content, more, wanted = FAULTS[fault]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    words = [*BASE, f"data.train.path={file}", f"data.cache={tmp_path / 'cache'}", f"run.dir={tmp_path / 'run'}", *more]
    told = subprocess.run([sys.executable, "-m", "rmcore.train", *words], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 2 and "Traceback" not in told.stderr
    assert all(part in told.stderr for part in wanted), told.stderr
    assert "parameters" not in told.stdout  # the model's line


def test_22_a_prefix_of_the_other_answer_is_kept_and_equal_answers_are_dropped(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([row(chosen=" It is", rejected=" It is 4."), row(rejected=GOOD["chosen"]), row()]))
    words = [*BASE, f"data.train.path={file}", f"data.cache={tmp_path / 'cache'}", "--json"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert validate.main(words) == 0
    data = next(check for check in json.loads(out.getvalue())["checks"] if check["name"] == "data")
    assert "3 rows read" in data["detail"] and "2 kept" in data["detail"] and "1 dropped: identical" in data["detail"]


@needs_shared
def test_24_padding_that_is_no_padding_is_said(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(LINES))
    words = [*BASE, f"model.name={SHARED / 'data/stories260k'}", f"data.train.path={file}", f"data.cache={tmp_path}"]
    assert validate.main(words) == 0
    assert "padding token <unk> (id 0)" in capsys.readouterr().out


def test_25_doubled_and_missing_tokens_are_warned_of(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([row(chosen=" yes<eos>"), row()]))
    words = [*BASE, f"data.train.path={file}", f"data.cache={tmp_path}"]
    assert validate.main(words) == 0
    assert "doubled EOS in 1 of 4 answers: check data.template" in capsys.readouterr().out
    assert validate.main([*words, "data.template=assistant_message_only"]) == 0
    assert "missing EOS in 3 of 4 answers: check data.template" in capsys.readouterr().out


OFFLINE = """
import socket, sys, time
def refuse(*_, **__):
    raise OSError("no network in this test")
socket.create_connection = socket.socket.connect = socket.getaddrinfo = refuse
from rmcore import validate
started = time.process_time()
sys.exit(validate.main(sys.argv[1:]))
"""


def test_27_a_hub_that_cannot_be_reached_is_told_soon(tmp_path):
    """Without the offline switch and without a network: no retries, and what to do."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(LINES))
    words = [*BASE, f"data.train.path={file}", "model.name=nobody/nothing", f"data.cache={tmp_path}"]
    names = dict.fromkeys(("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"), "")
    told = subprocess.run([sys.executable, "-c", OFFLINE, *words], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **names, "HF_HOME": str(tmp_path / "hf")}, timeout=120)  # fmt: skip
    assert told.returncode == 2 and "Traceback" not in told.stderr, told.stderr[-2000:]
    assert "model.name=nobody/nothing: not in the cache: its tokenizer (the hub cannot be reached" in told.stderr


def test_30_a_run_that_is_killed_while_it_prepares_harms_no_other(tmp_path):
    """One of two processes is killed at its first chunk; the other takes the lock and finishes."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({**GOOD, "prompt": f"What is {i} + {i}?"}) + "\n" for i in range(3000)))
    code = textwrap.dedent("""
        import os, sys
        from rmcore.config import load_config
        from rmcore.data.prepare import prepare_data
        from rmcore.data.tokens.tokenizer import load_tokenizer
        config = load_config(None, sys.argv[2:])
        def progress(done, total, what):
            if sys.argv[1] == "dies":
                print("began", flush=True)
                sys.stdin.read()  # until killed
        data = prepare_data(config, load_tokenizer(config), None, progress)
        print(data.train.fingerprint, len(data.train))
    """)
    words = [*BASE, f"data.train.path={file}", f"data.cache={tmp_path / 'cache'}"]

    def start(how: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", code, how, *words], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE)  # fmt: skip

    first = start("dies")
    assert first.stdout.readline() == "began\n"
    other = start("lives")
    first.kill()
    first.communicate()
    out, _ = other.communicate(timeout=100)
    assert other.returncode == 0 and out.split()[1] == "3000"
    assert start("lives").communicate(timeout=100)[0] == out


# ---- fuzz

CASES = int(os.environ.get("RMCORE_FUZZ", "150"))
fuzz = settings(
    max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
STRANGE_TEXT = st.text(st.characters(), max_size=20) | st.sampled_from(
    ["", " ", "\x00", "\x1b[31m", "\ud800", "a\udfff", "\u202e", "\ufeff", "<eos>", "<bos>", "é" * 3000, "{{ 7*7 }}",
     "\n\nHuman:", "\n\nAssistant:", "\n\nHuman: a\n\nAssistant:", "\r\n", "\U0010ffff"]
)  # fmt: skip
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | STRANGE_TEXT | st.just(10**400)
ANYTHING = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["role", "content", "from", "value", "answer", "rank", "x"]) | STRANGE_TEXT, inner, max_size=3,
), max_leaves=6)  # fmt: skip
TURNS = [{"role": "user", "content": "q"}]
FORMATS = [
    {**GOOD, "margin": 1.0, "source": "s"},
    {"chosen": [*TURNS, {"role": "assistant", "content": "a"}],
     "rejected": [*TURNS, {"role": "assistant", "content": "b"}]},
    {"prompt": TURNS, "chosen": [{"from": "gpt", "value": "a"}], "rejected": [{"from": "gpt", "value": "b"}]},
    {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    {"prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
    {"prompt": "q", "answers": ["a", "b", "c"], "scores": [1, 2, 2]},
    {"prompt": "q", "response_a": "a", "response_b": "b", "winner": "model_a"},
    {"prompt": "q", "response1": "a", "response2": "b", "votes": [1, 2]},
    {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "score_A": 1, "score_B": 2},
    {"prompt": "q", "response": "a", "score": 1.5},
    {**GOOD, "probability": 0.5},
]  # fmt: skip
TEMPLATES = [load_template(name, byte_tokenizer()) for name in ("none", "simple_chat", "zephyr")]


@st.composite
def changed_rows(draw):
    """A good row of a format, and the same row with one or two of its values (or parts of them) changed."""
    good = draw(st.sampled_from(FORMATS))
    bad = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 2))):
        place = bad
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            inner = place[key]
            if isinstance(inner, list | dict) and draw(st.booleans()):
                place = inner
                continue
            if draw(st.integers(0, 4)) == 0 and isinstance(place, dict):
                del place[key]
            else:
                place[key] = draw(ANYTHING)
            break
    return good, bad


def check_comparison(found: Comparison, wants_text: bool) -> None:
    """An accepted row is complete: the right types, pairs within the answers, finite numbers."""
    kinds = (str,) if wants_text else (list,)
    if not found.pairs:
        return  # dropped and counted
    assert isinstance(found.prompt, kinds) and all(isinstance(answer, kinds) for answer in found.answers)
    for turns in () if wants_text else (found.prompt, *found.answers):
        assert all(
            turn.keys() == {"role", "content"} and all(isinstance(v, str) for v in turn.values()) for turn in turns
        )
    assert len(found.pairs) == len(found.margin) == len(found.weight)
    for (winner, loser), margin, weight in zip(found.pairs, found.margin, found.weight, strict=True):
        assert winner != loser and 0 <= winner < len(found.answers) and 0 <= loser < len(found.answers)
        assert abs(margin) < float("inf") and 0 < weight <= 1
    assert isinstance(found.source, str) and found.source.isprintable()


@fuzz
@given(changed_rows(), st.sampled_from(TEMPLATES), st.booleans())
def test_a_strange_row_is_read_whole_or_refused(rows, template, whole_source):
    """A strange row after good ones, or a source of strange rows only: an error with the place, or a comparison."""
    good, bad = rows
    try:
        format = detect_format([bad] if whole_source else [good], {}, origin="f.jsonl", need_margin="margin" in good)
        found = comparison_from_row(bad, format, wants_text=template.wants_text, source="s", where="f.jsonl:2")
    except UserError as error:
        assert str(error).startswith(("f.jsonl:", "f.jsonl:2: ")) and len(str(error)) < 800
        str(error).encode()  # printable wherever it is printed
        return
    check_comparison(found, template.wants_text)
    if found.pairs:
        prompt, texts = template.render(found)
        assert isinstance(prompt, str) and len(texts) == len(found.answers)


LINE = st.binary(max_size=40) | STRANGE_TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.builds(
    lambda rows: json.dumps(rows[1]).encode(), changed_rows()
)  # fmt: skip


@settings(max_examples=max(10, CASES // 10), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(LINE, min_size=1, max_size=3), st.sampled_from([".jsonl", ".json", ".csv", ".jsonl.gz"]), st.integers(0, 3)
)
def test_a_strange_file_is_prepared_whole_or_refused(tmp_path_factory, lines, suffix, good_lines):
    from rmcore.data.prepare import prepare_data

    folder = tmp_path_factory.mktemp("fuzz")
    content = b"\n".join([*(line.encode() for line in LINES[:good_lines]), *lines])
    file = folder / f"rows{suffix}"
    file.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    config = load_config(None, [*BASE, f"data.train.path={file}", f"data.cache={folder / 'cache'}"])
    try:
        data = prepare_data(config, byte_tokenizer(), 512).train
    except UserError as error:
        str(error).encode()
        assert str(file) in str(error) or "data.train" in str(error)
        return
    report = data.report
    assert report["kept"] + sum(report["dropped"].values()) == report["rows"] >= len(data) > 0


KEYS = ["data.train.amount", "data.max_tokens", "data.template", "data.length_policy", "data.eval_fraction", "optim.lr",
        "data.train.columns", "loss.margin", "run.seed", "data.group_by_prompt", "batch.tokens",
        "data.limit"]  # fmt: skip
YAML = st.text("abc:{}[]-?!&*#|>%@`'\",. \n\t019ey_\x00\x85\u2028é", max_size=60)


@fuzz
@given(st.sampled_from(KEYS), SCALAR | YAML | st.lists(SCALAR, max_size=2))
def test_a_strange_value_of_a_key_is_typed_or_refused(key, value):
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        config = load_config(None, [*BASE, "data.train.path=synthetic", f"{key}={text}"])
    except UserError as error:
        assert key.split(".")[0] in str(error)
        return
    assert load_config_text(config.dump_yaml()) == config  # what was accepted is written and read again


def load_config_text(text: str):
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        return load_config(file.name, [])


@fuzz
@given(YAML, st.integers(0, 4))
def test_a_strange_yaml_file_is_a_config_or_refused(tmp_path_factory, text, where):
    lines = ["model: {name: m}", "data:", "  train: {path: p}", "  max_tokens: 9", "run: {seed: 2}"]
    lines.insert(where, text)
    file = tmp_path_factory.getbasetemp() / "strange.yaml"
    file.write_text("\n".join(lines), encoding="utf-8", newline="")
    try:
        config = load_config(str(file), [])
    except UserError as error:
        assert str(file) in str(error)
        str(error).encode()
        return
    assert config.model.name and config.data.train  # whole


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_thousand_cases(tmp_path):
    """All fuzz tests again with 10,000 cases each, in a process of their own."""
    told = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "strange", __file__], cwd=ROOT,
        env={**os.environ, "RMCORE_FUZZ": "10000"}, capture_output=True, text=True,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout[-3000:]
