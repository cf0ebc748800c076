"""Closes connections that do not send a request, so that they cannot lock other clients out.

Input: connections of uvicorn's server. Output: the same protocol, with three bounds that uvicorn does not have.
Example: of 1,000 connections that send nothing, all but `most_open` are closed when a new one comes, the one that has
been idle longest first, and the rest after HEAD_SECONDS; a request for /health is answered meanwhile.

uvicorn closes an idle connection only after its first answer (`timeout_keep_alive`), and its `limit_concurrency` counts
idle connections as requests.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0  # from the first byte, or from the connection, to the end of the headers
WRITE_SECONDS = 30.0  # for a client to take what is waiting to be sent


class Connection(H11Protocol):
    """One connection. `most_open`: with more of them, the one that has been idle longest is closed."""

    def __init__(self, *arguments: Any, most_open: int, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._most_open = most_open
        self._idle_since = self.loop.time()
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether no request is under way: its headers are not complete."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()
        others = [one for one in self.connections if isinstance(one, Connection) and one is not self and one.idle]
        if others and len(self.connections) > self._most_open:
            min(others, key=lambda one: one._idle_since).transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_head()

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._write_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._head_timer)
        _cancel(self._write_timer)
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        """Start to wait for the headers of a request, or stop if they have come."""
        if not self.idle:
            _cancel(self._head_timer)
            self._head_timer = None
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.abort)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
