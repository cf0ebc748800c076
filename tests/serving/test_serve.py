"""Checks `rmcore serve` over real HTTP: the rewards of plain transformers for many clients, and all refusals."""

import asyncio
import json
import os
import queue
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rmcore.data.synthetic import byte_tokenizer
from rmcore.model.outputs import Outputs
from rmcore.scoring.rows import trial_rows
from rmcore.scoring.scorer import Scorer, Text
from rmcore.serve import main
from rmcore.serving.answers import ClassifyAnswer
from rmcore.serving.app import Service, create_app
from rmcore.serving.batcher import Batcher, Full, Late, Stopping
from rmcore.serving.limits import Limits
from tests.harness.oracle import FAMILIES
from tests.harness.paths import needs_shared
from tests.harness.service import MODEL, SETTINGS, WAIT, Served, raw

CLOSE = 1e-5  # six layers in fp32: sums of hundreds of terms of order 1, each rounded at 6e-8


# --- the queue --------------------------------------------------------------------------------------------------------
def text(number: int, length: int = 10) -> Text:
    return Text(np.full(length, number, dtype=np.int32), "")


class Held:
    """A model whose reward is the first token; it waits until `go` is set, and records its batches in `began`."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.began: queue.Queue[list[int]] = queue.Queue()

    def __call__(self, texts: Any, deadline: float = 0.0) -> list[float | None]:
        numbers = [int(text.ids[0]) for text in texts]
        self.began.put(numbers)
        assert self.go.wait(WAIT)
        if 13 in numbers:
            raise ValueError("thirteen")
        return [float(number) for number in numbers]


def later() -> float:
    return time.monotonic() + WAIT


def test_what_comes_while_the_model_works_makes_the_next_batch() -> None:
    model = Held()
    batcher = Batcher(model, budget=35, most_waiting=1000)
    first = batcher.submit([text(1)], later())
    assert model.began.get(timeout=WAIT) == [1], "an idle model waits for nobody"
    rest = [batcher.submit([text(number)], later()) for number in range(2, 8)]
    model.go.set()
    assert first.result(WAIT) == [1.0] and [one.result(WAIT) for one in rest] == [[float(n)] for n in range(2, 8)]
    assert [model.began.get(timeout=WAIT) for _ in range(2)] == [[2, 3, 4], [5, 6, 7]], "35 tokens hold three"
    large = batcher.submit([text(8, 50), text(9, 50)], later())
    assert large.result(WAIT) == [8.0, 9.0]
    batcher.stop()
    with pytest.raises(Stopping):
        batcher.submit([text(1)], later())
    assert batcher.waiting_tokens == 0 and batcher.counts.texts == 9


def test_a_job_that_the_model_cannot_do_fails_alone() -> None:
    model = Held()
    batcher = Batcher(model, budget=1000, most_waiting=1000)
    jobs = [batcher.submit([text(number)], later()) for number in (1, 12, 13, 14)]
    model.go.set()
    assert [jobs[place].result(WAIT) for place in (0, 1, 3)] == [[1.0], [12.0], [14.0]]
    with pytest.raises(ValueError, match="thirteen"):
        jobs[2].result(WAIT)
    assert batcher.submit([text(5)], later()).result(WAIT) == [5.0], "and the thread lives"
    batcher.stop()


def test_full_late_cancelled_and_stopped() -> None:
    model = Held()
    batcher = Batcher(model, budget=10, most_waiting=25)
    running = batcher.submit([text(1)], later())
    assert model.began.get(timeout=WAIT) == [1]
    late, cancelled = batcher.submit([text(2)], time.monotonic() - 1), batcher.submit([text(3)], later())
    with pytest.raises(Full):
        batcher.submit([text(4)], later())
    assert cancelled.cancel()
    stopping = threading.Thread(target=batcher.stop)
    stopping.start()
    model.go.set()
    stopping.join(WAIT)
    assert running.result(WAIT) == [1.0] and model.began.empty(), "what is late or cancelled is not computed"
    with pytest.raises(Late):
        late.result(WAIT)


# --- the service ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    service = Served("--max-body", "200000", "--max-texts", "300", "--body-timeout", "1")
    yield service
    if service.process.poll() is None:
        service.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def plain() -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def rewards(*texts: str) -> list[float]:
        inputs = tokenizer([text + tokenizer.eos_token for text in texts], return_tensors="pt", padding=True)
        with torch.inference_mode():
            return model(**inputs, use_cache=False).logits[:, 0].tolist()

    return rewards


@needs_shared
def test_every_shape_of_request_has_the_rewards_of_plain_transformers(served: Served, plain: Any) -> None:
    prompt, answers = "Why is the sky blue?", [" Because.", " It is not.", " Light scatters."]
    texts = [prompt + answer for answer in answers]
    expected = pytest.approx(plain(*texts), abs=CLOSE)
    assert np.std(plain(*texts)) > 1e-3

    remote = served.post("/get_reward", {"query": texts, "prompts": [prompt] * 3, "labels": [""] * 3})
    assert remote.status_code == 200 and remote.json() == {"rewards": expected}
    eos, pad = "<|endoftext|>", "<|padding|>"
    ended = served.post("/get_reward", {"query": [pad + texts[0] + eos + pad * 2]})
    assert ended.json()["rewards"] == pytest.approx(plain(texts[0]), abs=CLOSE)

    classified = served.post("/classify", {"model": "any", "input": texts}).json()
    assert [one["probs"] for one in classified["data"]] == [[pytest.approx(r, abs=CLOSE)] for r in plain(*texts)]
    assert [one["index"] for one in classified["data"]] == [0, 1, 2] and classified["object"] == "list"
    assert classified["data"][0]["num_classes"] == 1 and classified["usage"]["prompt_tokens"] > 10

    for body in (
        {"text_1": prompt, "text_2": answers},
        {"queries": [prompt] * 3, "documents": answers},
        {"text_1": [prompt], "text_2": answers},
    ):
        assert [one["score"] for one in served.post("/score", body).json()["data"]] == expected

    rows = [{"prompt": prompt, "answers": answers}, {"text": texts[1]}]
    found = served.post("/rewards", {"rows": rows}).json()["rows"]
    assert found[0]["rewards"] == expected and found[0]["best"] == int(np.argmax(plain(*texts)))
    assert found[1] == {"reward": pytest.approx(plain(texts[1])[0], abs=CLOSE)}

    odd = ['[{"role": "us', '[{"role": "user", "content": "x"}]']  # a policy may write what looks like turns
    found = served.post("/score", {"text_1": prompt, "text_2": odd}).json()["data"]
    assert [one["score"] for one in found] == pytest.approx(plain(*(prompt + text for text in odd)), abs=CLOSE)
    (row,) = served.post("/rewards", {"rows": [{"prompt": prompt, "answers": odd}]}).json()["rows"]
    assert row["rewards"] == [one["score"] for one in found]


@needs_shared
@pytest.mark.parametrize(
    ("path", "body", "status", "why"),
    [
        ("/get_reward", b"{no", 400, "not JSON"),
        ("/get_reward", b"[" * 50_000, 400, ""),
        ("/get_reward", b"\xff\xfe\x00", 400, ""),
        ("/get_reward", {"query": [1]}, 422, "query"),
        ("/get_reward", {}, 422, "query: Field required"),
        ("/get_reward", {"query": []}, 422, "0 texts"),
        ("/get_reward", {"query": ["a"] * 301}, 422, "a request may have 1 to 300"),
        ("/get_reward", {"query": ["a", "b"], "prompts": ["a"]}, 422, "1 prompts for 2 texts"),
        ("/get_reward", {"query": ["fine", " word" * 3000]}, 422, "text 1 has 3001 tokens"),
        ("/get_reward", b'{"query": ["half \\ud800"]}', 422, "lone surrogate"),
        ("/get_reward", b'{"query": "' + b"a" * 200_000 + b'"}', 413, "more than 200000 bytes"),
        ("/classify", {"input": ["a"], "messages": []}, 422, "give input"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c"]}, 422, "2 prompts and 1 answers"),
        ("/rewards", {"rows": [{"prompt": "a"}]}, 422, "row 0: a row needs prompt and answers"),
        ("/rewards", {"rows": [{"text": {"a": 1}}]}, 422, "row 0: text must be text"),
        ("/rewards", {"rows": [3]}, 422, "rows.0"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_a_sentence(
    served: Served, path: str, body: Any, status: int, why: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(served.address + path, content=content, headers=headers, timeout=WAIT, trust_env=False)
    assert answer.status_code == status, answer.text
    assert why in answer.json()["error"] and len(answer.content) < 500
    assert served.post("/get_reward", {"query": ["still here"]}).status_code == 200


@needs_shared
def test_slow_broken_and_endless_bodies(served: Served) -> None:
    head = b"POST /get_reward HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert b" 408 " in raw(served, head + b'Content-Length: 100\r\n\r\n{"query"')  # the rest never comes
    assert b" 413 " in raw(served, head + b"Content-Length: 99999999999\r\n\r\n")
    chunk = b"8000\r\n" + b"a" * 0x8000 + b"\r\n"
    assert b" 413 " in raw(served, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 8)
    assert b" 400 " in raw(served, b"nonsense\r\n\r\n")
    host, port = served.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as gone:  # leaves in the middle of its body
        gone.sendall(head + b"Content-Length: 100\r\n\r\n{")
    assert served.post("/get_reward", {"query": ["still here"]}).status_code == 200


def requests_of(client: int, count: int) -> list[list[str]]:
    """Each client's own texts, no two alike, of many lengths."""
    draw = random.Random(client)
    return [
        [
            f"Client {client}, request {number}, text {k}:" + " so" * draw.randrange(40)
            for k in range(draw.randint(1, 4))
        ]
        for number in range(count)
    ]


