"""Requests and connections that want to exhaust `rmcore serve` are refused at little cost, and others are answered.

Costs are measured on the process of the service: seconds of its processor, and its peak memory.
"""

import asyncio
import functools
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest
import uvicorn

from rmcore.scoring.rows import Rendered, trial_rows
from rmcore.scoring.scorer import Scorer
from rmcore.serving import connections
from rmcore.serving.app import Service, create_app
from rmcore.serving.batcher import Batcher, Late
from rmcore.serving.limits import Limits, Refused, check_body
from tests.harness.paths import needs_shared
from tests.harness.seed import random_seed
from tests.harness.service import MODEL, SETTINGS, WAIT, Served, raw

MB = 1 << 20
PAD = "<|padding|>"
# Name -> (path, body, what the error contains). A body of the default limit, 16 MiB, may hold all of them.
REQUESTS: dict[str, tuple[str, Callable[[], Any], str]] = {
    "a prompt with 4,000 answers": (
        "/rewards", lambda: {"rows": [{"prompt": "p " * 150_000, "answers": ["a"] * 4000}]}, "characters with"),
    "4,000 pairs of one prompt": (
        "/score", lambda: {"text_1": "p " * 150_000, "text_2": ["a"] * 4000}, "characters with"),
    "100,000 answers": ("/rewards", lambda: {"rows": [{"prompt": "p", "answers": ["a"] * 100_000}]}, "100000 texts"),
    "100,000 rows": ("/rewards", lambda: {"rows": [{"text": "a"}] * 100_000}, "100000 texts"),
    "100,000 texts": ("/get_reward", lambda: {"query": ["a"] * 100_000}, "100000 texts"),
    "a text of 15 MB": ("/get_reward", lambda: {"query": "word " * 3_000_000}, "characters: a text of at most 2048"),
    "a word of 15 MB": ("/classify", lambda: {"input": "a" * 15_000_000}, "characters: a text of at most 2048"),
    "a long prompt": ("/score", lambda: {"text_1": "é" * 7_000_000, "text_2": "a"}, "characters: a text of at most"),
    "turns without end": (
        "/classify", lambda: {"messages": [{"role": "a", "content": ""}] * 400_000}, "more than 524288 values"),
    "numbers for texts": ("/get_reward", lambda: {"query": [1] * 5_000_000}, "more than 524288 values"),
    "objects for texts": ("/classify", lambda: {"input": [{}] * 4_000_000}, "more than 524288 values"),
    "wrong turns": ("/classify", lambda: {"messages": [{}] * 4_000_000}, "more than 524288 values"),
    "wrong texts": ("/get_reward", lambda: {"query": [1] * 500_000}, "query"),
    "empty texts": ("/get_reward", lambda: {"query": [""] * 4_000_000}, "more than 524288 values"),
    "empty rows": ("/rewards", lambda: {"rows": [{}] * 4_000_000}, "more than 524288 values"),
    "lists in lists": ("/rewards", lambda: {"rows": [{"text": "a", "x": [[]] * 4_000_000}]}, "more than 524288 values"),
    "a long key": ("/rewards", lambda: {"rows": [{"k" * 10_000_000: 1}]}, "a row needs prompt"),
    "many keys": ("/rewards", lambda: {"rows": [{f"k{n}": n for n in range(500_000)}]}, ""),
    "control characters": ("/rewards", lambda: {"rows": [{"a\x1b[2J\x9b\u202e\n": 1}]}, "a row needs prompt"),
}  # fmt: skip


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    service = Served("--timeout", "60")
    service.post("/get_reward", {"query": ["warm " * 300] * 20})
    yield service
    assert service.end() == 0


def is_answered(service: Served) -> bool:
    return service.post("/get_reward", {"query": ["still here"]}).status_code == 200


@needs_shared
@pytest.mark.parametrize("name", REQUESTS)
def test_what_is_too_large_is_refused_before_it_costs(served: Served, name: str) -> None:
    path, body, why = REQUESTS[name]
    content = json.dumps(body(), separators=(",", ":"), ensure_ascii=False).encode()
    assert len(content) <= 16 * MB
    cpu, peak = served.cpu_seconds(), served.memory("VmHWM")
    answer = httpx.post(
        served.address + path, content=content, timeout=WAIT, trust_env=False,
        headers={"Content-Type": "application/json"},
    )  # fmt: skip
    assert answer.status_code == 422 and why in answer.json()["error"], answer.text
    assert len(answer.content) < 500 and answer.json()["error"].isprintable()
    assert served.cpu_seconds() - cpu < 4
    assert served.memory("VmHWM") - peak < 400 * MB
    assert is_answered(served)


