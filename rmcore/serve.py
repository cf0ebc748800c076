"""`rmcore serve MODEL`: serves rewards over HTTP, for RL loops and best-of-n.

Input: a reward model's directory. Output: a service on localhost (rmcore/serving/app.py describes its endpoints).
Example: `rmcore serve runs/hh/model --port 5000` prints "rmcore serve: runs/hh/model on http://127.0.0.1:5000";
OpenRLHF's trainer is then started with --remote_rm_url http://127.0.0.1:5000/get_reward.

On SIGTERM or SIGINT the service accepts no new connection, answers the requests under way and exits with 0. Without
a token in $RMCORE_SERVE_TOKEN everyone who reaches the address can use the model.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from importlib.util import find_spec

from rmcore.config import UserError
from rmcore.host.command import run_command

HOST, PORT = "127.0.0.1", 5000
TOKEN = "RMCORE_SERVE_TOKEN"  # in the environment: a command line can be read by every user of the machine
NEEDED = ("fastapi", "uvicorn", "prometheus_client")  # the packages of the extra `serve`


def main(argv: list[str]) -> int:
    """Exit codes: 0 stopped by SIGTERM or SIGINT, all requests answered; 2 refused (model, address, settings)."""
    given = parser().parse_intermixed_args(argv)
    return run_command("rmcore serve", lambda: serve(given))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="rmcore serve",
        description="Rewards over HTTP: /get_reward (OpenRLHF), /classify and /score (vLLM), /rewards, /health, "
        f"/metrics, /openapi.json. With a token in ${TOKEN}, requests need the header Authorization: Bearer TOKEN. "
        "Needs the extra: pip install 'rmcore[serve]'.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("model", metavar="MODEL", help="directory or hub id of a reward model")
    made.add_argument("--host", default=HOST, help=f"address; set ${TOKEN} where others can reach it")
    made.add_argument("--port", type=int, default=PORT, help="0: any free port, which is printed")
    made.add_argument("--socket", metavar="PATH", help="a unix socket of mode 0600, in place of host and port")
    made.add_argument(
        "--normalise", action="store_true", help="normalise by the mean and deviation stored in MODEL/config.json"
    )
    made.add_argument("--max-body", type=int, default=16 << 20, metavar="BYTES", help="per request, else 413")
    made.add_argument("--max-texts", type=int, default=4096, metavar="N", help="per request, else 422")
    made.add_argument(
        "--max-tokens", type=int, default=None, metavar="N", help="per text, else 422 (None: the model's positions)"
    )
    made.add_argument("--max-waiting", type=int, default=4_000_000, metavar="TOKENS", help="in the queue, else 503")
    made.add_argument(
        "--max-connections", type=int, default=512, metavar="N", help="requests under way at once, else 503"
    )
    made.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="until the answer, else 504")
    made.add_argument("--body-timeout", type=float, default=30.0, metavar="SECONDS", help="for a body, else 408")
    made.add_argument("overrides", metavar="key=value", nargs="*", help="data.template=..., batch.tokens=..., ...")
    return made


def serve(given: argparse.Namespace) -> None:
    """Check the settings and run the service. Raises UserError."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed: pip install 'rmcore[serve]'")
    for name in ("max_body", "max_texts", "max_tokens", "max_waiting", "max_connections", "timeout", "body_timeout"):
        if (value := getattr(given, name)) is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if given.socket is not None and (given.host, given.port) != (HOST, PORT):
        raise UserError("--socket takes the place of --host and --port: give one or the other")
    token = os.environ.get(TOKEN)
    if token is not None and re.fullmatch(r"[!-~]+", token) is None:
        raise UserError(f"{TOKEN} must be a token of visible ASCII characters without spaces; unset it for none")
    if not 0 <= given.port <= 65535:
        raise UserError(f"--port must be from 0 to 65535, not {given.port}")
    from rmcore.serving import server
    from rmcore.serving.limits import Limits

    tokens = given.max_tokens or Limits.tokens
    server.serve(
        given.model,
        given.overrides,
        Limits(given.max_body, given.max_texts, tokens, given.body_timeout, given.timeout, given.max_connections),
        host=given.host,
        port=given.port,
        path=given.socket,
        token=token,
        normalise=given.normalise,
        most_waiting=given.max_waiting,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