@needs_shared
def test_sixty_four_clients_get_each_their_own_answers(served: Served, plain: Any) -> None:
    """256 requests, some 640 texts, 64 at a time: every one answered, each with the rewards of its own texts."""
    asked = {client: requests_of(client, 4) for client in range(64)}

    async def one(client: int, session: httpx.AsyncClient) -> list[list[float]]:
        found = []
        for texts in asked[client]:
            answer = await session.post("/get_reward", json={"query": texts, "prompts": [texts[0][:12]] * len(texts)})
            assert answer.status_code == 200, answer.text
            found.append(answer.json()["rewards"])
        return found

    async def everyone() -> list[list[list[float]]]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=served.address, timeout=WAIT, limits=limits, trust_env=False) as session:
            return await asyncio.gather(*(one(client, session) for client in asked))

    before = samples(served)
    answered = asyncio.run(everyone())
    texts = [text for client in asked.values() for request in client for text in request]
    rewards = [reward for client in answered for request in client for reward in request]
    assert [[len(request) for request in client] for client in answered] == [
        [len(request) for request in client] for client in asked.values()
    ]
    expected = [reward for start in range(0, len(texts), 32) for reward in plain(*texts[start : start + 32])]
    np.testing.assert_allclose(rewards, expected, atol=CLOSE, rtol=0)
    assert len(set(np.round(expected, 6))) > 0.9 * len(expected), "an answer to another text would show"
    after = samples(served)
    assert after["rmcore_jobs_total"] - before["rmcore_jobs_total"] == 256
    assert after["rmcore_texts_total"] - before["rmcore_texts_total"] == len(texts)
    batches = after["rmcore_batches_total"] - before["rmcore_batches_total"]
    assert batches < 256, "requests that come together are computed together"
    assert after["rmcore_waiting_tokens"] == 0