@needs_shared
def test_padding_is_stripped_in_linear_time(served: Served) -> None:
    cpu = served.cpu_seconds()
    text = PAD * 600_000 + "word" + PAD * 600_000
    assert (
        served.post("/get_reward", {"query": [text]}).json() == served.post("/get_reward", {"query": ["word"]}).json()
    )
    assert served.cpu_seconds() - cpu < 5


@needs_shared
def test_a_large_request_within_the_limits_is_answered_in_bounded_memory(served: Served) -> None:
    """2,000 answers of a token to a prompt of 5,320 characters: 10 MB of texts, whose prompt is computed once."""
    peak = served.memory("VmHWM")
    prompt, answers = "Why is it so? " * 380, [f" {n % 7}" for n in range(2000)]
    answer = served.post("/rewards", {"rows": [{"prompt": prompt, "answers": answers}]})
    rewards = answer.json()["rows"][0]["rewards"]
    assert len(rewards) == 2000 and len(set(rewards)) == 7
    assert served.memory("VmHWM") - peak < 700 * MB


@needs_shared
def test_what_answers_begin_with_is_tokenised_once_per_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(MODEL, SETTINGS)
    prompt = "Why is it so? " * 600
    rows = [Rendered(prompt, [f"{prompt} answer {n}" for n in range(100)], False)]
    expected = scorer._encoder.encode(rows[0].texts)
    given: list[int] = []
    encode = scorer._encoder._encode
    monkeypatch.setattr(scorer._encoder, "_encode", lambda texts: given.extend(map(len, texts)) or encode(texts))
    [found] = scorer.encode(rows)
    assert [text.ids.tolist() for text in found] == [ids.tolist() for ids in expected]
    assert sum(given) < 2 * len(prompt)


@needs_shared
def test_only_loopback_hosts_reach_a_service_on_loopback(served: Served) -> None:
    """A web page under a name of its own that points to 127.0.0.1 sends that name (DNS rebinding)."""
    port = served.address.rpartition(":")[2]
    for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", "[::1]:1", "a.localhost", "127.8.9.1"):
        assert b" 200 " in raw(served, f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert b" 200 " in raw(served, b"GET /health HTTP/1.0\r\n\r\n")
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "localhost.evil.example",
        "10.0.0.1",
        "[",
        "x@localhost:a",
        "::",
    ):
        for path in ("GET /health", "POST /get_reward"):
            answer = raw(served, f"{path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n".encode())
            assert b" 403 " in answer and b'{"error":"the Host header' in answer, answer
    assert is_answered(served)


@needs_shared
def test_idle_slow_and_unread_connections_lock_nobody_out() -> None:
    """With 4 requests at once: 300 idle connections, then 4 slow bodies, of which the fifth is refused."""
    service = Served("--max-connections", "4", "--body-timeout", "100")
    idle = [service.connect() for _ in range(300)]
    for one in idle[:50]:
        one.sendall(b"POST /get_reward HTTP/1.1\r\nHost: local")
    assert is_answered(service)
    head = b"POST /get_reward HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"
    slow = [service.connect() for _ in range(4)]
    for one in slow:
        one.sendall(head)
    while b" 503 " not in (refused := raw(service, head)):  # until all four have arrived
        assert b" 408 " not in refused
    assert b'"too many requests are under way' in refused and b"retry-after" in refused.lower()
    assert httpx.get(service.address + "/health", trust_env=False).status_code == 200
    assert httpx.get(service.address + "/metrics", trust_env=False).status_code == 200
    for one in (*slow, *idle):
        one.close()
    while not is_answered(service):
        pass
    assert service.end() == 0


