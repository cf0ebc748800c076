"""Checks who may use `rmcore serve` and what it says of itself: the token, the unix socket, /openapi.json."""

import asyncio
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from rmcore.config import UserError
from rmcore.scoring.scorer import Scorer
from rmcore.serve import TOKEN, main
from rmcore.serving.app import Service, create_app
from rmcore.serving.batcher import Batcher
from rmcore.serving.limits import Limits
from rmcore.serving.server import bound_path
from tests.harness.paths import needs_shared
from tests.harness.service import MODEL, SETTINGS, WAIT, Served

SECRET = "s3cret-Token"
BODIES: dict[str, list[Any]] = {
    "/get_reward": [{"query": ["a b", "c"], "prompts": ["a", "c"]}, {"query": "a b", "unknown": 1}],
    "/classify": [{"input": ["a", "b"]}, {"input": "a"}],
    "/score": [{"text_1": "a", "text_2": ["b", "c"]}, {"queries": ["a"], "documents": ["b"]}],
    "/rewards": [{"rows": [{"prompt": "a", "answers": ["b", "c"]}, {"text": "d"}, {"prompt": "a", "answer": "b"}]}],
}
REFUSED: dict[str, list[Any]] = {
    "/get_reward": [{}, {"query": 1}, {"query": ["a"], "prompts": []}],
    "/classify": [{}, {"input": "a", "messages": []}],
    "/score": [{"text_1": "a"}],
    "/rewards": [{"rows": []}, {"rows": [{"nothing": 1}]}],
}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """In this process."""
    scorer = Scorer(MODEL, SETTINGS)
    batcher = Batcher(scorer.values, budget=1000, most_waiting=1000)
    yield Service(scorer, batcher, Limits(body=1000))
    batcher.stop()


def asked(app: Any, requests: list[tuple[str, str, dict[str, Any]]]) -> list[httpx.Response]:
    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as session:
            return [await session.request(method, path, **more) for method, path, more in requests]

    return asyncio.run(ask())


# --- the token --------------------------------------------------------------------------------------------------------
@needs_shared
def test_only_the_token_opens_the_service(service: Service) -> None:
    app = create_app(service, local=True, token=SECRET)
    body = {"query": ["a"]}
    headers: list[dict[str, str]] = [
        {},
        {"Authorization": SECRET},
        {"Authorization": f"Basic {SECRET}"},
        {"Authorization": "Bearer"},
        {"Authorization": f"Bearer {SECRET[:-1]}"},
        {"Authorization": f"Bearer {SECRET}x"},
        {"Authorization": f"Bearer {SECRET.lower()}"},
    ]
    for answer in asked(app, [("POST", "/get_reward", {"json": body, "headers": one}) for one in headers]):
        assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
        assert list(answer.json()) == ["error"] and SECRET not in answer.text
    right = {"Authorization": f"bearer {SECRET}"}  # the name of a scheme has no case (RFC 9110, 11.1)
    given = {"json": body, "headers": right}
    opened = [("POST", "/get_reward", given), ("GET", "/metrics", {"headers": right}), ("GET", "/health", {})]
    assert [answer.status_code for answer in asked(app, opened)] == [200] * 3
    closed = [("GET", path, {}) for path in ("/metrics", "/openapi.json", "/none")]
    assert [answer.status_code for answer in asked(app, closed)] == [401] * 3
    # Without the token a body is refused before it is read, and another host name before the token is compared.
    [large, foreign] = asked(app, [
        ("POST", "/get_reward", {"content": b"x" * 5000}),
        ("POST", "/get_reward", {**given, "headers": {**right, "Host": "evil.example"}}),
    ])  # fmt: skip
    assert (large.status_code, foreign.status_code) == (401, 403)
    counted = asked(app, [("GET", "/metrics", {"headers": right})])[0].text
    assert 'rmcore_requests_total{path="/get_reward",status="401"} 8.0' in counted


def test_wrong_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for token in ("", "two words", "newline\n", "café"):
        monkeypatch.setenv(TOKEN, token)
        assert main([str(tmp_path / "none")]) == 2
        assert f"{TOKEN} must be a token of visible ASCII" in capsys.readouterr().err
    monkeypatch.delenv(TOKEN)
    path = str(tmp_path / "s")
    assert main([str(tmp_path / "none"), "--socket", path, "--port", "5001"]) == 2
    assert "--socket takes the place of --host and --port" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), "--socket", path]) == 2
    assert "there is no such directory" in capsys.readouterr().err and not os.path.exists(path)


# --- the unix socket --------------------------------------------------------------------------------------------------
def test_a_socket_file_is_private_and_only_a_stale_one_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with bound_path(path) as first:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        first.listen()
        with pytest.raises(UserError, match="another process listens there"), bound_path(path):
            pass
        assert os.path.exists(path), "the refused one has not removed it"
    assert not os.path.exists(path)
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(path)
    with bound_path(path) as again:  # nobody listens there any more
        again.listen()
        os.unlink(path)
        with bound_path(path):
            again.close()
        (tmp_path / "socket").write_text("a file")
    assert (tmp_path / "socket").read_text() == "a file", "what has taken the place is not removed"
    with pytest.raises(UserError, match="it exists and is not a socket"), bound_path(path):
        pass
    with pytest.raises(UserError, match="AF_UNIX path too long"), bound_path(path + "x" * 200):
        pass
    with pytest.raises(UserError, match="No such file or directory"), bound_path(str(tmp_path / "none" / "socket")):
        pass


