"""`rmcore serve MODEL`: rewards over HTTP, for RL loops and best-of-n.

In: a reward model's directory. Out: a service on localhost (rmcore/serving/app.py says what it takes and gives).
Example: `rmcore serve runs/hh/model --port 5000` prints "rmcore serve: runs/hh/model on http://127.0.0.1:5000";
OpenRLHF's trainer is then started with --remote_rm_url http://127.0.0.1:5000/get_reward.

SIGTERM or SIGINT: no new connection is taken, requests under way are answered, exit code 0. There is no
authentication: on another address than localhost, whoever reaches the port can use the model.
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys
from importlib.util import find_spec

from rmcore.config import UserError
from rmcore.host.command import run_command

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def main(argv: list[str]) -> int:
    """Exit codes: 0 stopped by SIGTERM or SIGINT, all requests answered; 2 refused (model, address, settings)."""
    given = parser().parse_intermixed_args(argv)
    return run_command("rmcore serve", lambda: serve(given))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="rmcore serve",
        description="Rewards over HTTP: /get_reward (OpenRLHF), /classify and /score (vLLM), /rewards, /health, "
        "/metrics. Needs the extra: pip install 'rmcore[serve]'.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("model", metavar="MODEL", help="directory or hub id of a reward model")
    made.add_argument("--host", default="127.0.0.1", help="address; there is no authentication")
    made.add_argument("--port", type=int, default=5000, help="0: any free one, which is printed")
    made.add_argument("--normalise", action="store_true", help="by the mean and deviation stored in MODEL/config.json")
    made.add_argument("--max-body", type=int, default=16 << 20, metavar="BYTES", help="of a request")
    made.add_argument("--max-texts", type=int, default=4096, metavar="N", help="of a request")
    made.add_argument(
        "--max-tokens", type=int, default=None, metavar="N", help="of a text (None: the model's positions)"
    )
    made.add_argument("--max-waiting", type=int, default=4_000_000, metavar="TOKENS", help="more is answered with 503")
    made.add_argument("--max-connections", type=int, default=512, metavar="N", help="more are answered with 503")
    made.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="to an answer, else 504")
    made.add_argument("--body-timeout", type=float, default=30.0, metavar="SECONDS", help="for a body, else 408")
    made.add_argument("overrides", metavar="key=value", nargs="*", help="data.template=..., batch.tokens=..., ...")
    return made


def serve(given: argparse.Namespace) -> None:
    """Load, listen, answer until a signal. Raises UserError."""
    lacking = [name for name in NEEDED if find_spec(name) is None]
    if lacking:
        raise UserError(f"{', '.join(lacking)} not installed: pip install 'rmcore[serve]'")
    for name in ("max_body", "max_texts", "max_tokens", "max_waiting", "max_connections", "timeout", "body_timeout"):
        if (value := getattr(given, name)) is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if not 0 <= given.port <= 65535:
        raise UserError(f"--port must be from 0 to 65535, not {given.port}")
    with bound(given.host, given.port) as address:  # before the model is loaded, which may take minutes
        import uvicorn

        from rmcore.scoring.rows import trial_rows
        from rmcore.scoring.scorer import Scorer
        from rmcore.serving.app import Service, create_app
        from rmcore.serving.batcher import Batcher
        from rmcore.serving.limits import Limits

        scorer = Scorer(given.model, given.overrides, normalise=given.normalise)
        scorer.choose_path(trial_rows())
        tokens = given.max_tokens or scorer.longest
        limits = Limits(given.max_body, given.max_texts, tokens, given.body_timeout, given.timeout)
        app = create_app(Service(scorer, Batcher(scorer.score, scorer.budget, given.max_waiting), limits))
        config = uvicorn.Config(
            app,
            log_level="warning",
            limit_concurrency=given.max_connections,
            backlog=2048,
            timeout_keep_alive=60,
            timeout_graceful_shutdown=int(given.timeout) + 1,
        )
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises the signal again once it is done
            signal.signal(number, lambda *_: None)
        address.listen(2048)
        host, port = address.getsockname()[:2]
        print(f"rmcore serve: {scorer.path}", flush=True)
        print(f"rmcore serve: {given.model} on http://{host}:{port}", flush=True)
        uvicorn.Server(config).run(sockets=[address])


def bound(host: str, port: int) -> socket.socket:
    """A socket at the address. Raises UserError when it is taken or is none of this machine's."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(place)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}:{port}: {reason}; choose another --port or --host") from None
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
