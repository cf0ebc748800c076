"""Runs the GPU kernels of recurrent layers on the CPU: python -m tests.peers.kernels_client FAMILY ...

Input: families of tests/harness/recurrent_models.py, in an environment with tests/peers/kernels.txt, and
TRITON_INTERPRET=1, with which Triton runs its kernels in Python.
Output: a JSON object per line: the family, the functions of the packages that ran, and the largest difference of the
rewards and of any gradient from the padded forward of transformers' PyTorch functions, relative to the largest value
where that exceeds 1.
Example: {"family": "qwen3_5", "functions": ["chunk_gated_delta_rule"], "rewards": 2.1e-07, "gradients": 9.3e-07}.

What is replaced here, because there is no GPU: rmcore's choice of the kernels by the device (`runs_kernels`); Triton's
timing of variants, of which the first one runs; and the two CUDA extensions that are not written in Triton
(causal_conv1d_cuda, selective_scan_cuda), by PyTorch that checks what their C++ code checks.
"""

import builtins
import importlib.metadata
import inspect
import json
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PACKAGES = ("flash-linear-attention", "causal-conv1d", "mamba-ssm")


def checked(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(what)


# ---- causal_conv1d_cuda: the checks of csrc/causal_conv1d.cpp (1.7.0)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    width = weight.shape[1]
    out = F.conv1d(x.to(weight.dtype), weight[:, None], bias, padding=width - 1, groups=len(weight))[..., : x.shape[2]]
    return (F.silu(out) if silu else out).to(x.dtype)


def check_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor) -> None:
    checked(x.stride(2) == 1 or x.stride(1) == 1, "x is contiguous in channels or tokens")
    if x.stride(1) == 1 and x.stride(2) > 1:
        checked(x.shape[1] % 8 == 0, "the channels are a multiple of 8")
        for tensor in (x, *others):
            checked(tensor.stride(2) % 8 == 0 and tensor.stride(0) % 8 == 0, "strides are multiples of 8")
    checked(2 <= weight.shape[1] <= 4 and weight.shape[0] == x.shape[1], "the width is 2 to 4")
    checked(bias is None or (bias.dtype == weight.dtype and bias.stride(-1) == 1), "the bias has the weight's dtype")


def convolution_forward(
    x: Tensor, weight: Tensor, bias: Any, seq_idx: None, initial: None, out: Tensor, final: None, silu: bool
) -> None:
    checked(seq_idx is None and initial is None and final is None, "rmcore passes the row alone")
    check_convolution(x, weight, bias)
    out.copy_(convolve(x, weight, bias, silu))


def convolution_backward(
    x: Tensor, weight: Tensor, bias: Any, dout: Tensor, seq_idx: None, initial: None, dfinal: None, dx: Tensor,
    dweight: Tensor, dbias: Tensor | None, dinitial: None, silu: bool,
) -> None:  # fmt: skip
    last = x.stride(1) == 1 and x.stride(2) > 1
    dout = dout.transpose(1, 2).contiguous().transpose(1, 2) if last else dout.contiguous()
    check_convolution(x, weight, bias, dout)
    width, groups = weight.shape[1], len(weight)
    before = convolve(x, weight, bias, silu=False)
    slope = torch.sigmoid(before)
    dbefore = dout * slope * (1 + before * (1 - slope)) if silu else dout
    rows = F.pad(dbefore, (0, width - 1))
    dx.copy_(torch.nn.grad.conv1d_input(x.shape, weight[:, None], rows, padding=width - 1, groups=groups))
    dweight.copy_(torch.nn.grad.conv1d_weight(x, (groups, 1, width), rows, padding=width - 1, groups=groups).squeeze(1))
    if dbias is not None:
        dbias.copy_(dbefore.sum((0, 2)))


# ---- selective_scan_cuda: the checks of csrc/selective_scan/selective_scan.cpp (2.3.2), without z, D and bias


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    state, outputs = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        written = (delta * u)[:, :, t, None] * B[:, 0, None, :, t]
        state = torch.exp(delta[:, :, t, None] * A) * state + written
        outputs.append((state * C[:, 0, None, :, t]).sum(-1))
    return torch.stack(outputs, 2)


def check_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any) -> None:
    checked(A.dtype == torch.float32 and A.shape[1] <= 256, "A is fp32, with at most 256 states")
    checked(all(x.dtype == u.dtype for x in (delta, B, C)), "delta, B and C have the dtype of u")
    checked(all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (u, delta, B, C)), "tokens are contiguous")


