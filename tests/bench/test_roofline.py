"""The roofline model of `rmcore.bench nullgpu`: bytes of operators on tensors without memory, and its arithmetic."""

from collections.abc import Callable

import pytest
import torch

from rmcore.bench.nullgpu.roofline import ATTENTION, GPUS, LEAST, PEAK, Trace, modelled

WIDE = 2 * 1000 * 64  # bytes of a bf16 tensor [1000, 64]


def moved(call: Callable[[torch.Tensor, torch.Tensor], object]) -> dict[str, list[int]]:
    with torch.device("meta"), Trace() as trace:
        trace.moved.clear()
        call(torch.empty(1000, 64, dtype=torch.bfloat16), torch.empty(1000, 64, dtype=torch.bfloat16))
    return dict(trace.moved)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda a, b: a + b, {"add": [3 * WIDE]}),
        (lambda a, b: a.add_(b), {"add_": [3 * WIDE]}),  # read, read, written
        (lambda a, b: a.copy_(b), {"copy_": [2 * WIDE]}),
        (lambda a, b: torch._foreach_copy_([a], [b]), {"_foreach_copy_": [2 * WIDE]}),
        (lambda a, b: a.float(), {"_to_copy": [3 * WIDE]}),
        (lambda a, b: a.zero_(), {"zero_": [WIDE]}),
        (lambda a, b: a[:1].expand(1000, 64) + b, {"add": [WIDE // 1000 + 2 * WIDE]}),  # an expanded row is read once
        (lambda a, b: a.view(64, 1000).t()[3:], {}),  # views
        (lambda a, b: a @ b.t(), {}),  # a product counts by its FLOPs
        (lambda a, b: torch._foreach_mul_([a, b], 2.0), {"_foreach_mul_": [4 * WIDE]}),
    ],
)
def test_the_bytes_of_an_operator(
    call: Callable[[torch.Tensor, torch.Tensor], object], expected: dict[str, list[int]]
) -> None:
    assert moved(call) == expected


def test_adamw_writes_the_gradients_that_it_scales() -> None:
    def update(weight: torch.Tensor, gradient: torch.Tensor, **scale: torch.Tensor) -> None:
        averages, steps = [torch.empty_like(weight) for _ in range(2)], [torch.ones(())]
        settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8}
        flags = {"amsgrad": False, "maximize": False}
        torch._fused_adamw_([weight], [gradient], averages[:1], averages[1:], [], steps, **settings, **flags, **scale)

    (plain,) = moved(update)["_fused_adamw_"]
    (scaled,) = moved(lambda a, b: update(a, b, grad_scale=torch.ones(())))["_fused_adamw_"]
    assert plain == pytest.approx(7 * WIDE, abs=8)  # the weight and two averages twice, the gradient once
    assert scaled - plain == WIDE + 4  # and the scale


def test_a_step_takes_its_products_attention_and_bytes_one_after_the_other() -> None:
    trace = Trace()
    trace.moved["add"] = [10**9, 1]
    found = modelled(trace, products=365e12, attention=1e12, useful=366e12)
    for name, gpu in GPUS.items():
        seconds = 365e12 / gpu.matrix + 1e12 / (ATTENTION * gpu.matrix) + 1e9 / gpu.copy + LEAST
        assert found[name]["mfu_percent"] == pytest.approx(100 * 366e12 / PEAK / seconds, abs=0.06)
        assert found[name]["products_ms"] == pytest.approx(365e15 / gpu.matrix, abs=0.06)
