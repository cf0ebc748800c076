"""AdamW on what a rank holds of DTensors equals PyTorch's own on DTensors, bit for bit; it clips as PyTorch does."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rmcore.parallel.adamw import AdamW
from rmcore.parallel.optim import LocalAdamW
from rmcore.parallel.strategy import clip_in_update, local
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


@pytest.mark.parametrize("kind", ["sharded", "whole", "own"])
def test_the_update_clips_as_torch_does(kind: str) -> None:
    """Against clip_grads_with_norm_ and AdamW in fp64. A norm below the limit gives the bits of no clipping."""

    def trained(max_norm: float, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(33, 17), nn.Linear(17, 5)).to(dtype)
        if kind == "sharded" and dtype == torch.float32:
            fully_shard(model, mesh=device_mesh(world))
        parameters, settings = list(model.parameters()), {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-3}
        if dtype == torch.float64:
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, **settings)
        elif kind == "own":
            optimizer = AdamW([{"params": parameters}], names=names(model), states="fp32", seed=0, **settings)
        else:
            of = LocalAdamW if kind == "sharded" else torch.optim.AdamW
            optimizer = of(parameters, weight_decay=0.0, fused=True, **settings)
        for _ in range(3):
            model(torch.randn(7, 33).to(dtype)).square().sum().backward()
            gradients = [local(p.grad) for p in parameters]  # type: ignore[arg-type]
            norm = torch.nn.utils.get_total_norm(gradients)
            if dtype == torch.float64 and max_norm:
                nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
            else:
                clip_in_update(optimizer, max_norm, norm)
            optimizer.step()
            optimizer.zero_grad()
        return [local(p.detach()) for p in parameters]

    with running_world(60) as world:
        free = trained(0.0)
        for max_norm in (0.1, 1.0, 1e6):
            found, truth = trained(max_norm), trained(max_norm, torch.float64)
            for one, other, unclipped in zip(found, truth, free, strict=True):
                torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
                assert torch.equal(one, unclipped) == (max_norm == 1e6)


def names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}
