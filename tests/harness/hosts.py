"""Two hosts on one machine: network namespaces joined by a cable that can be cut, each with a host name of its own.

Input: the rights to make them (root, the `ip` and `unshare` tools).
Output: `TwoHosts`, which starts commands on either host. Its processes and namespaces end with the `with` block.
Example: torchrun on 10.77.0.1 and 10.77.0.2, and `cut()` while they train.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.harness.paths import ROOT

ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "cable0"  # in both namespaces
NAMES = Path("/etc/netns")
ENOUGH = 30.0  # seconds for a tool that sets up networks


def ip(*arguments: str) -> None:
    """Run the `ip` tool. Raises CalledProcessError."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=ENOUGH)


def why_not() -> str | None:
    """Why two hosts cannot be made here; None when they can."""
    if missing := [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]:
        return f"needs the tools {', '.join(missing)}"
    name = f"rmcore-try-{secrets.token_hex(3)}"
    try:
        ip("netns", "add", name)
        subprocess.run(
            ["ip", "netns", "exec", name, "unshare", "--uts", "hostname", "elsewhere"],
            check=True, capture_output=True, text=True, timeout=ENOUGH,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        return f"needs the right to make network namespaces ({error.stderr.strip()[:100]})"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=ENOUGH)
    return None


class TwoHosts:
    """Hosts 0 and 1. Make it by `two_hosts`."""

    def __init__(self) -> None:
        tag = f"{os.getpid()}-{secrets.token_hex(3)}"
        self.names = (f"host-a-{tag}", f"host-b-{tag}")
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, host: int, command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        """Start a command on a host; its output, errors included, is the process's `communicate()`."""
        name = self.names[host]
        inside = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name, *command]
        process = subprocess.Popen(
            ["ip", "netns", "exec", name, *inside],
            cwd=ROOT,
            env={**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def cut(self) -> None:
        """From now on nothing gets through, and nobody is told."""
        ip("-n", self.names[1], "link", "set", INTERFACE, "down")

    def mend(self) -> None:
        ip("-n", self.names[1], "link", "set", INTERFACE, "up")

    def make(self) -> None:
        known = "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(ADDRESSES, self.names, strict=True))
        for name in self.names:
            ip("netns", "add", name)
            (NAMES / name).mkdir(parents=True)  # what `ip netns exec` lays over /etc
            (NAMES / name / "hosts").write_text(known, encoding="utf-8")
        ip("-n", self.names[0], "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE,
           "netns", self.names[1])  # fmt: skip
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", INTERFACE, "up")
        # torchrun's agent asks the other host's store without a time limit: host 1 gives a dead connection up after
        # some 10 s, not after Linux's 15 minutes.
        ip("netns", "exec", self.names[1], "sh", "-c", "echo 5 >/proc/sys/net/ipv4/tcp_retries2")

    def remove(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for name in self.names:
            remove(name)


def remove(name: str) -> None:
    """End what runs in a namespace, and remove it."""
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, timeout=ENOUGH)
    for pid in pids.stdout.split():  # torchrun gives its ranks sessions of their own
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=ENOUGH)
    shutil.rmtree(NAMES / name, ignore_errors=True)


def sweep() -> None:
    """Remove what test runs left that were killed: their process is in the name, and gone."""
    listing = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=ENOUGH).stdout
    for match in re.finditer(r"^(host-[ab]-(\d+)-\w+)", listing, re.MULTILINE):
        if not Path(f"/proc/{match[2]}").exists():
            remove(match[1])


@contextlib.contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    sweep()
    hosts = TwoHosts()
    try:
        hosts.make()
        yield hosts
    finally:
        hosts.remove()
