"""What `python -m rmcore.bench kernels` measures: each op at several sizes, ours and the same in PyTorch.

Enters: a device. Leaves: `Case`s. Example: attention_case(4, 4, 32, 8, torch.float32) is Pythia-14m's attention over 8
comparisons of about 300 tokens, by rmcore and by one PyTorch call a segment.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rmcore.model.attention import composed_attention
from rmcore.ops.gather_prefix import gather_plan, gather_prefix_kv
from rmcore.ops.pairwise import pairwise_loss
from rmcore.ops.ragged_attention import ragged_attention


@dataclass
class Case:
    """One op at one size: what each implementation calls, and on what."""

    op: str
    sizes: dict[str, int]
    dtype: torch.dtype
    leaves: tuple[Tensor, ...]  # what gradients are asked for
    calls: dict[str, Callable[[], Tensor]]  # by implementation; "rmcore" is ours
    grad: Tensor | None  # upstream gradient; None for a scalar result
    forward_bytes: int  # that must move: inputs read once, results written once
    both_bytes: int
    parts: dict[str, Callable[[], Any]]  # timed beside them: our kernels without autograd, and what bounds them


def pairwise_eager(hidden, score_weight, index, winner, loser, margin, weight):  # type: ignore[no-untyped-def]
    """The loss as PyTorch users write it."""
    rewards = hidden[index].float() @ score_weight.float()
    return -(weight * F.logsigmoid(rewards[winner] - rewards[loser] - margin)).sum()


def pairwise_case(T: int, D: int, A: int, dtype: torch.dtype, device: str, compiled: bool) -> Case:
    torch.manual_seed(0)
    hidden = torch.randn(T, D, dtype=dtype, device=device, requires_grad=True)
    score_weight = (torch.randn(D, device=device) / D**0.5).to(dtype).requires_grad_()
    index = torch.randperm(T, device=device)[:A].sort().values
    winner = torch.arange(0, A, 2, device=device)
    margin, weight = torch.zeros(A // 2, device=device), torch.ones(A // 2, device=device)
    inputs = (hidden, score_weight, index, winner, winner + 1, margin, weight)
    calls = {"rmcore": lambda: pairwise_loss(*inputs)[0], "eager": lambda: pairwise_eager(*inputs)}
    if compiled:
        torch._dynamo.reset()  # else it gives up after eight shapes
        compiled_eager = torch.compile(pairwise_eager, dynamic=False)
        calls["compiled"] = lambda: compiled_eager(*inputs)
    plain = tuple(t.detach() for t in inputs)
    nothing = torch.zeros((), device=device, requires_grad=True)
    grad, scored = torch.randn(A, device=device), plain[0][index]
    parts = {
        "forward kernel": lambda: torch.ops.rmcore.pairwise_forward(*plain, 0.0, 0.0),
        "backward kernel": lambda: torch.ops.rmcore.pairwise_backward(grad, scored, plain[1], index, T),
        "zero fill of d hidden": lambda: torch.zeros(T, D, dtype=dtype, device=device),
        "autograd of one product": torch.enable_grad()(lambda: torch.autograd.grad(nothing * 1.0, nothing)),
    }
    read, size = A * D * dtype.itemsize, T * D * dtype.itemsize
    return Case(
        "pairwise_loss", {"T": T, "D": D, "answers": A}, dtype, (hidden, score_weight), calls, None, read,
        2 * read + size, parts,
    )  # fmt: skip


def comparisons(count: int) -> list[tuple[int, int, int]]:
    """(prompt, chosen, rejected) lengths like those of HH pairs in the pythia tokenizer: about 2,000 tokens for 8."""
    draw = random.Random(0)
    return [(draw.randint(80, 300), draw.randint(10, 90), draw.randint(10, 90)) for _ in range(count)]


def segments_of(lengths: list[tuple[int, int, int]]) -> Tensor:
    rows, start = [], 0
    for prompt, chosen, rejected in lengths:
        middle = start + prompt + chosen
        rows += [(start, middle, start, start), (middle, middle + rejected, start, start + prompt)]
        start = middle + rejected
    return torch.tensor(rows, dtype=torch.int32)


def attention_case(H: int, G: int, hd: int, count: int, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    segments = segments_of(comparisons(count))
    T = int(segments[-1, 1])
    q, k, v = (torch.randn(n, T, hd).to(dtype).transpose(0, 1).requires_grad_() for n in (H, G, G))
    scale = hd**-0.5
    calls = {
        "rmcore": lambda: ragged_attention(q, k, v, segments, scale, 0),
        "eager": lambda: composed_attention(q, k, v, segments, scale, 0),
    }
    moved = (2 * H + 2 * G) * T * hd * dtype.itemsize
    sizes = {"comparisons": count, "T": T, "H": H, "G": G, "hd": hd}
    return Case(
        "ragged_attention", sizes, dtype, (q, k, v), calls, torch.randn(T, H, hd).to(dtype), moved, 3 * moved, {}
    )


def gather_case(G: int, hd: int, count: int, dtype: torch.dtype, device: str) -> Case:
    segments = segments_of(comparisons(count))
    T = int(segments[-1, 1])
    plan = gather_plan(segments).mapped(lambda t: t.to(device))
    k, v = (torch.randn(T, G, hd, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    calls = {
        "rmcore": lambda: torch.stack(gather_prefix_kv(k, v, plan)),
        "eager": lambda: torch.stack([k.index_select(0, plan.key_index), v.index_select(0, plan.key_index)]),
    }
    keys = plan.key_index.shape[0]
    moved = 2 * (T + keys) * G * hd * dtype.itemsize
    grad = torch.randn(2, keys, G, hd, dtype=dtype, device=device)
    return Case(
        "gather_prefix", {"T": T, "keys": keys, "G": G, "hd": hd}, dtype, (k, v), calls, grad, moved, 2 * moved, {}
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    dtypes = (torch.float32, torch.bfloat16)
    if device == "cuda":
        for dtype in dtypes:
            for T, D, A in ((8192, 4096, 8192), (65536, 4096, 8192), (32768, 2560, 128)):
                yield pairwise_case(T, D, A, dtype, device, not quick)
            for G, hd in ((8, 128), (16, 80)):
                yield gather_case(G, hd, 64, dtype, device)
        return
    for dtype in dtypes:
        for T, D, A in ((2048, 512, 16),) if quick else ((16384, 2560, 64), (2048, 512, 16)):
            yield pairwise_case(T, D, A, dtype, device, not quick)
        # Pythia 14m and 70m, a small Llama, Pythia 2.8b's and Llama 8B's heads.
        shapes = ((4, 4, 32), (8, 8, 64), (8, 4, 32), (8, 8, 80), (8, 2, 128))
        for H, G, hd in shapes[:1] if quick else shapes:
            yield attention_case(H, G, hd, 8, dtype)