def samples(service: Served) -> dict[str, float]:
    """Prometheus' text as numbers, read by Prometheus' own parser."""
    from prometheus_client.parser import text_string_to_metric_families

    body = httpx.get(service.address + "/metrics", trust_env=False)
    assert body.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(body.text)
    return {
        sample.name: sample.value for family in families for sample in family.samples if "path" not in sample.labels
    }


@needs_shared
def test_classify_gives_all_outputs_and_the_others_the_reward(tmp_path: Path) -> None:
    """In this process, with a model of three outputs, compared with plain transformers."""
    tokenizer = byte_tokenizer()
    class_name, sizes = FAMILIES["llama"]
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = getattr(transformers, class_name)(**{**sizes, **ids})
    Outputs(("reward", "polite", "short"), (0.5, 0.0, 1.0)).store(config)
    config.problem_type = "regression"
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scorer = Scorer(str(tmp_path), ["data.template=none", "parallel.precision=fp32"])
    scorer.choose_path([({"text": "abc"}, "row"), ({"text": "a longer text"}, "row")])
    batcher = Batcher(scorer.values, budget=1000, most_waiting=1000)
    app = create_app(Service(scorer, batcher, Limits()))

    async def ask() -> list[Any]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as session:
            bodies = [("/classify", {"input": ["one", "two words"]}), ("/get_reward", {"query": ["one", "two words"]})]
            return [(await session.post(path, json=body)).json() for path, body in bodies]

    classified, rewards = asyncio.run(ask())
    batcher.stop()
    for found, reward, text in zip(classified["data"], rewards["rewards"], ("one", "two words"), strict=True):
        token_ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([token_ids])).logits[0]
        assert found["probs"] == pytest.approx(expected.tolist(), abs=CLOSE) and found["num_classes"] == 3
        assert found["label"] == scorer.outputs[int(expected.argmax())]
        assert reward == pytest.approx(float(0.5 * expected[0] + expected[2]), abs=CLOSE)
    described = ClassifyAnswer.model_validate(classified)
    assert described.data[1].num_classes == 3