def scan_forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any) -> list[Tensor]:
    check_scan(u, delta, A, B, C)
    checked(not any(value is not None and value is not False for value in rest), "rmcore passes five tensors")
    return [scan(u, delta, A, B, C), u.new_zeros(*u.shape[:2], 1, 2 * A.shape[1])]


def scan_backward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any) -> list[Any]:
    check_scan(u, delta, A, B, C)
    dout = rest[3]
    checked(dout.stride(-1) == 1 or dout.shape[-1] == 1, "the tokens of the gradient are contiguous")
    checked(dout.dtype == u.dtype, "the gradient has the dtype of u")
    inputs = [tensor.detach().requires_grad_() for tensor in (u, delta, A, B, C)]
    with torch.enable_grad():
        out = scan(*inputs)
    return [*torch.autograd.grad(out, inputs, dout), None, None]


def extension(name: str, **functions: Callable) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(functions)


extension("causal_conv1d_cuda", causal_conv1d_fwd=convolution_forward, causal_conv1d_bwd=convolution_backward)
extension("selective_scan_cuda", fwd=scan_forward, bwd=scan_backward)


# ---- Triton


def interpreted_range(*bounds: Any) -> Iterator[Any]:
    """As a compiled loop: where a bound is a value of the kernel, so is the variable."""
    import triton.language as tl

    if not any(isinstance(bound, tl.tensor) for bound in bounds):
        return iter(builtins.range(*bounds))
    return (tl.full((), n, tl.int32) for n in builtins.range(*(int(bound) for bound in bounds)))


def prepare_triton() -> None:
    import triton.runtime.autotuner

    checked(triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1")
    triton.runtime.autotuner.Autotuner._bench = lambda *_, **__: [0.0, 0.0, 0.0]
    torch.cuda.device = lambda device: nullcontext()  # mamba-ssm selects the GPU of its tensors
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(
        multi_processor_count=2
    )  # and asks for its size
    for name, module in list(sys.modules.items()):
        if name.startswith(("fla.", "mamba_ssm.")):
            vars(module)["range"] = interpreted_range


# ---- the comparison


def counted(namespace: Any, ran: set[str]) -> None:
    """Add the names of the packages' functions that run to `ran`."""
    for function in [value for value in vars(namespace).values() if hasattr(value, "rmcore_original")]:
        wrapped = function.rmcore_original
        cells = inspect.getclosurevars(wrapped).nonlocals
        implementation = cells.get("implementation")
        if implementation is None or implementation.__module__.startswith("transformers."):
            continue
        cell = wrapped.__closure__[wrapped.__code__.co_freevars.index("implementation")]

        def counting(*arguments: Any, implementation: Any = implementation, **keywords: Any) -> Any:
            ran.add(implementation.__name__)
            return implementation(*arguments, **keywords)

        cell.cell_contents = counting


def compare(family: str) -> dict[str, Any]:
    from rmcore.data.batches.batch import build_batch
    from rmcore.model.recurrent import scans
    from rmcore.model.reward_model import SHARED
    from tests.harness.oracle import Items, item, padded, reward_model
    from tests.harness.recurrent_models import recurrent_model

    items = Items([item(9, 4, 7, 2, seed=1), item(70, 6, 0, seed=2), item(0, 3, 1, seed=3)])
    model, oracle = recurrent_model(family), recurrent_model(family)
    ours = reward_model(model, SHARED)
    scans.runs_kernels = lambda rows: False
    loss, rewards = padded(oracle, items)
    loss.backward()
    expected = {name: p.grad for name, p in oracle.named_parameters() if p.grad is not None}

    ran: set[str] = set()
    scans.runs_kernels = lambda rows: True
    for module in {sys.modules[type(m).__module__] for m in model.modules()}:
        counted(module, ran)
    prepare_triton()
    out = ours(build_batch(items, range(len(items))))
    out.loss_sum.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    checked(found.keys() == expected.keys(), "the same weights have gradients")
    ours(build_batch(Items(), [])).loss_sum.backward()  # a rank without work
    return {
        "family": family,
        "functions": sorted(ran),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
        "rewards": relative(out.rewards_A, torch.cat(rewards)),
        "gradients": max(relative(found[name], expected[name]) for name in expected),
    }


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.abs().max().clamp(min=1.0))


if __name__ == "__main__":
    for family in sys.argv[1:]:
        print(json.dumps(compare(family)), flush=True)
