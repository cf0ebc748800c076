"""Stochastic rounding to bf16: only neighbours, no bias, and draws by seed, name, update and place alone."""

import pytest
import torch
from torch import Tensor

from rmcore.parallel import stochastic
from rmcore.parallel.stochastic import draws, key_of, round_to_bf16, update_key

CPU = torch.device("cpu")
SIGMAS = 5.0  # of a mean of independent draws: one test in two million would fail by chance


def draws_of(seed: int, name: str, update: float, start: int, count: int) -> Tensor:
    """The 16 bits of each element, 0 to 65,535."""
    return draws(key_of(seed, name), update_key(torch.tensor(update)), start, count, CPU) & 0xFFFF


def rounded(values: Tensor, update: float, start: int = 0) -> Tensor:
    return round_to_bf16(values, key_of(1, "w"), update_key(torch.tensor(update)), start)


def test_the_result_is_one_of_the_two_neighbours_and_the_mean_is_the_value() -> None:
    """A draw is off by at most one step u of bf16, with variance u^2 p (1 - p); N draws are off by SIGMAS u / 2 sqrt(N)
    at most, and by no more than the 2^-16 u that a draw of 16 bits resolves."""
    values = torch.tensor([1.0 + 2.0**-12, -3.3333333, 1e-3, 6.5e4, -7.7e-39, 0.1])
    below = (values.view(torch.int32) & -0x10000).view(torch.float32)  # toward zero
    above = ((values.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    count = 200_000
    of_places = rounded(values.repeat_interleave(count), 1.0).view(len(values), count)
    updates = torch.stack([rounded(values.repeat(16), float(n)).view(16, -1) for n in range(2000)], 1).flatten(0, 1)
    for found in (of_places.T, updates):
        assert bool(((found.float() == below) | (found.float() == above)).all())
        up = (found.float() == above).double().mean(0)
        share = (values.double() - below.double()) / (above.double() - below.double())
        assert bool(((up - share).abs() < SIGMAS * 0.5 / len(found) ** 0.5 + 2.0**-16).all()), (up, share)


def test_what_bf16_can_hold_stays_as_it_is() -> None:
    exact = torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact[:6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3.3895e38, 1e-40])
    assert torch.equal(rounded(exact.float(), 1.0).view(torch.int16), exact.view(torch.int16))
    assert bool(rounded(torch.tensor([torch.nan]), 1.0).isnan())


def test_small_updates_add_up() -> None:
    """1 + 4096 * 2^-12 = 2. Rounded to the nearest it stays 1; a sum of 4096 draws is off by 5 * 64 * 2^-7 / 2 = 1.25
    for one element, and by 1.25 / 64 in the mean of 4096 elements."""
    weight = torch.ones(4096, dtype=torch.bfloat16)
    nearest = weight.clone()
    for update in range(4096):
        weight = rounded(weight.float() + 2.0**-12, float(update))
        nearest = (nearest.float() + 2.0**-12).bfloat16()
    assert bool((nearest == 1.0).all())
    assert abs(float(weight.float().mean()) - 2.0) < 1.25 / 64


@pytest.mark.parametrize("start, count", [(0, 7), (1, 7), (4, 0), (999, 2), (0, 1000)])
def test_a_part_has_the_draws_of_its_place(start: int, count: int) -> None:
    assert torch.equal(draws_of(1, "w", 3.0, start, count), draws_of(1, "w", 3.0, 0, 1001)[start : start + count])


def test_beyond_the_period_of_the_counter_the_draws_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    far = 2 * stochastic.PERIOD
    across = draws_of(1, "w", 3.0, far - 5, 12)
    parts = [draws_of(1, "w", 3.0, far - 5, 5), draws_of(1, "w", 3.0, far, 7)]
    assert torch.equal(across, torch.cat(parts))
    assert not torch.equal(parts[1], draws_of(1, "w", 3.0, 0, 7)), "it does not begin anew"


def test_draws_are_uniform_and_independent() -> None:
    """Uniform: the 16 counts of the upper 4 bits, by chi-squared (15 degrees of freedom: mean 15, deviation 5.5).
    Independent: the correlation of N pairs is below SIGMAS / sqrt(N)."""
    count = 1 << 16
    first = draws_of(1, "w", 1.0, 0, count).double()
    counts = torch.bincount((first / 4096).long(), minlength=16).double()
    assert float(((counts - count / 16) ** 2 / (count / 16)).sum()) < 15 + SIGMAS * 5.5
    others = [draws_of(1, "w", update, 0, count) for update in (2.0, 3.0, 1024.0)]
    others += [draws_of(2, "w", 1.0, 0, count), draws_of(1, "v", 1.0, 0, count)]
    others += [draws_of(1, "w", 1.0, shift, count) for shift in (1, 2, 3, 256, 4096)]
    for other in others:
        correlation = float(torch.corrcoef(torch.stack([first, other.double()]))[0, 1])
        assert abs(correlation) < SIGMAS / count**0.5