def test_a_model_that_fails_or_gives_no_number_is_an_error() -> None:
    """In this process, with a model that can be made to fail."""
    scorer = Scorer(MODEL, SETTINGS)
    scorer.choose_path(trial_rows())
    gives: list[Any] = []

    def score(texts: Any, deadline: float) -> list[float | None]:
        return [None] * len(texts) if gives else scorer.score(texts[1:])  # a reward too few

    batcher = Batcher(score, budget=1000, most_waiting=1000)
    app = create_app(Service(scorer, batcher, Limits()))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as session:
            return await session.post("/get_reward", json={"query": ["a", "b"]})

    failed = asyncio.run(ask())
    assert failed.status_code == 500 and failed.json() == {"error": "the model failed: RuntimeError"}
    gives.append(None)
    no_number = asyncio.run(ask())
    assert no_number.status_code == 500 and "not a number" in no_number.json()["error"]
    batcher.stop()
    assert asyncio.run(ask()).status_code == 503


@needs_shared
def test_health_and_unknown_paths(served: Served) -> None:
    assert httpx.get(served.address + "/health", trust_env=False).json() == {"status": "ok", "model": Path(MODEL).name}
    assert httpx.get(served.address + "/../etc/passwd", trust_env=False).status_code == 404
    assert httpx.get(served.address + "/get_reward", trust_env=False).status_code == 405


@needs_shared
@pytest.mark.slow
def test_killed_and_restarted_under_load(plain: Any) -> None:
    """Clients of a killed service see a broken connection, never an answer that is wrong; a new one answers them."""
    texts = [f"Number {n}" + " and on" * 30 for n in range(20)]
    expected = plain(*texts)
    service = Served()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(service.post, "/get_reward", {"query": texts}) for _ in range(40)]
        while not any(one.done() for one in waiting):
            assert samples(service)["rmcore_jobs_total"] <= 40
        assert service.end(signal.SIGKILL) == -signal.SIGKILL
        broken = 0
        for one in waiting:
            if one.exception(WAIT) is not None:
                assert isinstance(one.exception(), httpx.TransportError)
                broken += 1
            else:
                np.testing.assert_allclose(one.result().json()["rewards"], expected, atol=CLOSE, rtol=0)
    assert 0 < broken < 40
    service = Served()
    assert service.post("/get_reward", {"query": texts}).json()["rewards"] == pytest.approx(expected, abs=CLOSE)
    assert service.end() == 0


