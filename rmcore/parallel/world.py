"""Starts and stops the process group, and provides the few collectives that the rest of rmcore needs.

Input: torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE). Without it: one process.
Output: a `World`, a running `torch.distributed` group (also for one process, so that every strategy works the same),
seeded random generators, and functions that send tensors and JSON, never pickles.
Example: `torchrun --nproc_per_node 2` on a machine without GPUs gives rank 1 `World(rank=1, size=2, local_rank=1,
local_size=2, device=cpu)`; with seed 7 its generators start from 7 + 1 = 8.

Communication: one group, in which NCCL carries CUDA tensors and gloo carries CPU tensors. JSON travels as uint8 tensors
on the CPU: first the lengths, then the bytes, padded to the longest.
"""

from __future__ import annotations

import json
import os
import random
import threading
import traceback
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rmcore.config import UserError
from rmcore.host.command import ExplainedError
from rmcore.parallel.rendezvous import fresh_store

T = TypeVar("T")
LEAVING, SAVING = "rmcore-leave", "rmcore-saver"  # names of threads that may wait for unreachable ranks
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # the old name works in every version
LEAVE_SECONDS = 5.0  # longest wait for a failed group to close; a longer one would only delay the end of the job


@dataclass(frozen=True)
class World:
    """This process: `rank` of `size` processes, `local_rank` of `local_size` on this host, and its device.

    `context` neighboring ranks form a group that computes the same packed rows together; see rmcore.parallel.context.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    timeout_seconds: float = 600.0  # of a collective
    context: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    @property
    def groups(self) -> int:
        """How many groups of ranks compute different rows; without `parallel.context` each rank is one."""
        return self.size // self.context

    @property
    def group(self) -> int:
        """The number of this rank's group: which rows of the plan it computes."""
        return self.rank // self.context

    @property
    def leads_group(self) -> bool:
        """Whether this rank counts what its group computes: all of its ranks have the same rewards."""
        return self.rank % self.context == 0

    @property
    def reads_wait(self) -> bool:
        """Whether reading a value from the device makes the host wait until the device has computed it (a GPU)."""
        return self.device.type != "cpu"


class RankError(ExplainedError):
    """A failure on some rank, raised on every rank so that all stop together."""


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch, including those of every CUDA device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def start_world(timeout_seconds: float = 600.0, seed: int | None = None, *, init_method: str | None = None) -> World:
    """Join the process group that torchrun's environment describes; without it, make a group of one.

    Args:
        timeout_seconds: how long a collective may wait for the other ranks before it fails.
        seed: the run's seed; this process's generators get `seed + rank`.
        init_method: a rendezvous instead of torchrun's (`file:///path` in tests); ranks come from the environment.
    Raises:
        UserError: more processes on this host than GPUs; two with the same GPU; a variable that is missing, not a
            number, or out of range.
    """
    rank, size = environment_number("RANK", 0), environment_number("WORLD_SIZE", 1)
    local_rank, local_size = environment_number("LOCAL_RANK", 0), environment_number("LOCAL_WORLD_SIZE", 1)
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise UserError(
            f"the environment says RANK={rank} of WORLD_SIZE={size}, LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE="
            f"{local_size}, which cannot be; start rmcore with torchrun, or unset these variables to run one process"
        )
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and missing and init_method is None:
        raise UserError(
            f"the environment says WORLD_SIZE={size}, but not {', '.join(missing)}, so the processes cannot meet; "
            "start rmcore with torchrun, or unset WORLD_SIZE to run one process"
        )
    device = _device(local_rank, local_size)
    timeout = timedelta(seconds=timeout_seconds)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    if size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        store = None if init_method else fresh_store(rank, size, timeout)
        if store is not None:
            _claim_gpu(store, rank, local_size, device)
        dist.init_process_group(
            backend,
            init_method=init_method,
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device_id,
        )
    if seed is not None:
        seed_everything(seed + rank)
    return World(rank, size, local_rank, local_size, device, timeout_seconds)


