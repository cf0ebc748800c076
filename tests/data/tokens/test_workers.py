"""Worker processes: the same cache as one process, and a clean end however a process of the preparation ends."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rmcore.config import Config, UserError, load_config
from rmcore.data.prepare import prepare_data
from rmcore.data.tokens import build, workers
from rmcore.data.tokens.tokenizer import load_tokenizer
from tests.harness.paths import ROOT

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
ROWS_OF_CHUNK = 8


def rows() -> Iterator[dict]:
    """Pairs of two sources with long, identical, refused, undecided and special texts, in changing order."""
    for number in range(240):
        row = {"prompt": f"{number}: what is it?", "source": f"source {number % 7 // 3 + number // 100}"}
        chosen, rejected = f"This is {number} " * (1 + number % 9), "No." * (1 + number % 5)
        if number % 31 == 3:
            chosen = rejected
        if number % 37 == 5:
            chosen += "<eos>" * (number % 3)
        if number % 23 == 7:
            rejected = ""
        if number % 29 == 2:
            chosen = "long " * 90
        yield row | {"answer_a": chosen, "answer_b": rejected, "winner": "tie" if number % 17 == 1 else "model_a"}


def config_of(folder: Path, cache: str, *more: str) -> Config:
    path = folder / "rows.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    template = folder / "picky.jinja"
    template.write_text(
        "{% if '13' in messages[0]['content'] %}{{ raise_exception('an unlucky number') }}{% endif %}"
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}{{ eos_token }}"
    )
    given = ["model.name=synthetic", f"data.train.path={path}", f"data.template={template}", "data.max_tokens=300"]
    return load_config(None, [*given, f"data.cache={folder / cache}", "run.evals=0", *more])


def files_of(cache: Path) -> dict[str, bytes]:
    (entry,) = [path for path in (cache / "tokens").iterdir() if path.is_dir()]
    return {path.name: path.read_bytes() for path in sorted(entry.iterdir())}


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small chunks; workers are worth it after the first, and the next chunks wait for them."""
    monkeypatch.setattr(build, "CHUNK_ROWS", ROWS_OF_CHUNK)
    monkeypatch.setattr(workers, "WORTH_SECONDS", -1.0)
    ready = workers.Workers.ready.fget
    monkeypatch.setattr(workers.Workers, "ready", property(lambda self: self._reason.exception() or ready(self)))


def session_of(process: int) -> list[int]:
    """The processes that run in the session of a process (it leads the session)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            found += [int(path.parent.name)] if int(session) == process and state != "Z" else []
    return found


def test_the_cache_of_two_workers_is_that_of_one_process(
    tmp_path: Path, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched, sent = [], []
    launch, submit = workers.Workers._launched, workers.Workers.submit
    monkeypatch.setattr(workers.Workers, "_launched", lambda *a: launched.append(launch(*a)) or launched[-1])
    monkeypatch.setattr(workers.Workers, "submit", lambda self, chunk: sent.append(chunk) or submit(self, chunk))
    found = {}
    for count in (1, 2):
        config = config_of(tmp_path, f"cache{count}", f"data.workers={count}")
        train = prepare_data(config, load_tokenizer(config), None).train
        found[count] = files_of(tmp_path / f"cache{count}")
    assert found[1] == found[2] and len(found[1]) > 15
    report = train.report
    assert len(report["dropped"]) == 4 and len(train.sources) == 5 and "unlucky" in str(report["warnings"]), report
    assert len(sent) == 240 // ROWS_OF_CHUNK - 1 and len(launched) == 1
    assert launched[0].returncode == 0 and not session_of(launched[0].pid), "the workers ended by themselves"


def test_a_killed_worker_ends_the_preparation_in_one_message(tmp_path: Path, at_once: None) -> None:
    killed, session = [], []

    def kill_one(done: int, total: int, what: str) -> None:
        if done >= 4 * ROWS_OF_CHUNK and not killed:
            (leader,) = {parent_of(process) for process in children_of_children()}
            session.append(leader)
            killed.append(max(process for process in session_of(leader) if process != leader))
            os.kill(killed[0], signal.SIGKILL)

    config = config_of(tmp_path, "cache", "data.workers=2")
    with pytest.raises(UserError, match=r"data\.train: a worker process ended early, killed by SIGKILL.*data\.workers"):
        prepare_data(config, load_tokenizer(config), None, kill_one)
    wait_for_the_end_of(session[0])
    assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()], "no half cache"


def wait_for_the_end_of(session: int) -> None:
    end = time.monotonic() + 60
    while session_of(session):
        assert time.monotonic() < end, "a process is still there"
        time.sleep(0.05)


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def children_of_children() -> list[int]:
    """The workers that this process's fresh interpreter has forked."""
    parents = {int(path.parent.name): path for path in Path("/proc").glob("[0-9]*/stat")}
    found = []
    for process in parents:
        with contextlib.suppress(OSError, ProcessLookupError):
            command = Path(f"/proc/{process}/cmdline").read_bytes()
            parent = parent_of(process)
            if b"rmcore.data.tokens.workers" in command and parent_of(parent) == os.getpid():
                found.append(process)
    return found


def test_another_tokenizer_than_that_of_the_config_is_used_in_one_process(
    tmp_path: Path, at_once: None, caplog: pytest.LogCaptureFixture
) -> None:
    """The workers load the tokenizer of the config; a caller of the library may give another one."""
    config = config_of(tmp_path, "cache", "data.workers=2")
    tokenizer = load_tokenizer(config)
    tokenizer.add_tokens(["This is"])
    data = prepare_data(config, tokenizer, None).train
    assert tokenizer.convert_tokens_to_ids("This is") in data.tokens
    assert "data.train: no worker processes, so one process prepares it: its tokenizer" in caplog.text


def test_small_data_start_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.Workers, "__init__", None)  # calling it would fail
    config = config_of(tmp_path, "cache", "data.workers=2")
    assert len(prepare_data(config, load_tokenizer(config), None).train) > 100


PREPARE = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background commands with SIGINT ignored
from rmcore.data.tokens import build, workers
import rmcore.prepare, rmcore.tracking.data_progress as shown
build.CHUNK_ROWS, workers.WORTH_SECONDS = 8, -1.0
workers.Workers.ready = property(lambda self: not self._reason.result())

def hold(self, done, total, what):
    if done > 8:
        print("working", flush=True)
        time.sleep(600)

shown.DataProgress.__call__ = hold
sys.exit(rmcore.prepare.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_no_process_outlives_the_preparation(tmp_path: Path, number: signal.Signals) -> None:
    config_of(tmp_path, "cache")
    given = ["model.name=synthetic", f"data.train.path={tmp_path / 'rows.jsonl'}", "data.template=simple_chat"]
    given += [f"data.cache={tmp_path / 'cache'}", "data.max_tokens=300", "data.workers=2"]
    command = [sys.executable, "-c", PREPARE, *given]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "working\n", process.stderr.read()
        sessions = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if child(path, process.pid)]
        assert len(sessions) == 1 and len(session_of(sessions[0])) == 3
        process.send_signal(number)
        error = process.stderr.read()
    if number == signal.SIGINT:
        assert process.returncode == 130 and error == "rmcore prepare: interrupted\n"
        assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()], "no half cache"
    wait_for_the_end_of(sessions[0])


def child(stat: Path, parent: int) -> bool:
    with contextlib.suppress(OSError):
        return int(stat.read_text().rpartition(")")[2].split()[1]) == parent
    return False
