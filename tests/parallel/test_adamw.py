"""rmcore's AdamW: torch's own in fp32; unbiased in bf16; in 8 bits what bitsandbytes quantises; nothing by halves."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rmcore.config import UserError
from rmcore.ops.blockwise import check_bitsandbytes
from rmcore.parallel import adamw
from rmcore.parallel.adamw import AVERAGES, BLOCK, AdamW, is_quantised
from rmcore.parallel.strategy import local
from rmcore.parallel.world import device_mesh, running_world
from tests.harness.configs import NEEDED, mistakes
from tests.harness.ranks import run_ranks

SHAPES = {"matrix": (40, 300), "aligned": (9, 512), "vector": (70,), "narrow": (600, 20), "experts": (3, 5, 256)}
SETTINGS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6}


def weights(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in SHAPES.items():
        found[name] = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        found[name].grad_dtype = torch.float32
    return found


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in SHAPES.items()}


def made(parameters: dict[str, nn.Parameter], states: str, seed: int = 1) -> AdamW:
    groups = [{"params": list(parameters.values()), "weight_decay": 0.1}]
    return AdamW(groups, names={p: name for name, p in parameters.items()}, states=states, seed=seed, **SETTINGS)


def walk(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for step in range(steps):
        for name, gradient in gradients(step).items():
            parameters[name].grad = gradient
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        optimizer.step()


def expected(steps: int = 4) -> dict[str, nn.Parameter]:
    """torch's AdamW in fp64."""
    parameters = {name: nn.Parameter(p.detach().double()) for name, p in weights().items()}
    optimizer = torch.optim.AdamW(list(parameters.values()), weight_decay=0.1, **SETTINGS)
    for step in range(steps):
        for name, gradient in gradients(step).items():
            parameters[name].grad = gradient.double()
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        optimizer.step()
    return parameters


def test_fp32_is_torchs_adamw() -> None:
    parameters = weights()
    walk(parameters, made(parameters, "fp32"))
    for name, truth in expected().items():
        torch.testing.assert_close(parameters[name].double(), truth, rtol=1e-6, atol=1e-6)


def test_bf16_weights_follow_in_the_mean() -> None:
    """Each of 4 updates adds an independent error of variance u^2 / 4 at most, u a step of bf16: together u^2. The mean
    of N of them is below 5 deviations / sqrt(N), which is 0.04 u. The spread shows that they are rounded at all."""
    parameters, reference = weights(torch.bfloat16), weights(torch.bfloat16)
    for parameter in reference.values():
        parameter.data = parameter.data.float()
    walk(parameters, made(parameters, "fp32"))
    walk(reference, made(reference, "fp32"))
    errors = []
    for name, parameter in parameters.items():
        truth = reference[name].detach().double()
        errors.append(((parameter.double() - truth) / 2.0 ** (truth.abs().log2().floor() - 7)).flatten())
    # Near a power of two the steps on both sides differ by a factor of 2; weights that crossed zero have many steps.
    kept = torch.cat(errors).detach()
    kept = kept[kept.abs() < 6.0]
    assert len(kept) > 20_000 and abs(float(kept.mean())) < 5.0 * float(kept.std()) / len(kept) ** 0.5
    assert 0.3 < float(kept.std()) < 1.5