def stop_world(world: World, *, failed: bool = False) -> None:
    """Leave the process group; call it on every path, before the interpreter exits.

    After success all ranks wait for each other first, so that none closes its connections while another one still reads
    from them. After a failure (`failed=True`) this rank abandons what is in flight and leaves without waiting.
    """
    if not dist.is_initialized():
        return
    if failed:
        _leave_alone()
        return
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    barrier(world)
    dist.destroy_process_group()


@contextmanager
def running_world(
    timeout_seconds: float = 600.0, seed: int | None = None, *, init_method: str | None = None
) -> Iterator[World]:
    """`start_world` on entry, `stop_world` on every exit."""
    world = start_world(timeout_seconds, seed, init_method=init_method)
    try:
        yield world
    except BaseException:
        stop_world(world, failed=True)
        raise
    stop_world(world)


def device_mesh(world: World, *, by_host: bool = False) -> DeviceMesh:
    """All ranks as a mesh of the dimension `shard`; `by_host`: of `replicate` (hosts) and `shard` (ranks of a host).

    A collective. Raises UserError if `by_host` and the hosts do not run equal numbers of processes.
    """
    kind = world.device.type
    if not by_host:
        return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
    sizes = sorted(set(all_gather_json(world, world.local_size)))
    if len(sizes) > 1 or world.size % sizes[0]:
        raise UserError(
            f"parallel.strategy=hsdp: {world.size} processes on hosts of {' and '.join(map(str, sizes))}; "
            "start the same number on every host"
        )
    ranks = torch.arange(world.size).view(-1, world.local_size)
    # Groups that the mesh makes itself would wait half an hour for a dead rank, whatever the timeout of the main group.
    timeout = timedelta(seconds=world.timeout_seconds)
    groups = [dist.new_subgroups_by_enumeration(dim.tolist(), timeout=timeout)[0] for dim in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, kind, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def barrier(world: World) -> None:
    """Wait until every rank calls this (a gloo reduction of one number; it does not wait for the GPUs)."""
    all_reduce_sum(world, torch.zeros(1))


def all_reduce_sum(world: World, tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks, in place, and return it. It is on the CPU or on `world.device`, of one shape."""
    if world.size > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def second_group(timeout_seconds: float) -> dist.ProcessGroup:
    """A gloo group of all ranks for another thread, whose collectives must not mix with those of the main thread."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))


def any_rank_max(world: World, values: list[int]) -> list[int]:
    """The maximum of each value over all ranks: a gloo reduction of a few host numbers, without a wait for the GPUs."""
    if world.size == 1:
        return values
    largest = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


def broadcast_json(world: World, value: Any, src: int = 0) -> Any:
    """Rank `src`'s `value` (anything that JSON can hold) on every rank. The `value` of other ranks is ignored."""
    data = _encode(value) if world.rank == src else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([data.numel()])
    dist.broadcast(length, src)
    if world.rank != src:
        data = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, src)
    return _decode(data)


def all_gather_json(world: World, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The `value` of every rank (anything that JSON can hold), ordered by rank, on every rank."""
    data = _encode(value)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world.size)]
    dist.all_gather(lengths, torch.tensor([data.numel()]), group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: data.numel()] = data
    gathered = [torch.empty(longest, dtype=torch.uint8) for _ in range(world.size)]
    dist.all_gather(gathered, padded, group=group)
    return [_decode(part[: int(length)]) for part, length in zip(gathered, lengths, strict=True)]


def first_error(world: World, what: str, action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `action` on every rank. If it fails on any rank, raise the same error on all ranks.

    Args:
        what: the action, for the message, e.g. "reading the data".
        group: a group of all ranks, if not the default one.
    Raises:
        UserError: the first failing rank raised UserError.
        RankError: it raised another ExplainedError, whose message is kept; or anything else: the message has its rank
            and traceback.
    """
    result: list[T] = []
    failure = None
    cause = None
    try:
        result.append(action())
    except Exception as error:
        cause = error
        failure = {
            "refused": isinstance(error, UserError),
            "complete": isinstance(error, ExplainedError),
            "message": str(error),
            "traceback": traceback.format_exc(),
        }
    failures = {rank: found for rank, found in enumerate(all_gather_json(world, failure, group)) if found}
    if not failures:
        return result[0]
    rank, first = next(iter(failures.items()))
    if first["refused"]:
        everywhere = len(failures) == world.size and all(f["message"] == first["message"] for f in failures.values())
        raise UserError(first["message"] if everywhere else f"rank {rank}: {first['message']}") from cause
    if first["complete"]:
        raise RankError(first["message"]) from cause
    others = [str(other) for other in failures if other != rank]
    also = f" (also on {', '.join(others)})" if others else ""
    raise RankError(f"{what} failed on rank {rank} of {world.size}{also}:\n{first['traceback']}") from cause


def environment_number(name: str, default: int) -> int:
    """A whole number from the environment. Raises UserError if the variable holds something else."""
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise UserError(f"environment variable {name} must be a whole number, not {text!r}") from None


def _device(local_rank: int, local_size: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    use_expandable_segments(os.environ)
    gpus = torch.cuda.device_count()
    # Slurm's --gpus-per-task=1 shows each process one GPU, its own, as number 0; `_claim_gpu` checks that it is.
    if local_size > gpus != 1:
        raise UserError(
            f"{local_size} processes on this host and {gpus} visible GPU(s): start torchrun with "
            f"--nproc_per_node {gpus}, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to run on the CPU"
        )
    device = torch.device("cuda", 0 if gpus == 1 else local_rank)
    torch.cuda.set_device(device)
    return device


def _claim_gpu(store: dist.Store, rank: int, local_size: int, device: torch.device) -> None:
    """Put this rank's GPU into the store. Raises UserError if another rank uses the same one."""
    if device.type != "cuda" or local_size == 1:
        return
    gpu = torch.cuda.get_device_properties(device).uuid
    owner = store.compare_set(f"rmcore/gpu/{gpu}", "", str(rank)).decode()
    if owner != str(rank):
        raise UserError(
            f"ranks {owner} and {rank} see one and the same GPU, and {local_size} processes run on this host: start as "
            "many as it has GPUs, and show each process all of them or one of its own; or hide the GPUs "
            "(CUDA_VISIBLE_DEVICES=) to run on the CPU"
        )


def use_deterministic_algorithms(world: World) -> None:
    """From now on a step on a GPU repeats bit for bit; PyTorch raises for an operation that has no such algorithm."""
    if world.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first product
        torch.use_deterministic_algorithms(True)
        # rmcore reads no memory that it did not write. (The attribute is one of a module that torch makes at run time.)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def use_expandable_segments(environment: MutableMapping[str, str]) -> None:
    """Let PyTorch's allocator grow its segments, unless the environment sets the allocator up in another way.

    Every micro batch has other lengths, so that blocks of fixed segments rarely fit again. PyTorch reads the variable
    at its first allocation on a GPU.
    """
    if not any(name in environment for name in ALLOCATOR):
        environment[ALLOCATOR[0]] = "expandable_segments:True"


def _encode(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(data: torch.Tensor) -> Any:
    return json.loads(bytes(data.numpy()))


def _leave_alone() -> None:
    """Destroy the group without the other ranks, in at most LEAVE_SECONDS.

    NCCL can be aborted. Gloo cannot: it waits for what is in flight, until a peer closes its end or the collective
    times out. A daemon thread does this waiting, so that this process can end earlier, even if the abort hangs. Its
    peers then see the connection close.
    """

    def leave() -> None:
        group = dist.group.WORLD
        if group is not None and "nccl" in dist.get_backend_config(group):
            group.abort()
        del group
        dist.destroy_process_group()

    leaving = threading.Thread(target=leave, name=LEAVING, daemon=True)
    leaving.start()
    leaving.join(LEAVE_SECONDS)
