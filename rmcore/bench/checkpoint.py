"""`python -m rmcore.bench checkpoint [--megabytes 500] [--runs 7] [--directory DIR]`: saving and loading, and the disk.

Enters: a place on the disk to measure. Leaves: seconds and MB/s of rmcore (written and hashed; verified and loaded)
and of `dd` on the same disk, in turn, both until the data are on the disk (fsync) and read from the disk (not from its
cache); the memory that saving takes; and what a training step feels of it. Example: 500 MB in 0.61 s with hashing, dd
0.55 s.
"""

import argparse
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rmcore.bench.kernels import peak_memory
from rmcore.bench.measure import Clock, add_up, machine, spread, write_results
from rmcore.checkpoint.shards import hash_file, read_slices, write_shard
from rmcore.checkpoint.state import HostCopy, Piece

TENSORS = 60  # the state is cut into as many, as a model is


def state(megabytes: int) -> list[Piece]:
    """Random fp32 tensors of about this size in all, as the pieces of one rank that holds everything."""
    elements = megabytes * 10**6 // 4 // TENSORS
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(elements, generator=generator) for _ in range(TENSORS)]
    return [Piece(f"weight/{number}", tensor, 0, 0, 1) for number, tensor in enumerate(tensors)]


def seconds(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def forget(path: Path) -> None:
    """Drop the file from the system's cache, so that it is read from the disk."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def dd(*words: str) -> None:
    subprocess.run(["dd", *words, "bs=16M", "status=none"], check=True)


def measure(directory: Path, megabytes: int, runs: int) -> dict[str, Any]:
    """All figures; rmcore and dd take turns, so that a busy disk hits both."""
    pieces, host = state(megabytes), HostCopy()
    ours, theirs = directory / "ours.safetensors", directory / "theirs"
    wanted = {piece.key: (0, torch.empty_like(piece.local)) for piece in pieces}
    times: dict[str, list[float]] = {"copy": [], "write": [], "dd_write": [], "verify_and_load": [], "dd_read": []}
    source = directory / "source"  # what dd copies: the same bytes, in memory
    host.take(pieces)
    write_shard(source, host.slices)
    for _ in range(runs):
        times["copy"].append(seconds(lambda: host.take(pieces)))
        ours.unlink(missing_ok=True)
        times["write"].append(seconds(lambda: write_shard(ours, host.slices)))
        theirs.unlink(missing_ok=True)
        source.read_bytes()  # into the cache
        times["dd_write"].append(seconds(lambda: dd(f"if={source}", f"of={theirs}", "conv=fsync")))
        forget(ours)
        verify = seconds(lambda: hash_file(ours))
        times["verify_and_load"].append(verify + seconds(partial(read_slices, [ours], wanted)))
        forget(theirs)
        times["dd_read"].append(seconds(lambda: dd(f"if={theirs}", "of=/dev/null")))
    assert all(torch.equal(wanted[piece.key][1], piece.local) for piece in pieces), "what was read is what was written"
    ratios = [plain / own for plain, own in zip(times["dd_write"], times["write"], strict=True)]
    reads = [plain / own for plain, own in zip(times["dd_read"], times["verify_and_load"], strict=True)]
    size = ours.stat().st_size
    ours.unlink()
    fresh = HostCopy()
    return {
        "bytes": size,
        "seconds": {name: spread(values) for name, values in times.items()},
        "write_speed_over_dd": spread(ratios),
        "load_speed_over_dd": spread(reads),
        "peak_extra_bytes": {
            "copy": peak_memory(lambda: fresh.take(pieces), "cpu"),
            "write": peak_memory(lambda: write_shard(ours, host.slices), "cpu"),
        },
        "step": steps_beside(directory, host, runs),
    }


def steps_beside(directory: Path, host: HostCopy, runs: int) -> dict[str, Any]:
    """Median seconds of a training step of some 0.1 s alone, and while a checkpoint is written beside it, in turn."""
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(12)))
    optimizer, batch = torch.optim.AdamW(model.parameters(), fused=True), torch.randn(512, 512)

    def step() -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    alone, beside = [], []
    for number in range(runs):
        alone += [seconds(step) for _ in range(10)]
        path = directory / f"beside-{number}"
        thread = threading.Thread(target=write_shard, args=(path, host.slices))
        thread.start()
        while thread.is_alive():
            beside.append(seconds(step))
        thread.join()
        path.unlink()
    return {"alone": spread(alone), "while_saving": spread(beside)}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m rmcore.bench checkpoint")
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--directory", default=".", help="on the disk to measure")
    parser.add_argument("--out")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    clock = Clock()
    with tempfile.TemporaryDirectory(dir=asked.directory) as directory:
        figures = measure(Path(directory), asked.megabytes, asked.runs)
    figures["others_share"] = add_up([clock.lap()])["others_share"]  # of the machine; dd is among the others
    path = write_results("checkpoint", {"machine": machine(), **figures}, asked.out)
    for name, value in figures["seconds"].items():
        rate = figures["bytes"] / 1e6 / value["median"]
        print(f"{name:<16} {value['median']:.3f} s ({value['least']:.3f} to {value['most']:.3f}), {rate:,.0f} MB/s")
    for name in ("write_speed_over_dd", "load_speed_over_dd"):
        print(f"{name:<20} {figures[name]['median']:.2f} ({figures[name]['least']:.2f} to {figures[name]['most']:.2f})")
    step = figures["step"]
    print(f"a step {step['alone']['median']:.4f} s, {step['while_saving']['median']:.4f} s while saving")
    print(f"peak extra memory, bytes: {figures['peak_extra_bytes']}; in {path}")
    return 0