@pytest.mark.parametrize("states", ["fp32", "bf16", "int8"])
def test_results_do_not_depend_on_how_tensors_are_cut(states: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if states == "int8":
        pytest.importorskip("bitsandbytes")
    found = []
    for chunk in (1, 700, 1 << 20):
        monkeypatch.setitem(adamw.CHUNK, "cpu", chunk)
        parameters = weights(torch.bfloat16)
        optimizer = made(parameters, states)
        walk(parameters, optimizer, 2)
        parts = [state[key] for state in optimizer.state.values() for key in sorted(state)]
        found.append([*parameters.values(), *parts])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_8_bits_are_the_blocks_of_each_row_as_bitsandbytes_quantises_them() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    parameters = weights()
    optimizer = made(parameters, "int8")
    walk(parameters, optimizer, 1)
    quantised = {name for name, p in parameters.items() if "exp_avg_scale" in optimizer.state[p]}
    assert quantised == {"matrix", "aligned"} == {name for name, p in parameters.items() if is_quantised(p)}
    for name in quantised:
        state = optimizer.state[parameters[name]]
        for average, value in (("exp_avg", 0.2 * gradients(0)[name]), ("exp_avg_sq", 0.05 * gradients(0)[name] ** 2)):
            table = functional.create_dynamic_map(signed=average == "exp_avg")
            for row, numbers in enumerate(value):
                for block, part in enumerate(numbers.split(BLOCK)):
                    scale = state[f"{average}_scale"][row, block]
                    torch.testing.assert_close(scale, part.abs().max(), rtol=1e-6, atol=0.0)
                    codes = state[average][row, block * BLOCK : (block + 1) * BLOCK]
                    nearest = (part[:, None] / scale - table).abs().amin(1)
                    error = (part / scale - table[codes.long()]).abs()
                    # On a CPU bitsandbytes looks codes up in a table of 2^16 cells of -1 to 1.
                    assert bool((error <= nearest + 2.0**-15).all())
    for name, truth in expected(1).items():
        torch.testing.assert_close(parameters[name].double(), truth, rtol=1e-6, atol=1e-6)  # averages exact before


@pytest.mark.parametrize("states", ["fp32", "bf16", "int8"])
def test_a_bad_step_changes_nothing(states: str) -> None:
    if states == "int8":
        pytest.importorskip("bitsandbytes")
    parameters = weights(torch.bfloat16)
    optimizer = made(parameters, states)
    walk(parameters, optimizer, 2)

    def everything() -> list[Tensor]:
        parts = [state[key] for state in optimizer.state.values() for key in sorted(state)]
        return [tensor.detach().clone() for tensor in [*parameters.values(), *parts]]

    before = everything()
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, torch.nan, dtype=torch.float32)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    # On a GPU the host does not look: the kernels leave everything as it is.
    for parameter in parameters.values():
        optimizer._update(parameter, optimizer.param_groups[0], torch.tensor(5, dtype=torch.int32), torch.tensor(True))
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    optimizer.found_inf = torch.tensor(0.0)
    walk(parameters, optimizer, 1)
    assert not torch.equal(before[0], parameters["matrix"])


def test_the_same_seed_repeats_a_walk_and_another_one_does_not() -> None:
    found = []
    for seed in (1, 1, 2):
        parameters = weights(torch.bfloat16)
        walk(parameters, made(parameters, "bf16", seed), 2)
        found.append(parameters["matrix"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def differing(rendezvous: str) -> list[str]:
    """The tensors whose rows on this rank are not those of the whole tensors, after two updates."""
    with running_world(60, init_method=rendezvous) as world:
        mesh = device_mesh(world)

        def part(whole: Tensor) -> DTensor:
            return distribute_tensor(whole.detach(), mesh, [Shard(0)])

        whole = weights(torch.bfloat16)
        parts = {name: nn.Parameter(part(p)) for name, p in whole.items()}
        optimizers = made(whole, "bf16"), made(parts, "bf16")
        for step in range(2):
            for name, gradient in gradients(step).items():
                parts[name].grad_dtype = torch.float32
                whole[name].grad, parts[name].grad = gradient, part(gradient)
            for optimizer in optimizers:
                optimizer.step()
        different = []
        for name, parameter in parts.items():
            states = optimizers[0].state[whole[name]], optimizers[1].state[parameter]
            pairs = [(whole[name], parameter), *((states[0][key], states[1][key]) for key in AVERAGES)]
            if not all(torch.equal(local(part(one)), local(other)) for one, other in pairs):
                different.append(name)
        return different


@pytest.mark.distributed
def test_the_rows_of_a_rank_are_rounded_as_those_of_the_whole_tensor(tmp_path: Path) -> None:
    for result in run_ranks(differing, 2, tmp_path):
        assert result.value == []


@pytest.mark.parametrize(
    "more, shown",
    [
        (["model.weights=bf16", "parallel.precision=fp32"], "model.weights is bf16, which needs parallel.precision"),
        (["model.weights=bf16", "parallel.fp8=true"], "model.weights of bf16 and parallel.fp8 exclude each other"),
    ],
)
def test_what_bf16_weights_do_not_go_with(tmp_path: Path, more: list[str], shown: str) -> None:
    assert shown in "\n".join(mistakes(tmp_path, None, [*NEEDED, *more]))


def test_int8_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmcore.ops.blockwise.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"optim.states=int8 needs bitsandbytes.*pip install 'rmcore\[bitsandbytes\]'"):
        check_bitsandbytes("optim.states=int8")
