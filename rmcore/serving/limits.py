"""Limits what a request of `rmcore serve` may take, and refuses what exceeds it before it is computed.

Input: `Limits`, an ASGI application. Output: the application, which now receives only complete bodies; or an error, one
sentence as JSON.
Example: with body=1000 the answer to a request of 1001 bytes is 413 {"error": "the body has more than 1000 bytes"}, and
its connection is closed. A prompt of 300,000 characters with 4,000 answers is refused by its size, 1.2 billion
characters, before it is rendered.
"""

import asyncio
import hmac
import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rmcore.host.memory import LARGE, trim_freed_memory
from rmcore.host.terminal import one_line
from rmcore.scoring.rows import MANY

UNKNOWN = 2**31 - 1  # tokens of a text, where neither the model nor the user limits them
ALWAYS = ("/health", "/metrics")  # answered however many requests are under way
OPEN = "/health"  # answered without the token, for load balancers


@dataclass(frozen=True)
class Limits:
    """The limits of one request, and of all together."""

    body: int = 16 << 20  # bytes
    texts: int = 4096
    tokens: int = UNKNOWN  # per text
    body_seconds: float = 30.0  # to receive the body
    seconds: float = 120.0  # to answer
    requests: int = 512  # under way at once

    @property
    def text_characters(self) -> int:
        """Per text. No text of natural language or code has as many as 16 per token, so longer ones need no count."""
        return 2_000_000 if self.tokens == UNKNOWN else 16 * self.tokens

    @property
    def characters(self) -> int:
        """Of all texts of a request, with the prompt in each of them."""
        return 4 * self.body

    @property
    def values(self) -> int:
        """Texts, numbers, lists and objects in the body of a request."""
        return max(1 << 19, 128 * self.texts)

    @property
    def bytes_held(self) -> int:
        """Of the bodies of all requests under way."""
        return 16 * self.body


class Refused(Exception):
    """A request that is refused: the `status` of HTTP, and the reason in a sentence."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


def check_rows(rows: Sequence[Mapping[str, Any]], limits: Limits) -> None:
    """Raises Refused if the rows have too many texts or characters, by their raw content alone."""
    if not 0 < len(rows) <= limits.texts:
        raise Refused(422, f"{len(rows)} texts: a request may have 1 to {limits.texts}")
    serialised = next((name for row in rows for name in MANY if isinstance(row.get(name), str)), None)
    if serialised is not None:  # a file may hold lists as text; here the texts are counted before anything is parsed
        raise Refused(422, f"{serialised} must be a list of answers")
    for row in rows:  # other cells may hold JSON as text, such as turns, which is parsed later
        for name, value in row.items():
            is_json = isinstance(value, str) and len(value) > limits.values and value.lstrip()[:1] in ("[", "{")
            if is_json and _values(value.encode("utf-8", "replace"), limits.values) > limits.values:
                raise Refused(422, f"the JSON in {name[:40]} has more than {limits.values} values")
    answers = [next((row[name] for name in (*MANY, "texts") if isinstance(row.get(name), list)), None) for row in rows]
    pairs = ["chosen" in row and "rejected" in row for row in rows]
    counts = [2 if pair else 1 if found is None else len(found) for found, pair in zip(answers, pairs, strict=True)]
    if not 0 < sum(counts) <= limits.texts:
        raise Refused(422, f"{sum(counts)} texts: a request may have 1 to {limits.texts}")
    characters = 0
    for row, found, count in zip(rows, answers, counts, strict=True):
        for name, value in row.items():
            # What stands next to the answers is part of each text; chosen and rejected are a text each.
            characters += _characters(value) * (1 if value is found or name in ("chosen", "rejected") else count)
    if characters > limits.characters:
        raise Refused(422, f"{characters} characters with the prompt in each text: {limits.characters} are allowed")


def check_text(text: str, number: int, limits: Limits) -> None:
    """Raises Refused for a rendered text that is too long to be tokenised, or is not text."""
    if len(text) > limits.text_characters:
        longest = "a text" if limits.tokens == UNKNOWN else f"a text of at most {limits.tokens} tokens"
        raise Refused(
            422, f"text {number} has {len(text)} characters: {longest} may have 1 to {limits.text_characters}"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(422, f"text {number} contains a lone surrogate, which is half a character") from None


def check_body(body: bytes, limits: Limits) -> None:
    """Raises Refused if a body of JSON has too many values, without parsing it: `[],[],[]` takes 20 times its size."""
    if b"\0" in body:  # UTF-16 and UTF-32, which Python would read as JSON too
        raise Refused(400, "the body is not JSON in UTF-8")
    if _values(body, limits.values) > limits.values:
        raise Refused(422, f"the body has more than {limits.values} values")


def _values(text: bytes, most: int) -> int:
    """How many values JSON has, by its commas and brackets outside of texts; a lower bound if they exceed `most`."""
    bare = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    values = bare.count(b'"') // 4  # a key and a text have two quotation marks each
    if values > most:
        return values
    outside = re.sub(rb'"[^"]*"', b"", bare)
    return outside.count(b",") + outside.count(b"[") + outside.count(b"{")


def _characters(value: Any) -> int:
    """Of all texts in a value."""
    total, rest = 0, [value]
    while rest:
        one = rest.pop()
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, list):
            rest += one
        elif isinstance(one, dict):
            rest += one.values()
    return total


def is_loopback(name: str) -> bool:
    """Whether a host name or address stands for this machine alone: localhost, 127.0.0.1, ::1."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


