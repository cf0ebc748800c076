"""Real ranks for tests: processes that meet through a file, run one function each, and return JSON.

Example: `run_ranks(function, 2, tmp_path)[1].value` is what rank 1 returned.

A fork server imports rmcore once; a rank is a fork of it, so it starts in milliseconds.
"""

import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class RankResult:
    """The end of one rank: its exit code, what its function returned (None if it did not), its traceback."""

    exit_code: int | None
    value: Any
    trouble: str


def run_ranks(
    function: Callable[..., Any],
    size: int,
    folder: Path,
    *arguments: Any,
    hosts: int = 1,
    timeout: float = 120.0,
    check: bool = True,
) -> list[RankResult]:
    """Start `size` processes that each call `function(rendezvous, *arguments)`; results by rank.

    Their environment describes `hosts` hosts with equally many ranks on each.

    `function` is defined at the top of a test module and passes `rendezvous` to `start_world(init_method=...)`; the
    ranks come from the environment, as torchrun sets it. Its return value must be JSON. With `check` every rank must
    exit with 0. A rank that is still there after `timeout` seconds is killed and fails the test.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rendezvous = f"file://{folder / 'rendezvous'}"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rmcore.train"])
    processes = [
        context.Process(target=_one_rank, args=(function, rank, size, size // hosts, rendezvous, folder, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not hanging, f"ranks {hanging} of {size} were still running after {timeout} s"
    results = [_read(folder, rank, process.exitcode) for rank, process in enumerate(processes)]
    if check:
        for rank, result in enumerate(results):
            assert result.exit_code == 0, f"rank {rank} of {size} ended with {result.exit_code}:\n{result.trouble}"
    return results


def train_rank(rendezvous: str, arguments: list[str]) -> None:
    """A whole training run on this rank; the arguments are those of the command line."""
    import torch

    from rmcore.config import config_from_argv
    from rmcore.parallel.world import running_world
    from rmcore.train import attempt
    from rmcore.training.signals import Signals

    torch.set_num_threads(1)
    config = config_from_argv(arguments, "rmcore.train")
    with running_world(120.0, config.run.seed, init_method=rendezvous) as world:
        attempt(config, world, Signals())


def _one_rank(
    function: Callable[..., Any],
    rank: int,
    size: int,
    local_size: int,
    rendezvous: str,
    folder: Path,
    arguments: tuple[Any, ...],
) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo on the CPU, also on a machine with fewer GPUs than ranks
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(LOCAL_RANK=str(rank % local_size), LOCAL_WORLD_SIZE=str(local_size))
    try:
        value = function(rendezvous, *arguments)
        (folder / f"value-{rank}.json").write_text(json.dumps(value))
    except BaseException:
        (folder / f"trouble-{rank}.txt").write_text(traceback.format_exc())
        sys.exit(1)


def _read(folder: Path, rank: int, exit_code: int | None) -> RankResult:
    value, trouble = folder / f"value-{rank}.json", folder / f"trouble-{rank}.txt"
    return RankResult(
        exit_code,
        json.loads(value.read_text()) if value.exists() else None,
        trouble.read_text() if trouble.exists() else "",
    )
