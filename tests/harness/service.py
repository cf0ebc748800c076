"""`rmcore serve` in a process of its own, for tests over real HTTP, with its processor time and memory.

Input: arguments of the command. Output: a `Served`. Example: Served("--timeout", "2").post("/score", {...}).json().
"""

import atexit
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.harness.paths import ROOT, SHARED

MODEL = str(SHARED / "oracle" / "model")
SETTINGS = ["data.template=none", "parallel.precision=fp32"]
WAIT = 120.0  # seconds for a process to start or end where many share the cores


class Served:
    """A service in a process of its own."""

    def __init__(
        self, *arguments: str, model: str = MODEL, settings: Sequence[str] = SETTINGS, port: int | None = 0
    ) -> None:
        place = [] if port is None else ["--port", str(port)]
        command = [sys.executable, "-m", "rmcore.serve", model, *place, *arguments, *settings]
        with tempfile.TemporaryFile("w+") as errors:  # a pipe that nobody reads would fill
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            atexit.register(self.process.kill)  # of a test that fails
            assert self.process.stdout is not None
            for line in self.process.stdout:
                if " on http://" in line or " on unix:" in line:
                    self.address = line.split(" on ")[1].strip()
                    return
            errors.seek(0)
            raise AssertionError(errors.read())

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.address + path, json=body, timeout=WAIT, trust_env=False)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        try:
            self.process.communicate(timeout=WAIT)
        finally:
            self.process.kill()
        return self.process.returncode

    def cpu_seconds(self) -> float:
        """Seconds that the process has computed, on all cores."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self, what: str) -> int:
        """Bytes in memory now (VmRSS) or at most since the start or `forget_peak` (VmHWM)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.search(rf"{what}:\s+(\d+)", status)[1])  # type: ignore[index]

    def connect(self) -> socket.socket:
        host, port = self.address.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=WAIT)


def raw(service: Served, data: bytes) -> bytes:
    """What the service answers to these bytes, until it closes."""
    with service.connect() as connection:
        connection.sendall(data)
        pieces = []
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                pieces.append(piece)
    return b"".join(pieces)
