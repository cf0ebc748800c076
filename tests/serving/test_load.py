"""Many clients at once for a minute, and a service that is killed under them: no answer is lost, mixed up or wrong."""

import asyncio
import math
import random
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from rmcore.scoring.scorer import Scorer
from tests.harness.paths import needs_shared
from tests.harness.service import MODEL, SETTINGS, Served

pytestmark = [needs_shared, pytest.mark.slow, pytest.mark.timeout(3600)]
CLIENTS, SECONDS = 256, 60.0
ANSWERS = 2 * CLIENTS  # at least, in each round
PATIENCE = 1200.0  # seconds that a request may take where others use the processors
CLOSE = 1e-5  # six layers in fp32: sums of hundreds of terms of order 1, each rounded at 6e-8
TEXTS = [f"Number {number}: " + " and on" * (number % 40) for number in range(400)]


def expected() -> list[float]:
    """The reward of each text, computed in this process."""
    rewards = Scorer(MODEL, SETTINGS).rewards([({"text": text}, "here") for text in TEXTS])
    found = [reward for one in rewards for reward in one.rewards if reward is not None]
    gaps = [b - a for a, b in zip(sorted(found), sorted(found)[1:], strict=False)]
    assert len(found) == len(TEXTS) and sorted(gaps)[len(gaps) // 2] > 2 * CLOSE, "most texts differ in their rewards"
    return found


class Clients:
    """Clients that send random texts one request after the other, and compare every answer."""

    def __init__(self, base: dict[str, Any], rewards: list[float]) -> None:
        self.base, self.rewards = base, rewards
        self.answers = self.broken = self.busy = 0
        self.wrong: list[str] = []
        self.until = math.inf  # time.monotonic() at which they stop

    async def one(self, seed: int) -> None:
        draw = random.Random(seed)
        session = self._session()
        try:
            while time.monotonic() < self.until:
                chosen = draw.choices(range(len(TEXTS)), k=draw.choice((1, 1, 2, 5)))
                try:
                    answer = await session.post("/get_reward", json={"query": [TEXTS[place] for place in chosen]})
                except httpx.TransportError:  # the service was killed: connect again until the next one listens
                    self.broken += 1
                    await session.aclose()
                    session = self._session()
                    await asyncio.sleep(0.2)
                    continue
                if answer.status_code == 503:
                    self.busy += 1
                    await asyncio.sleep(1)
                    continue
                self._compare(answer, chosen)
        finally:
            await session.aclose()

    def _session(self) -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(**self.base)
        return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=PATIENCE)

    def _compare(self, answer: httpx.Response, chosen: list[int]) -> None:
        self.answers += 1
        found = answer.json().get("rewards", [])
        right = [self.rewards[place] for place in chosen]
        if len(found) != len(right) or max(abs(a - b) for a, b in zip(found, right, strict=True)) > CLOSE:
            self.wrong.append(f"{answer.status_code} {chosen}: {answer.text[:200]}")


def test_a_minute_of_many_clients(tmp_path: Path) -> None:
    """Two rounds to warm up, then a minute in rounds of as many answers: the least memory of a round has no new high.

    A round lasts until all clients together have their answers, however fast the machine is, and a part of the minute.
    """
    path = tmp_path / "socket"
    service = Served("--socket", str(path), "--timeout", str(PATIENCE), port=None)
    clients = Clients({"uds": str(path)}, expected())
    least: list[int] = []

    async def watch(seconds: float) -> None:
        """End the round once it has lasted `seconds` and has its answers; keep the least memory seen in it."""
        began, enough, found = time.monotonic(), clients.answers + ANSWERS, []
        while time.monotonic() < began + seconds or clients.answers < enough:
            found.append(service.memory("VmRSS"))
            await asyncio.sleep(0.1)
        clients.until = 0.0
        least.append(min(found[len(found) // 2 :]))

    async def run() -> None:
        for again, seconds in enumerate([0.0] * 2 + [SECONDS / 4] * 4):
            clients.until = math.inf
            await asyncio.gather(watch(seconds), *(clients.one(CLIENTS * again + seed) for seed in range(CLIENTS)))

    asyncio.run(run())
    memory = [bytes >> 20 for bytes in least]
    print(f"{clients.answers} answers, {clients.busy} refused as busy, least memory of each round {memory} MiB")
    assert clients.wrong == [] and clients.broken == 0 and clients.answers >= 6 * ANSWERS
    assert max(least[-2:]) - max(least[:-2]) < 32 << 20, "batches of other sizes leave other amounts behind"
    assert service.end() == 0


def test_killed_and_restarted_under_many_clients(tmp_path: Path) -> None:
    """The second service takes over the socket of the killed one; the clients connect again."""
    path = tmp_path / "socket"
    clients = Clients({"uds": str(path)}, expected())
    services = [Served("--socket", str(path), "--timeout", str(PATIENCE), port=None)]
    after: list[int] = []

    async def run() -> None:
        async def kill() -> None:
            while clients.answers < CLIENTS:
                await asyncio.sleep(0.05)
            await asyncio.to_thread(services[0].end, signal.SIGKILL)
            services.append(
                await asyncio.to_thread(Served, "--socket", str(path), "--timeout", str(PATIENCE), port=None)
            )
            after.append(clients.answers)
            while clients.answers < after[0] + 2 * CLIENTS and not clients.wrong:
                await asyncio.sleep(0.05)
            clients.until = 0.0

        await asyncio.gather(kill(), *(clients.one(seed) for seed in range(CLIENTS)))

    asyncio.run(run())
    print(
        f"{clients.answers} answers, {clients.answers - after[0]} after the restart, {clients.broken} broken requests"
    )
    assert clients.wrong == [] and clients.broken > 0
    assert services[1].end() == 0
