"""Measures `rmcore serve`: many clients at once, compared with one client that waits for each answer.

Input: a model directory, a file of rows {"chosen", "rejected"}.
Output: JSON with texts per second and the times to an answer, and the number of wrong answers.
Example: 256 requests of one text, each sent when the one before is answered, as by an RL loop that sends single
requests; then the same requests from 64 clients.

Ratio: texts per second of many clients over those of one; above 1 requests that wait are scored together. An answer is
wrong if it is lost, or differs from that of the first run with one client by more than rounding. The exit code is 1 if
any is.
"""

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rmcore.bench.measure import machine, parser, spread, write_results
from rmcore.bench.score import rows_of

# The largest difference, for rewards of order 1, that the other texts of a batch may make by rounding.
CLOSE = {"fp32": 1e-4, "bf16": 5e-2}


def requests_of(data: str, count: int, answers: int) -> list[dict[str, Any]]:
    """Requests as OpenRLHF sends them, each with `answers` answers to one prompt."""
    rows = rows_of(data, "pairs" if answers == 1 else "answers", None)
    made = []
    for row in rows:
        texts = [row["prompt"] + answer for answer in row["answers"][:answers]]
        made.append({"query": texts, "prompts": [row["prompt"]] * len(texts)})
    return [made[number % len(made)] for number in range(count)]


class Served:
    """The service in a process of its own, on any free port."""

    def __init__(self, model: str, precision: str) -> None:
        command = [sys.executable, "-m", "rmcore.serve", model, "--port", "0", "data.template=none"]
        self._process = subprocess.Popen(
            [*command, f"parallel.precision={precision}"], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.address = next(line.split(" on ")[1].strip() for line in self._process.stdout if " on http://" in line)

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        if self._process.wait(60) != 0:
            raise RuntimeError(f"rmcore serve ended with exit code {self._process.returncode}")


async def send(address: str, requests: list[dict[str, Any]], clients: int) -> tuple[list[Any], list[float], float]:
    """Sends every request once, `clients` at a time: (rewards by request, seconds of each, seconds of all)."""
    import httpx

    answers: list[Any] = [None] * len(requests)
    seconds = [0.0] * len(requests)
    waiting = iter(range(len(requests)))

    async def one(session: httpx.AsyncClient) -> None:
        for number in waiting:
            began = time.perf_counter()
            answer = await session.post("/get_reward", json=requests[number])
            seconds[number] = time.perf_counter() - began
            answer.raise_for_status()
            answers[number] = answer.json()["rewards"]

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits, trust_env=False) as session:
        began = time.perf_counter()
        await asyncio.gather(*(one(session) for _ in range(clients)))
        return answers, seconds, time.perf_counter() - began


def measured(served: Served, requests: list[dict[str, Any]], clients: int) -> dict[str, Any]:
    answers, seconds, wall = asyncio.run(send(served.address, requests, clients))
    texts = sum(len(request["query"]) for request in requests)
    ordered = sorted(seconds)
    return {
        "clients": clients,
        "requests": len(requests),
        "texts": texts,
        "wall_s": wall,
        "texts_per_s": texts / wall,
        "answer_s": {"median": ordered[len(ordered) // 2], "p95": ordered[int(0.95 * len(ordered))]},
        "answers": answers,
    }


def main(arguments: list[str]) -> int:
    p = parser("serve", __doc__)
    p.add_argument("--model", required=True, help="directory of a sequence-classification model")
    p.add_argument("--data", required=True, help="JSONL file of whole texts: chosen, rejected")
    p.add_argument("--precision", default="fp32", choices=list(CLOSE))
    p.add_argument("--answers", type=int, nargs="+", default=[1, 8], help="answers to one prompt in a request")
    p.add_argument("--requests", type=int, default=256)
    p.add_argument("--clients", type=int, default=64)
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--out", help="result file; default: rmcore/bench/results/serve.json")
    options = p.parse_args(arguments)
    runs, wrong = [], 0
    with Served(options.model, options.precision) as served:
        for answers in options.answers:
            requests = requests_of(options.data, options.requests, answers)
            measured(served, requests[: options.clients], options.clients)  # warms up
            expected: list[Any] = []  # the answers of the first run with one client
            for repetition in range(options.repeat):
                for clients in (1, options.clients):
                    record = measured(served, requests, clients)
                    found = record.pop("answers")
                    expected = expected or found
                    wrong += different(found, expected, CLOSE[options.precision])
                    runs.append({"answers": answers, "repetition": repetition, **record})
                    print(f"{answers} answers, {clients} clients: {record['texts_per_s']:.1f} texts/s", flush=True)
    ratios = {str(answers): ratio(runs, answers) for answers in options.answers}
    settings = {**vars(options), "model": Path(options.model).name, "data": Path(options.data).name}
    settings.pop("out")
    record = {"what": "serve", "machine": machine(), "settings": settings, "wrong": wrong, "ratio": ratios}
    print(json.dumps({"wrong": wrong, "ratio": ratios}))
    print(f"written: {write_results('serve', {**record, 'runs': runs}, options.out)}")
    return 1 if wrong else 0


def different(found: list[Any], expected: list[Any], close: float) -> int:
    """The number of answers that are lost, or differ from the expected ones by more than `close`."""
    return sum(
        len(one) != len(other) or any(abs(a - b) > close for a, b in zip(one, other, strict=True))
        for one, other in zip(found, expected, strict=True)
    )


def ratio(runs: list[dict[str, Any]], answers: int) -> float:
    """Median texts/s of many clients over that of one."""
    rates: dict[bool, list[float]] = {True: [], False: []}
    for run in runs:
        if run["answers"] == answers:
            rates[run["clients"] == 1].append(run["texts_per_s"])
    return spread(rates[False])["median"] / spread(rates[True])["median"]
