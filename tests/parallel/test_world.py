"""The process group and its collectives, on real gloo ranks."""

import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import rmcore.parallel.world as world_module
from rmcore.config import UserError
from rmcore.host.command import ExplainedError
from rmcore.parallel.world import (
    RankError,
    World,
    all_gather_json,
    all_reduce_sum,
    broadcast_json,
    device_mesh,
    first_error,
    running_world,
    start_world,
    stop_world,
    use_expandable_segments,
)
from tests.harness.ranks import run_ranks

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _refuse(message: str) -> None:
    raise UserError(message)


def _explain(message: str) -> None:
    raise ExplainedError(message)


def _raised(world: Any, action: Any) -> list[str]:
    try:
        first_error(world, "looking", action)
    except (UserError, RankError) as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def use_everything(rendezvous: str) -> dict[str, Any]:
    with running_world(30, seed=7, init_method=rendezvous) as world:
        mine = {"rank": world.rank, "text": "\u00e9\u4e2d" * world.rank, "nothing": None}
        return {
            "place": [world.rank, world.size, world.local_rank, world.local_size, str(world.device), world.is_main],
            "gathered": all_gather_json(world, mine),
            "from_one": broadcast_json(world, mine, src=1),
            "sum": all_reduce_sum(world, torch.tensor([1.0, 10.0], dtype=torch.float64) * (world.rank + 1)).tolist(),
            "seed": torch.initial_seed(),
            "draws": [random.random(), float(np.random.rand()), float(torch.rand(()))],
            "fine": first_error(world, "looking", lambda: world.rank * 2),
            "one_fails": _raised(world, lambda: 1 // (world.rank - 1)),
            "one_explains": _raised(world, lambda: _explain("no room") if world.rank == 1 else None),
            "all_refuse": _raised(world, lambda: _refuse("no such file")),
            "one_refuses": _raised(world, lambda: _refuse("bad row") if world.rank == 2 else None),
            "hosts": list(device_mesh(world).shape),
            "left": dist.is_initialized(),
        }


@pytest.mark.distributed
def test_the_helpers_on_three_ranks(tmp_path: Path) -> None:
    values = [result.value for result in run_ranks(use_everything, 3, tmp_path)]
    for rank, value in enumerate(values):
        assert value["place"] == [rank, 3, rank, 3, "cpu", rank == 0]
        assert [one["rank"] for one in value["gathered"]] == [0, 1, 2]
        assert value["gathered"][2]["text"] == "\u00e9\u4e2d\u00e9\u4e2d"  # longer than the others': nothing is cut
        assert value["from_one"] == value["gathered"][1]
        assert value["sum"] == [6.0, 60.0]
        assert value["seed"] == 7 + rank
        assert value["fine"] == rank * 2
        assert value["one_explains"] == ["RankError", "no room"]
        assert value["hosts"] == [3]
        # The same error on every rank, with the number of the rank that failed.
        assert value["one_fails"] == values[0]["one_fails"]
        kind, message = value["one_fails"]
        assert kind == "RankError" and "looking failed on rank 1 of 3" in message and "ZeroDivisionError" in message
        assert value["all_refuse"] == ["UserError", "no such file"]
        assert value["one_refuses"] == ["UserError", "rank 2: bad row"]
    assert all(len({value["draws"][place] for value in values}) == 3 for place in range(3)), "streams are seed + rank"


def fail_while_a_reduction_is_in_flight(rendezvous: str) -> None:
    with running_world(300, init_method=rendezvous) as world:
        if world.rank == 1:
            dist.all_reduce(torch.zeros(5), async_op=True)
            raise ValueError("rank 1 has had enough")
        all_reduce_sum(world, torch.zeros(5))
        while True:  # rank 1 is gone: one of these must fail, long before the 300 s
            all_reduce_sum(world, torch.zeros(5))


@pytest.mark.distributed
def test_a_failing_rank_takes_the_others_with_it_soon(tmp_path: Path) -> None:
    """No rank waits for the collective's timeout, and none dies of a signal (gloo may abort on teardown)."""
    results = run_ranks(fail_while_a_reduction_is_in_flight, 2, tmp_path, timeout=90, check=False)
    assert [result.exit_code for result in results] == [1, 1]
    assert "rank 1 has had enough" in results[1].trouble


def test_one_process_is_a_group_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with running_world(30, seed=3) as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert dist.is_initialized() and dist.get_world_size() == 1
        assert all_gather_json(world, [1]) == [[1]] == [broadcast_json(world, [1])]
        assert device_mesh(world, by_host=True).mesh_dim_names == ("replicate", "shard")
        with pytest.raises(RankError, match=r"adding failed on rank 0 of 1"):
            first_error(world, "adding", lambda: 1 // 0)
    assert not dist.is_initialized()


def test_an_exception_leaves_no_group_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(KeyError), running_world(30):
        raise KeyError
    assert not dist.is_initialized()
    stop_world(start_world(30))  # and the next one starts
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 of WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8, but not RANK, MASTER_ADDR, MASTER_PORT, so the processes cannot meet"),
        ({"WORLD_SIZE": "8", "RANK": "1"}, "not MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_an_impossible_environment_is_refused(
    environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        start_world(30)
    assert not dist.is_initialized()


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int, uuid: str = "a") -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")


def test_a_process_that_sees_one_gpu_uses_it_unless_another_rank_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under Slurm each of 4 tasks of a host may see one GPU of its own; without isolation all see the same one."""
    store = dist.HashStore()
    for rank, uuid in enumerate("abcd"):
        with_gpus(monkeypatch, 1, uuid)
        device = world_module._device(rank, 4)
        assert device == torch.device("cuda", 0)
        world_module._claim_gpu(store, rank, 4, device)
        world_module._claim_gpu(store, rank, 4, device)  # the own claim is no obstacle
    with_gpus(monkeypatch, 1, "b")
    with pytest.raises(UserError, match="ranks 1 and 5 see one and the same GPU, and 4 processes"):
        world_module._claim_gpu(store, 5, 4, torch.device("cuda", 0))
    with_gpus(monkeypatch, 4)
    assert [world_module._device(rank, 4).index for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="5 processes on this host and 4 visible GPU"):
        world_module._device(4, 5)


def test_deterministic_algorithms_are_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        for device, expected in (("cpu", False), ("cuda", True)):
            world_module.use_deterministic_algorithms(World(0, 1, 0, 1, torch.device(device)))
            assert torch.are_deterministic_algorithms_enabled() == expected
            assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == expected
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_segments_of_gpu_memory_grow_unless_the_user_chose_otherwise(name):
    empty, chosen = {}, {name: "max_split_size_mb:64"}
    for environment in (empty, chosen):
        use_expandable_segments(environment)
    assert empty == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert chosen == {name: "max_split_size_mb:64"}
