"""Measures saving and loading a checkpoint, compared with `dd` on the same disk.

Input: a directory on the disk to measure.
Output: seconds and MB/s of rmcore (written and hashed; verified and loaded) and of `dd`, in turn. Both write until the
data are on the disk (fsync), and read from the disk, not from its cache. Also the memory that saving takes, and the
seconds of a training step with and without a checkpoint being written at the same time.
Example: 500 MB in 0.61 s with hashing, dd 0.55 s.

Ratio: dd's seconds over rmcore's, within each turn; 1 means that rmcore works at the speed of the disk, above 1 that it
is faster than dd.
"""

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
from rmcore.bench.measure import Clock, add_up, machine, parser, spread, write_results
from rmcore.checkpoint.shards import hash_file, read_slices, write_shard
from rmcore.checkpoint.state import HostCopy, Piece

TENSORS = 60  # into which the state is divided, as in a model


def state(megabytes: int) -> list[Piece]:
    """Random fp32 tensors of this total size, as the pieces of one rank that holds the whole state."""
    elements = megabytes * 10**6 // 4 // TENSORS
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(elements, generator=generator) for _ in range(TENSORS)]
    return [Piece(f"weight/{number}", tensor, 0, 0, 1) for number, tensor in enumerate(tensors)]


def seconds(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def forget(path: Path) -> None:
    """Drops the file from the system's cache, so that the next read comes from the disk."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def dd(*words: str) -> None:
    subprocess.run(["dd", *words, "bs=16M", "status=none"], check=True)


def measure(directory: Path, megabytes: int, runs: int) -> dict[str, Any]:
    """All results. rmcore and dd take turns, so that a busy disk slows both."""
    pieces, host = state(megabytes), HostCopy()
    ours, theirs = directory / "ours.safetensors", directory / "theirs"
    wanted = {piece.key: (0, torch.empty_like(piece.local)) for piece in pieces}
    times: dict[str, list[float]] = {"copy": [], "write": [], "dd_write": [], "verify_and_load": [], "dd_read": []}
    source = directory / "source"  # dd copies the same bytes, from the system's cache
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
    assert all(torch.equal(wanted[piece.key][1], piece.local) for piece in pieces), (
        "the loaded state differs from the written one"
    )
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
        "step": steps_while_saving(directory, host, runs),
    }


def steps_while_saving(directory: Path, host: HostCopy, runs: int) -> dict[str, Any]:
    """Seconds of a training step of about 0.1 s, without saving and while a thread writes a checkpoint, in turn."""
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(12)))
    optimizer, batch = torch.optim.AdamW(model.parameters(), fused=True), torch.randn(512, 512)

    def step() -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    alone, saving = [], []
    for number in range(runs):
        alone += [seconds(step) for _ in range(10)]
        path = directory / f"checkpoint-{number}"
        thread = threading.Thread(target=write_shard, args=(path, host.slices))
        thread.start()
        while thread.is_alive():
            saving.append(seconds(step))
        thread.join()
        path.unlink()
    return {"alone": spread(alone), "while_saving": spread(saving)}


def main(arguments: list[str]) -> int:
    p = parser("checkpoint", __doc__)
    p.add_argument("--megabytes", type=int, default=500)
    p.add_argument("--runs", type=int, default=7)
    p.add_argument("--directory", default=".", help="on the disk to measure")
    p.add_argument("--out", help="result file; default: rmcore/bench/results/checkpoint.json")
    options = p.parse_args(arguments)
    torch.set_num_threads(1)
    clock = Clock()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        result = measure(Path(directory), options.megabytes, options.runs)
    result["others_share"] = add_up([clock.lap()])["others_share"]  # dd counts as another process
    path = write_results("checkpoint", {"machine": machine(), **result}, options.out)
    for name, value in result["seconds"].items():
        rate = result["bytes"] / 1e6 / value["median"]
        print(f"{name:<16} {value['median']:.3f} s ({value['least']:.3f} to {value['most']:.3f}), {rate:,.0f} MB/s")
    for name in ("write_speed_over_dd", "load_speed_over_dd"):
        print(f"{name:<20} {result[name]['median']:.2f} ({result[name]['least']:.2f} to {result[name]['most']:.2f})")
    step = result["step"]
    print(f"step {step['alone']['median']:.4f} s, {step['while_saving']['median']:.4f} s while saving")
    print(f"peak extra memory, bytes: {result['peak_extra_bytes']}\nwritten: {path}")
    return 0