class Answering(threading.Thread):
    """uvicorn with rmcore's connections and a tiny application, in this process."""

    def __init__(self, most_open: int, answer: bytes = b"ok") -> None:
        super().__init__(daemon=True)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            headers = [(b"content-length", str(len(answer)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": answer})

        self.socket = socket.create_server(("127.0.0.1", 0))
        made: Any = functools.partial(connections.Connection, most_open=most_open)
        self.server = uvicorn.Server(uvicorn.Config(app, http=made, log_level="critical", lifespan="off", ws="none"))

    def run(self) -> None:
        self.server.run(sockets=[self.socket])

    def connect(self) -> socket.socket:
        return socket.create_connection(self.socket.getsockname(), timeout=WAIT)

    def __enter__(self) -> "Answering":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.join(WAIT)


def closed(connection: socket.socket) -> bool:
    """Whether the other side has closed, after at most WAIT seconds."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def is_ok(connection: socket.socket) -> bool:
    """Ask on this connection, and read the answer."""
    connection.sendall(GET)
    found = b""
    while not found.endswith(b"ok"):
        piece = connection.recv(1000)
        if not piece:
            return False
        found += piece
    return True


GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def test_connections_without_headers_are_closed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    with Answering(100) as server:
        silent, slow, second = server.connect(), server.connect(), server.connect()
        slow.sendall(GET[:10])
        assert is_ok(second)
        second.sendall(GET[:10])  # the headers of the second request never end
        assert closed(silent) and closed(slow) and closed(second)
        kept = server.connect()
        for _ in range(3):
            assert is_ok(kept), "whole requests are answered on one connection"


def test_the_connection_that_is_idle_longest_makes_room() -> None:
    with Answering(3) as server:
        used = server.connect()
        others = [server.connect() for _ in range(2)]
        assert is_ok(used)  # now the others are idle longer
        newest = server.connect()
        assert is_ok(newest)
        assert closed(others[0])
        assert is_ok(used)


def test_a_client_that_does_not_read_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.3)
    with Answering(10, b"x" * (64 * MB)) as server:
        deaf = server.connect()
        deaf.sendall(GET)
        while not server.server.server_state.connections:
            pass
        while server.server.server_state.connections:
            time.sleep(0.01)
        received = 0
        with pytest.raises(ConnectionResetError):
            while piece := deaf.recv(MB):
                received += len(piece)
            raise ConnectionResetError
        assert received < 64 * MB


@needs_shared
def test_bodies_of_all_requests_are_bounded_together() -> None:
    """In this process: 16 requests of 990 bytes are held, the 17th would exceed 16,000 bytes and is refused."""
    limits = Limits(body=1000)
    scorer = Scorer(MODEL, SETTINGS)
    app = create_app(Service(scorer, Batcher(lambda texts, _: [0.0] * len(texts), 1000, 1000), limits))

    async def all_at_once() -> list[int]:
        go = asyncio.Event()

        async def one() -> int:
            """The status, or 0 if the client leaves in the middle of its body."""
            pieces = [{"type": "http.request", "body": b" " * 990, "more_body": True}]
            statuses = [0]

            async def receive() -> Any:
                if pieces:
                    return pieces.pop()
                await go.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])
                    go.set()

            scope = {"type": "http", "method": "POST", "path": "/get_reward", "headers": [], "query_string": b""}
            await app(scope, receive, send)
            return statuses[-1]

        return await asyncio.gather(*(one() for _ in range(17)))

    assert sorted(asyncio.run(all_at_once())) == [0] * 16 + [503]


SLOW_TEMPLATE = (
    "{% if messages[0].content == 'slow' %}{% set x = 'a' * 4000000 %}{% set y = x ~ '' %}"
    "{% for i in range(99999) %}{% if x == y %}{% endif %}{% endfor %}{% endif %}{{ messages[-1].content }}"
)


@pytest.fixture
def slow_model(tmp_path: Path) -> str:
    """The model with a chat template that compares long texts for many seconds."""
    model = shutil.copytree(MODEL, tmp_path / "model", copy_function=os.symlink)
    (model / "chat_template.jinja").write_text(SLOW_TEMPLATE)
    return str(model)


@needs_shared
def test_the_time_to_answer_includes_rendering_and_a_signal_during_it(slow_model: str) -> None:
    """504 at the deadline; other requests are answered meanwhile; SIGTERM during it: an answer in JSON, and exit 0."""
    service = Served(
        "--timeout", "2", model=slow_model, settings=["data.template=tokenizer", "parallel.precision=fp32"]
    )
    ask = {"messages": [{"role": "user", "content": "slow"}]}
    with ThreadPoolExecutor(1) as pool:
        for stops in (False, True):
            cpu = service.cpu_seconds()
            waiting = pool.submit(service.post, "/classify", ask)
            while service.cpu_seconds() < cpu + 0.3:  # it renders
                assert not waiting.done()
            if stops:
                assert service.end() == 0
            else:
                assert is_answered(service) and not waiting.done()
            answer = waiting.result(WAIT)
            assert answer.status_code == 504 and answer.json() == {"error": "not done within 2 seconds"}


@needs_shared
def test_a_request_whose_time_is_over_is_not_computed_further() -> None:
    scorer = Scorer(MODEL, SETTINGS)
    scorer.choose_path(trial_rows())
    [texts] = scorer.encode([Rendered("", ["one", "two"], False)])
    with pytest.raises(TimeoutError):
        scorer.score(texts, time.monotonic() - 1)
    computed: list[float] = []

    def late(texts: Any, deadline: float) -> list[float | None]:
        computed.append(deadline)
        raise TimeoutError

    batcher = Batcher(late, budget=100, most_waiting=100)
    deadline = time.monotonic() + WAIT
    with pytest.raises(Late):
        batcher.submit(texts, deadline).result(WAIT)
    assert computed == [deadline]
    batcher.stop()


def hostile(draw: random.Random) -> tuple[str, bytes]:
    """A request of a random kind: of REQUESTS at a thousandth of their size, or bytes that are no request."""
    kind = draw.randrange(12)
    if kind < 8:
        path, body, _ = REQUESTS[draw.choice(list(REQUESTS))]
        whole = json.dumps(body()).encode() if draw.random() < 0.01 else b""
        return path, whole[: draw.randrange(len(whole) + 1)] if draw.random() < 0.5 else whole or b'{"query": [1, 2]}'
    if kind == 8:
        return "/get_reward", json.dumps({"query": ["word " * draw.randrange(20_000)] * draw.randrange(1, 5)}).encode()
    if kind == 9:
        return "/score", json.dumps({"text_1": "p" * draw.randrange(40_000), "text_2": ["a"] * 300}).encode()
    if kind == 10:
        return f"/{'x' * draw.randrange(2000)}", b""
    return draw.choice(["/rewards", "/classify"]), draw.randbytes(draw.randrange(5000))


@needs_shared
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_five_thousand_hostile_requests_leave_the_memory_flat() -> None:
    service = Served("--timeout", "30")
    draw = random.Random(random_seed())
    sizes = []
    statuses: dict[int, int] = {}
    client = httpx.Client(base_url=service.address, timeout=WAIT, trust_env=False)
    for number in range(5000):
        path, body = hostile(draw)
        try:
            answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        except httpx.TransportError:
            continue
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert answer.status_code in (200, 400, 404, 413, 422), answer.text
        if number % 500 == 499:
            sizes.append(service.memory("VmRSS") // MB)
    peak = service.memory("VmHWM") // MB
    print(f"statuses {statuses}, resident MB after each 500 requests {sizes}, peak {peak}")
    # What is left of 40 kB per request would be 100 MB between the two halves.
    assert is_answered(service) and median(sizes[5:]) - median(sizes[:5]) < 100
    assert service.end(signal.SIGTERM) == 0


def test_the_values_of_a_body_are_counted_outside_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On random bodies whose texts contain quotation marks, backslashes, commas and brackets."""
    draw = random.Random(random_seed())

    def value(depth: int) -> tuple[Any, int]:
        """A value, and how many commas and opening brackets its JSON has."""
        kind = draw.randrange(6 if depth < 4 else 2)
        if kind == 0:
            return "".join(draw.choice('a"\\,[]{}:\n\u00e9') for _ in range(draw.randrange(8))), 0
        if kind == 1:
            return draw.choice([1, -2.5, None, True]), 0
        made = [value(depth + 1) for _ in range(draw.randrange(1, 5))]
        items, count = [item for item, _ in made], len(made) + sum(inner for _, inner in made)
        return (items, count) if kind < 4 else ({f'k"\\{n},': item for n, item in enumerate(items)}, count)

    for _ in range(300):
        content, count = value(0)
        body = json.dumps(content).encode()
        monkeypatch.setattr(Limits, "values", count)
        check_body(body, Limits())
        monkeypatch.setattr(Limits, "values", count - 1)
        with pytest.raises(Refused):
            check_body(body, Limits())