@needs_shared
def test_normalised_rewards_on_request(tmp_path: Path, plain: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """--normalise gives (reward - mean) / deviation with those of config.json; without them it is refused."""
    texts = ["Why is the sky blue? Because.", "Why is the sky blue? Light scatters."]
    assert main([MODEL, "--port", "0", "--normalise", *SETTINGS]) == 2
    assert "contains no pooler_config" in capsys.readouterr().err
    model = shutil.copytree(MODEL, tmp_path / "model", copy_function=os.symlink)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps(config | {"pooler_config": {"logit_mean": 0.5, "logit_sigma": 0.25}}))
    service = Served("--normalise", model=str(model))
    found = service.post("/get_reward", {"query": texts}).json()["rewards"]
    assert service.end() == 0
    assert found == pytest.approx([(reward - 0.5) / 0.25 for reward in plain(*texts)], abs=CLOSE / 0.25)


@needs_shared
def test_too_much_waiting_and_too_late() -> None:
    """In this process, with a model that waits: the first request computes, the second waits, the third is refused;
    none is done in time."""
    model = Held()
    batcher = Batcher(model, budget=4, most_waiting=6)
    service = Service(Scorer(MODEL, SETTINGS), batcher, Limits(seconds=1.0))
    app = create_app(service)

    async def ask(session: httpx.AsyncClient) -> httpx.Response:
        return await session.post("/get_reward", json={"query": ["one two three"]})

    async def three() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as session:
            first = asyncio.create_task(ask(session))
            await asyncio.to_thread(model.began.get, True, WAIT)
            second = asyncio.create_task(ask(session))
            while not batcher.waiting:
                await asyncio.sleep(0)
            return [await ask(session), await first, await second]

    third, *late = asyncio.run(three())
    assert third.status_code == 503 and third.headers["Retry-After"] == "1"
    assert [one.status_code for one in late] == [504, 504]
    assert all("rewards" not in one.json() for one in (third, *late))
    model.go.set()
    batcher.stop()
    assert model.began.empty(), "what its client has given up is not computed"


def test_what_is_refused_before_the_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for arguments, why in (
            (["--port", str(taken.getsockname()[1])], "Address already in use"),
            (["--port", "99999"], "--port must be from 0 to 65535"),
            (["--timeout", "0"], "--timeout must be above 0"),
            (["--port", "0"], "there is no such directory"),
        ):
            assert main([str(tmp_path / "none"), *arguments]) == 2
            assert why in capsys.readouterr().err


@needs_shared
def test_stopped_while_it_works_it_answers_what_is_under_way(served: Served, plain: Any) -> None:
    """On SIGTERM requests that compute or wait are answered, each with its own rewards, and it exits with 0.
    The last test that uses this service."""
    texts = [f"Number {n}" + " and on" * 60 for n in range(30)]  # some 3,800 tokens: one request fills a batch
    before = samples(served)["rmcore_jobs_total"]
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(served.post, "/get_reward", {"query": texts[n:] + texts[:n]}) for n in range(8)]
        now = {"rmcore_waiting_jobs": 0.0, "rmcore_jobs_total": before}
        while now["rmcore_waiting_jobs"] + now["rmcore_jobs_total"] - before < 7:  # all have come, one is computed
            now = samples(served)
        assert now["rmcore_waiting_jobs"] >= 1
        code = served.end()
        answers = [one.result(WAIT) for one in waiting]
    expected = plain(*texts)
    for n, answer in enumerate(answers):
        assert answer.status_code == 200
        np.testing.assert_allclose(answer.json()["rewards"], expected[n:] + expected[:n], atol=CLOSE, rtol=0)
    assert code == 0
    with pytest.raises(httpx.TransportError):
        served.post("/get_reward", {"query": ["anyone?"]})