def over(path: Path, token: str = SECRET) -> httpx.Client:
    headers = {"Authorization": f"Bearer {token}", "Host": "any.name"}
    transport = httpx.HTTPTransport(uds=str(path))
    return httpx.Client(transport=transport, base_url="http://service", headers=headers, timeout=WAIT)


@needs_shared
def test_a_service_on_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes over the file that a killed one has left, answers, and removes it at its end."""
    monkeypatch.setenv(TOKEN, SECRET)
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    served = Served("--socket", str(path), port=None)
    assert served.address == f"unix:{path}"
    with over(path) as client:
        assert len(client.post("/get_reward", json={"query": ["a", "b"]}).json()["rewards"]) == 2
    with over(path, "wrong") as client:
        assert client.post("/get_reward", json={"query": ["a"]}).status_code == 401
    assert served.end() == 0 and not path.exists()


# --- /openapi.json ----------------------------------------------------------------------------------------------------
TYPES: dict[str, Any] = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float)}
KNOWN = {
    "type",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "anyOf",
    "$ref",
    "const",
    "enum",
    "minItems",
}
KNOWN |= {"title", "description", "default"}  # of no consequence


def fits(value: Any, schema: dict[str, Any], page: dict[str, Any]) -> bool:
    """Whether a value has the shape of a schema, of which all keywords are known."""
    assert schema.keys() <= KNOWN, schema.keys() - KNOWN
    if "$ref" in schema:
        return fits(value, page["components"]["schemas"][schema["$ref"].rpartition("/")[2]], page)
    if "anyOf" in schema:
        return any(fits(value, one, page) for one in schema["anyOf"])
    kind = schema.get("type")
    if kind == "null":
        return value is None
    if kind is not None and (not isinstance(value, TYPES[kind]) or isinstance(value, bool)):
        return False
    if value not in schema.get("enum", [schema.get("const", value)]):
        return False
    if isinstance(value, list):
        items = schema.get("items", {})
        return len(value) >= schema.get("minItems", 0) and all(fits(one, items, page) for one in value)
    if isinstance(value, dict):
        known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        if not set(schema.get("required", ())) <= value.keys() or (more is False and value.keys() - known.keys()):
            return False
        return all(fits(one, known.get(key, {}), page) for key, one in value.items())
    return True


@needs_shared
def test_the_page_describes_what_is_sent_and_answered(service: Service) -> None:
    app = create_app(service)
    [page] = [answer.json() for answer in asked(app, [("GET", "/openapi.json", {})])]
    assert page["paths"].keys() == {*BODIES, "/health", "/metrics"}
    statuses = set()
    for path, bodies in BODIES.items():
        wrong = [*REFUSED[path], {"x": "y" * 2000}, None]
        endpoint = page["paths"][path]["post"]
        shape = endpoint["requestBody"]["content"]["application/json"]["schema"]
        assert all(fits(body, shape, page) for body in bodies) and not fits([], shape, page)
        sent = [("POST", path, {"json": body}) for body in (*bodies, *wrong)]
        sent.append(("POST", path, {"content": b"{", "headers": {"Content-Type": "application/json"}}))
        for number, answer in enumerate(asked(app, sent)):
            assert (answer.status_code == 200) == (number < len(bodies))
            documented = endpoint["responses"][str(answer.status_code)]["content"]
            assert list(documented) == [answer.headers["content-type"]] == ["application/json"]
            assert fits(answer.json(), documented["application/json"]["schema"], page), answer.text
            others = [other for other in BODIES if other != path]
            for other in others if number == 0 else []:  # the shapes are strict enough to tell endpoints apart
                found = page["paths"][other]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
                assert not fits(answer.json(), found, page)
            statuses.add(answer.status_code)
    assert statuses == {200, 400, 413, 422}
    for path, kind in (("/health", "application/json"), ("/metrics", "text/plain")):
        [answer] = asked(app, [("GET", path, {})])
        documented = page["paths"][path]["get"]["responses"]["200"]["content"]
        assert list(documented) == [kind] and answer.headers["content-type"].startswith(kind)
        assert fits(answer.json() if path == "/health" else answer.text, documented[kind]["schema"], page)
    assert "security" not in page["paths"]["/rewards"]["post"]
    answer = asked(create_app(service, token=SECRET), [
        ("GET", "/openapi.json", {"headers": {"Authorization": f"Bearer {SECRET}"}})
    ])[0].json()  # fmt: skip
    assert answer["paths"]["/rewards"]["post"]["security"] == [{"HTTPBearer": []}]
    assert "security" not in answer["paths"]["/health"]["get"]


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("token", [None, SECRET])
def test_the_page_is_valid_by_a_validator(service: Service, token: str | None) -> None:
    """With the packages openapi-spec-validator and jsonschema, which nothing else needs."""
    validator, jsonschema = pytest.importorskip("openapi_spec_validator"), pytest.importorskip("jsonschema")
    app, headers = create_app(service, token=token), {"Authorization": f"Bearer {token}"}
    page = asked(app, [("GET", "/openapi.json", {"headers": headers})])[0].json()
    validator.validate(page)
    for path, bodies in BODIES.items():
        sent = [("POST", path, {"json": body, "headers": headers}) for body in (*bodies, *REFUSED[path])]
        for answer in asked(app, sent):
            documented = page["paths"][path]["post"]["responses"][str(answer.status_code)]["content"]
            schema = {**documented["application/json"]["schema"], "components": page["components"]}
            jsonschema.Draft202012Validator(schema).validate(answer.json())
