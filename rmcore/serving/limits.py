"""Limits the size of a request of `rmcore serve`, and refuses what exceeds them.

Input: `Limits`, an ASGI application. Output: the application, which now receives only complete bodies; or an error, one
sentence as JSON.
Example: with body=1000 the answer to a request of 1001 bytes is 413 {"error": "the body has more than 1000 bytes"}, and
its connection is closed.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass(frozen=True)
class Limits:
    """The limits of one request."""

    body: int = 16 << 20  # bytes
    texts: int = 4096
    tokens: int = 2**31 - 1  # per text
    body_seconds: float = 30.0  # to receive the body
    seconds: float = 120.0  # to answer


class Refused(Exception):
    """A request that is refused: the `status` of HTTP, and the reason in a sentence."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class BodyLimit:
    """Reads each body before the application receives it, within the limits of bytes and seconds."""

    def __init__(self, app: ASGIApp, limits: Limits, refused: Callable[[str, int], None]) -> None:
        self.app, self.limits, self.refused = app, limits, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = await self._in_time(scope, receive)
        except Refused as refused:
            self.refused(scope["path"], refused.status)
            await error_answer(refused.status, str(refused))(scope, receive, send)
            return
        if body is None:
            return  # the client has closed the connection
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    async def _in_time(self, scope: Scope, receive: Receive) -> bytes | None:
        try:
            return await asyncio.wait_for(self._read(scope, receive), self.limits.body_seconds)
        except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
            raise Refused(408, f"the body took longer than {self.limits.body_seconds:g} seconds") from None

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        pieces, size = [], 0
        too_large = Refused(413, f"the body has more than {self.limits.body} bytes")
        if declared.isdigit() and int(declared) > self.limits.body:
            raise too_large
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self.limits.body:
                raise too_large
            if not message.get("more_body", False):
                return b"".join(pieces)


def error_answer(status: int, why: str) -> JSONResponse:
    """{"error": why}. 408 and 413 close the connection; 503 has a Retry-After header."""
    close = {"Connection": "close"} if status in (408, 413) else {}
    again = {"Retry-After": "1"} if status == 503 else {}
    return JSONResponse({"error": why}, status, headers={**close, **again})