class Guard:
    """Lets requests through to the application, within the limits of their number, bytes and seconds.

    It reads each body before the application receives it. With `local`, requests must have the Host header of a
    loopback address: a web page that a browser of this machine shows could otherwise reach the service under a name of
    its own (DNS rebinding). With a `token`, every request but /health must have it in its Authorization header.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        refused: Callable[[str, int], None],
        local: bool = False,
        token: str | None = None,
    ) -> None:
        self.app, self.limits, self.refused, self.local = app, limits, refused, local
        self.token = None if token is None else token.encode()
        self.requests = self.held = 0  # requests under way, and the bytes of their bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        size = 0
        bodiless = scope["method"] in ("GET", "HEAD")
        admitted = not (bodiless and scope["path"] in ALWAYS)
        self.requests += admitted

        def holds(more: int) -> None:
            nonlocal size
            size, self.held = size + more, self.held + more
            if self.held > self.limits.bytes_held:
                raise Refused(503, "too many requests are waiting: try again later")

        try:
            self._check(scope, admitted)
            body = b"" if bodiless else await self._in_time(scope, receive, holds)
            if body is not None:  # None: the client has closed the connection
                check_body(body, self.limits)
                await self.app(scope, _replayed(body, receive), send)
        except Refused as refused:
            self.refused(scope["path"], refused.status)
            await error_answer(refused.status, str(refused), close=refused.status not in (400, 422))(
                scope, receive, send
            )
        finally:
            self.held -= size
            if size > LARGE:  # its texts and objects are freed, but glibc would keep their memory
                trim_freed_memory()
            self.requests -= admitted

    def _check(self, scope: Scope, admitted: bool) -> None:
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if self.local and host and not is_loopback(_host_name(host)):
            raise Refused(403, "the Host header must be localhost or a loopback address, on which this service listens")
        if self.token is not None and scope["path"] != OPEN:
            kind, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            # compare_digest takes as long for a token that is wrong at its end as for one that is wrong at once.
            if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.token):
                raise Refused(401, "this service needs the header `Authorization: Bearer TOKEN` with its token")
        if admitted and self.requests > self.limits.requests:
            raise Refused(503, "too many requests are under way: try again later")

    async def _in_time(self, scope: Scope, receive: Receive, holds: Callable[[int], None]) -> bytes | None:
        try:
            return await asyncio.wait_for(self._read(scope, receive, holds), self.limits.body_seconds)
        except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
            raise Refused(408, f"the body took longer than {self.limits.body_seconds:g} seconds") from None

    async def _read(self, scope: Scope, receive: Receive, holds: Callable[[int], None]) -> bytes | None:
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        pieces, size = [], 0
        too_large = Refused(413, f"the body has more than {self.limits.body} bytes")
        if declared.isdigit() and (len(declared) > 18 or int(declared) > self.limits.body):
            raise too_large
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self.limits.body:
                raise too_large
            holds(len(pieces[-1]))
            if not message.get("more_body", False):
                return b"".join(pieces)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body first."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _host_name(header: str) -> str:
    """localhost:5000 -> localhost, [::1]:5000 -> ::1."""
    try:
        return "" if "@" in header else urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def error_answer(status: int, why: str, close: bool = False) -> JSONResponse:
    """{"error": why}, of bounded length. With `close` the connection is closed.

    503 has a Retry-After header, 401 the scheme of authentication.
    """
    connection = {"Connection": "close"} if close else {}
    again = {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(status, {})
    shown = one_line(why.encode("utf-8", "backslashreplace").decode(), 400)
    return JSONResponse({"error": shown}, status, headers={**connection, **again})
