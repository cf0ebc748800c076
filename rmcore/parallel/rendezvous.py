"""Gives each attempt at a job a store of its own, although torchrun keeps one store through all restarts.

Input: torchrun's environment, and this rank.
Output: a store without any key of an earlier attempt.
Example: rank 0 draws the name 7f3a. Ranks 1 and 2 draw 11 and 5c and put them into the store. Rank 0 offers "7f3a to 11
and 5c". A rank accepts an offer that contains its own draw, and confirms it under 7f3a. When all have confirmed, every
rank uses the keys below 7f3a. Nobody answers an offer or a draw of a dead rank.

Why: torch.distributed expects a new store after a restart (torch/distributed/rendezvous.py, `_create_c10d_store`), but
the store of the torchrun agent survives. Gloo then reads the addresses of dead ranks ("connection refused"), in more
than half of all restarts on one host. Restart counts cannot separate the attempts, because they differ between hosts.
"""

import json
import secrets
import time
from datetime import timedelta

import torch.distributed as dist

from rmcore.config import UserError

POLL_SECONDS = 0.02


def fresh_store(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The part of torchrun's store that this attempt uses. Raises UserError if not all ranks start in time."""
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
    end = time.monotonic() + timeout.total_seconds()
    mine = secrets.token_hex(8)
    name = _lead(store, size, mine, end) if rank == 0 else _follow(store, rank, mine, end)
    return dist.PrefixStore(f"rmcore/{name}", store)


def _lead(store: dist.Store, size: int, name: str, end: float) -> str:
    """On rank 0: offer the name until all ranks have confirmed it."""
    draws: dict[str, str] = {}
    while not all(store.check([f"rmcore/{name}/taken/{rank}"]) for rank in range(1, size)):
        ready = [rank for rank in range(1, size) if store.check([f"rmcore/draw/{rank}"])]
        seen = {str(rank): store.get(f"rmcore/draw/{rank}").decode() for rank in ready}
        if seen != draws:
            draws = seen
            store.set("rmcore/offer", json.dumps({"name": name, "to": draws}))
        _wait(end)
    return name


def _follow(store: dist.Store, rank: int, draw: str, end: float) -> str:
    """On the other ranks: wait for an offer to this process."""
    store.set(f"rmcore/draw/{rank}", draw)
    while True:
        if store.check(["rmcore/offer"]):
            offer = json.loads(store.get("rmcore/offer"))
            if offer["to"].get(str(rank)) == draw:
                store.set(f"rmcore/{offer['name']}/taken/{rank}", "")
                return offer["name"]
        _wait(end)


def _wait(end: float) -> None:
    if time.monotonic() > end:
        raise UserError("not all ranks started within parallel.timeout_seconds: see what the missing ones printed")
    time.sleep(POLL_SECONDS)
