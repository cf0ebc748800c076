"""Checks whether the Hugging Face hub answers; if not, its clients use their cache at once instead of retrying.

Input: the environment (HF_HUB_OFFLINE, HF_ENDPOINT, proxies). Output: the reason why the hub cannot be used, or None.
Example: on a machine without a network, "the hub cannot be reached: huggingface.co", after at most 5 seconds.
"""

import contextlib
import functools
import os
import socket
import threading
import urllib.parse
from collections.abc import Iterator

import huggingface_hub

_PROBE_SECONDS = 5.0


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[str | None]:
    """Yield None if the hub answers. Otherwise yield the reason, and set the hub's clients to work from their cache.

    Without this, a load without a connection retries for about 25 seconds before it looks into the cache.
    """
    import datasets  # here, because processes that load a tokenizer from a local directory do without it

    if huggingface_hub.constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        yield "offline mode is on: HF_HUB_OFFLINE or HF_DATASETS_OFFLINE"
        return
    host = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    if proxied or _reachable(host.hostname or "", host.port or (80 if host.scheme == "http" else 443)):
        yield None
        return
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield f"the hub cannot be reached: {host.hostname}"
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False


@functools.cache
def _reachable(host: str, port: int) -> bool:
    """Whether the host accepts a connection within 5 s. It runs in a thread, because name look-ups have no timeout."""
    answers: list[bool] = []

    def probe() -> None:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=_PROBE_SECONDS):
            answers.append(True)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return bool(answers)
