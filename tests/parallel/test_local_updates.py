"""AdamW and clipping on what a rank holds of DTensors equal PyTorch's own on DTensors, bit for bit."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rmcore.parallel.optim import LocalAdamW
from rmcore.parallel.strategy import clip_local_gradients, local
from rmcore.parallel.world import device_mesh, running_world


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_of_local_tensors_are_those_of_dtensors(weight_decay: float) -> None:
    def trained(ours: bool) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(33, 17), nn.Linear(17, 5))
        fully_shard(model, mesh=mesh)
        parameters = list(model.parameters())
        kind = LocalAdamW if ours else torch.optim.AdamW
        optimizer = kind(parameters, lr=1e-2, fused=True, weight_decay=weight_decay)
        for step in range(4):
            model(torch.randn(7, 33)).square().sum().backward()
            optimizer.found_inf = torch.tensor(float(step == 2))  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad()
        return parameters, optimizer

    with running_world(60) as world:
        mesh = device_mesh(world)
        (theirs, expected), (mine, found) = trained(False), trained(True)
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(local(one), local(other))
            for name, value in expected.state[other].items():
                assert torch.equal(local(found.state[one][name]), local(value))
            assert isinstance(found.state[one]["exp_avg"], DTensor) and float(found.state[one]["step"]) == 3


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clipped_local_gradients_are_those_of_dtensors(max_norm: float) -> None:
    with running_world(60) as world:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(33, 17), nn.Linear(17, 5))
        fully_shard(model, mesh=device_mesh(world))
        model(torch.randn(7, 33)).square().sum().backward()
        parameters, norm = list(model.parameters()), torch.tensor(3.7)
        before = [local(p.grad).clone() for p in parameters]  # type: ignore[arg-type]
        clip_local_gradients(parameters, max_norm, norm)
        ours = [local(p.grad).clone() for p in parameters]  # type: ignore[arg-type]
        for parameter, gradient in zip(parameters, before, strict=True):
            local(parameter.grad).copy_(gradient)  # type: ignore[arg-type]
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        assert all(torch.equal(a, local(p.grad)) for a, p in zip(ours, parameters, strict=True))  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True)) == (max_norm > 3.7)
