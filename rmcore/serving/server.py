"""Runs the HTTP service: binds the address, loads the model, answers until a signal.

Input: the settings of `rmcore serve`. Output: a service on an address, and two lines on standard output when it is
ready.
Example: serve("runs/hh/model", [], Limits(), port=5000) prints how rewards are computed, then
"rmcore serve: runs/hh/model on http://127.0.0.1:5000".
"""

import functools
import math
import os
import signal
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import uvicorn

from rmcore.config import UserError
from rmcore.host.terminal import print_text
from rmcore.scoring.rows import trial_rows
from rmcore.scoring.scorer import Scorer
from rmcore.serving.app import Service, create_app
from rmcore.serving.batcher import Batcher
from rmcore.serving.connections import Connection
from rmcore.serving.limits import Limits, is_loopback

BACKLOG = 2048  # connections that the kernel may hold before they are accepted
SPARE = 64  # connections beyond the requests that may be under way: for /health, and to refuse further requests


def serve(
    model: str,
    overrides: Sequence[str],
    limits: Limits,
    *,
    host: str = "127.0.0.1",
    port: int = 5000,
    path: str | None = None,
    token: str | None = None,
    normalise: bool = False,
    most_waiting: int = 4_000_000,
) -> None:
    """Load, listen and answer until SIGTERM or SIGINT; then answer the requests under way. Raises UserError.

    Args:
        path: of a unix socket, in place of host and port.
        token: that requests must have, see rmcore.serving.limits.Guard.
        most_waiting: tokens that may wait; further requests are answered with 503.
    """
    opened = bound(host, port) if path is None else bound_path(path)
    with opened as address:  # before the model is loaded, which may take minutes
        scorer = Scorer(model, overrides, normalise=normalise)
        scorer.choose_path(trial_rows())
        limits = replace(limits, tokens=min(limits.tokens, scorer.longest))
        service = Service(scorer, Batcher(scorer.values, scorer.token_budget, most_waiting), limits)
        config = uvicorn.Config(
            create_app(service, local=path is None and is_loopback(address.getsockname()[0]), token=token),
            http=functools.partial(Connection, most_open=limits.requests + SPARE),  # type: ignore[arg-type]
            ws="none",
            log_level="warning",
            backlog=BACKLOG,
            timeout_keep_alive=60,
            timeout_graceful_shutdown=math.ceil(limits.body_seconds + limits.seconds) + 1,
        )
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises the signal again when it is done
            signal.signal(number, lambda *_: None)
        address.listen(BACKLOG)
        where = f"unix:{path}" if path is not None else "http://{}:{}".format(*address.getsockname()[:2])
        for line in (*scorer.notes, scorer.path):
            print_text(f"rmcore serve: {line}", flush=True)
        print_text(f"rmcore serve: {model} on {where}", flush=True)
        uvicorn.Server(config).run(sockets=[address])


@contextmanager
def bound_path(path: str) -> Iterator[socket.socket]:
    """A unix socket at the path, for its owner alone (mode 0600); its file is removed at the end.

    A file that a killed service has left is replaced. Raises UserError if another process listens there, or the file is
    something else, or it cannot be made.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        before = os.umask(0o177)  # the file must never be open to others, not even before a chmod
        try:
            _remove_stale(path)
            made.bind(path)
            own = os.stat(path)
        except OSError as error:
            raise UserError(f"cannot listen on {path}: {error.strerror or error}; choose another --socket") from None
        finally:
            os.umask(before)
        try:
            yield made
        finally:
            with suppress(OSError):  # unless another service has taken the place
                found = os.stat(path, follow_symlinks=False)
                if stat.S_ISSOCK(found.st_mode) and os.path.samestat(found, own):
                    os.unlink(path)


def _remove_stale(path: str) -> None:
    """Remove the file of a unix socket on which nobody listens. Raises OSError, UserError."""
    try:
        mode = os.stat(path, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UserError(f"cannot listen on {path}: it exists and is not a socket; choose another --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as attempt:
        try:
            attempt.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise UserError(f"cannot listen on {path}: another process listens there; choose another --socket")


def bound(host: str, port: int) -> socket.socket:
    """A socket at the address. Raises UserError if it is in use or does not belong to this machine."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(place)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}:{port}: {reason}; choose another --port or --host") from None
    return made
