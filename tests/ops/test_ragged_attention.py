"""Ragged attention with shared prompts: as exact as scaled_dot_product_attention, and repeatable.

The oracle is PyTorch's own attention on the unshared text of each answer (prompt and answer in one sequence), in fp64,
without segments and shared rows. The gradients of shared rows are the sums over the answers' copies.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import rmcore.ops as ops
from rmcore.ops.ragged_attention import ragged_attention
from tests.harness.segments import Comparisons, comparisons_strategy, segments_of

MIXED: Comparisons = [(37, [20, 13]), (0, [9, 4, 30]), (200, [1, 70]), (5, [0, 3]), (16, [0, 0]), (1, [1])]


@pytest.fixture(params=ops.MODES)
def mode(request):
    if request.param == "fused" and "C++" not in ops.describe():
        pytest.skip(f"the C++ kernels are not in use ({ops.describe()})")
    ops.use(request.param)
    yield request.param
    ops.use("fused")


def answers_of(comparisons: Comparisons):
    """For each answer, the packed rows of its whole text, and how many of them an earlier answer has covered."""
    start = 0
    for prefix, tails in comparisons:
        at = start + prefix
        for i, tail in enumerate(tails):
            yield torch.cat([torch.arange(start, start + prefix), torch.arange(at, at + tail)]), prefix if i else 0
            at += tail
        start = at


def random_qkv(comparisons, heads, kv_heads, size, dtype=torch.float32, seed=0, size_v=None):
    """q stored head by head, k and v as parts of one tensor: strides as in a model."""
    tokens = sum(prefix + sum(tails) for prefix, tails in comparisons)
    size_v = size if size_v is None else size_v
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(heads, tokens, size, generator=generator).to(dtype).transpose(0, 1)
    k, v = torch.randn(tokens, kv_heads, size + size_v, generator=generator).to(dtype).split([size, size_v], -1)
    grad_out = torch.randn(tokens, heads, size_v, generator=generator).to(dtype)
    return q, k, v, grad_out


def eager(q, k, v, mask, distance, scale, softcap, sinks, slopes):
    """Attention [1, H, L, V] as transformers' own code writes it for Gemma 2, gpt-oss and Bloom."""
    share = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(share, 1).mT * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if slopes is not None:
        scores = scores - slopes.to(q.dtype)[:, None, None] * distance
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(1, -1, scores.shape[2], 1)], -1)
    return scores.softmax(-1)[..., : k.shape[2]] @ v.repeat_interleave(share, 1)


def unshared(q, k, v, grad_out, comparisons, scale, window, dtype, softcap=0.0, sinks=None, slopes=None):
    """(out, dq, dk, dv, maybe dsinks) by PyTorch's attention on each answer's whole text, in `dtype`."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v, *([] if sinks is None else [sinks]))]
    out = torch.zeros(grad_out.shape, dtype=dtype)
    total = torch.zeros((), dtype=torch.float64)
    for rows, seen_before in answers_of(comparisons):
        q_HLK, k_HLK, v_HLV = (t[rows].transpose(0, 1)[None] for t in leaves[:3])
        distance = torch.arange(len(rows))[:, None] - torch.arange(len(rows))[None]
        mask = (distance >= 0) & (distance < window) if window else distance >= 0
        if softcap or sinks is not None or slopes is not None:
            sink = None if sinks is None else leaves[3]
            answer = eager(q_HLK, k_HLK, v_HLV, mask, distance, scale, softcap, sink, slopes)
        else:
            answer = F.scaled_dot_product_attention(q_HLK, k_HLK, v_HLV, attn_mask=mask, scale=scale, enable_gqa=True)
        answer = answer[0].transpose(0, 1)[seen_before:]
        rows = rows[seen_before:]
        out[rows] = answer.detach()
        total = total + (answer * grad_out[rows].to(dtype)).sum()
    return out, *torch.autograd.grad(total, leaves)


def packed(q, k, v, grad_out, segments, scale, window, softcap=0.0, sinks=None, slopes=None):
    leaves = [t.detach().requires_grad_() for t in (q, k, v, *([] if sinks is None else [sinks]))]
    out = ragged_attention(*leaves[:3], segments, scale, window, softcap, *(leaves[3:] or [None]), slopes)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out)


def assert_no_worse(
    comparisons, heads, kv_heads, size, dtype, window, seed=0, size_v=None, softcap=0.0, sinks=False, slopes=False
):
    q, k, v, grad_out = random_qkv(comparisons, heads, kv_heads, size, dtype, seed, size_v)
    scale = size**-0.5
    more = {
        "softcap": softcap,
        "sinks": torch.linspace(-1, 2, heads).to(dtype) if sinks else None,
        "slopes": 0.5 ** torch.arange(1, heads + 1) if slopes else None,
    }
    exact = unshared(q, k, v, grad_out, comparisons, scale, window, torch.float64, **more)
    theirs = unshared(q, k, v, grad_out, comparisons, scale, window, dtype, **more)
    ours = packed(q, k, v, grad_out, segments_of(comparisons), scale, window, **more)
    # The terms that each result sums: dq and dk go through dS = P (dO v - sum), where terms of this size cancel.
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    largest_q, largest_k, largest_v, largest_grad = (
        t.double().abs().max() if t.numel() else 0 for t in (q, k, v, grad_out)
    )
    ds = size * largest_grad * largest_v * scale
    terms = (largest_v, ds * largest_k, ds * largest_q, largest_grad, len(q) * ds)
    names = ("out", "dq", "dk", "dv", "dsinks")
    for what, mine, other, truth, term in zip(names, ours, theirs, exact, terms, strict=False):
        assert mine.dtype == dtype and mine.shape == truth.shape
        if mine.numel() == 0:
            continue
        # Twice PyTorch's error; plus, where PyTorch happens to be exact, a few roundings of the sums and one of the
        # result as it is stored. PyTorch's fp64 is the oracle itself: there, two random walks of the roundings of the
        # 271 terms that a row of the longest prompt adds up, 2 x 17.
        slack = (34 if dtype == torch.float64 else 4) * wide * term + torch.finfo(dtype).eps * truth.abs().max()
        if what == "dsinks":  # sum(P * dP) is computed from the output as it is stored, with one rounding per row
            slack = slack + torch.finfo(dtype).eps * len(q) ** 0.5 * size * largest_grad * largest_v
        assert (mine.double() - truth).abs().max() <= 2 * (other.double() - truth).abs().max() + slack, what


# Each alone and all together: value heads of another size, soft cap, sinks, ALiBi.
MORE = {
    "smaller values": {"size_v": 12},
    "larger values": {"size_v": 40},
    "odd values": {"size_v": 7},
    "soft cap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "ALiBi": {"slopes": True},
    "all": {"size_v": 20, "softcap": 2.0, "sinks": True, "slopes": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
def test_error_with_more_terms(mode, more, window, dtype):
    assert_no_worse(MIXED, 4, 2, 32, dtype, window, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("window", [0, 5, 50])
@pytest.mark.parametrize("shape", [(4, 4, 32), (8, 2, 64), (2, 1, 80), (2, 2, 128), (3, 3, 8), (2, 2, 44)])
def test_error_against_unshared_attention(mode, shape, window, dtype):
    assert_no_worse(MIXED, *shape, dtype, window)


def test_long_prompt(mode):
    assert_no_worse([(1100, [60, 90])], 2, 2, 32, torch.float32, 0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    comparisons=comparisons_strategy,
    kv_heads=st.integers(1, 3),
    share=st.integers(1, 3),
    size=st.sampled_from([1, 8, 20, 32]),
    window=st.sampled_from([0, 0, 1, 7, 16, 33]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    more=st.sampled_from([{}, *MORE.values()]),
)
@pytest.mark.parametrize("which", ops.MODES)
def test_any_segments(which, comparisons, kv_heads, share, size, window, dtype, more):
    ops.use(which)
    try:
        assert_no_worse(comparisons, kv_heads * share, kv_heads, size, dtype, window, seed=size, **more)
    finally:
        ops.use("fused")


def test_no_tokens(mode):
    empty = torch.zeros(0, 2, 8, requires_grad=True)
    out = ragged_attention(empty, empty, empty, torch.zeros(0, 4, dtype=torch.int32), 1.0, 0)
    out.sum().backward()
    assert out.shape == (0, 2, 8) and empty.grad is not None


def test_a_prefix_does_not_depend_on_what_follows(mode):
    """The rows of the prompt are bitwise the same for any answers, which is the premise of sharing it."""
    q, k, v, _ = random_qkv([(50, [30, 40])], 2, 2, 32)
    alone = ragged_attention(q[:50], k[:50], v[:50], segments_of([(50, [0])]), 0.2, 0)
    with_answers = ragged_attention(q, k, v, segments_of([(50, [30, 40])]), 0.2, 0)
    if mode == "fused":
        assert torch.equal(alone, with_answers[:50])
    torch.testing.assert_close(alone, with_answers[:50])


def test_reruns_and_threads_give_the_same_bits(mode):
    comparisons = [(60, [20, 31, 7]), (10, [50, 3]), (90, [11, 12])] * 3
    q, k, v, grad_out = random_qkv(comparisons, 4, 2, 32, torch.bfloat16)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, 2, 2):
            torch.set_num_threads(count)
            results.append(packed(q, k, v, grad_out, segments_of(comparisons), 0.2, 0))
    finally:
        torch.set_num_threads(threads)
    # PyTorch's matrix products may differ across thread counts, so only reruns are equal for the reference.
    pairs = [(0, 1), (2, 3)] + ([(0, 2)] if mode == "fused" else [])
    for i, j in pairs:
        assert all(torch.equal(a, b) for a, b in zip(results[i], results[j], strict=True))


@pytest.mark.parametrize("window", [0, 3])
def test_gradcheck(mode, window):
    comparisons: Comparisons = [(4, [3, 2]), (0, [2, 1])]
    q, k, v, _ = random_qkv(comparisons, 4, 2, 3, torch.float64, size_v=2)
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float64)
    leaves = tuple(t.detach().clone().requires_grad_() for t in (q, k, v, sinks))
    segments, slopes = segments_of(comparisons), torch.linspace(0.1, 0.4, 4)

    def attention(q, k, v, sinks):
        return ragged_attention(q, k, v, segments, 0.5, window, 1.5, sinks, slopes)

    assert torch.autograd.gradcheck(attention, leaves)
    assert torch.autograd.gradcheck(lambda *qkv: ragged_attention(*qkv, segments, 0.5, window), leaves[:3])


@pytest.mark.parametrize("more", [(0.0, None, None), (1.5, torch.ones(4), torch.ones(4) / 2)], ids=["plain", "all"])
def test_opcheck(mode, more):
    q, k, v, grad_out = random_qkv([(4, [3, 2])], 4, 2, 8, size_v=6)
    segments = segments_of([(4, [3, 2])])
    leaves = tuple(t.detach().requires_grad_() for t in (q, k, v))
    torch.library.opcheck(torch.ops.rmcore.ragged_attention.default, (*leaves, segments, 0.5, 0, *more))
    _, log_sum = torch.ops.rmcore.ragged_attention(q, k, v, segments, 0.5, 0, *more)
    backward = torch.ops.rmcore.ragged_attention_backward.default
    torch.library.opcheck(backward, (grad_out, q, k, v, log_sum, segments, 0.5, 0, more[0], more[2]))


def test_compile_and_mixed_dtypes(mode):
    q, k, v, _ = random_qkv([(4, [3, 2])], 4, 2, 8)
    segments = segments_of([(4, [3, 2])])
    expected = ragged_attention(q, k, v, segments, 0.5, 0)
    compiled = torch.compile(ragged_attention, fullgraph=True, backend="aot_eager")(q, k, v, segments, 0.5, 0)
    assert torch.equal(expected, compiled)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(expected, ragged_attention(q, k, v, segments, 0.5, 0))


@pytest.mark.parametrize("size", [8, 44, 7])
def test_fp32_queries_and_keys_with_bf16_values(mode, size):
    """As under autocast, where the rotary embedding returns fp32 q and k: kernels use them as they are, or in bf16."""
    q, k, v, grad_out = random_qkv(MIXED, 4, 2, size)
    segments, half = segments_of(MIXED), torch.bfloat16
    results = packed(q, k, v.to(half), grad_out.to(half), segments, 0.5, 0)
    assert [r.dtype for r in results] == [half, torch.float32, torch.float32, half]
    whole = packed(q, k, v.to(half).float(), grad_out.to(half).float(), segments, 0.5, 0)  # only v and out are rounded
    rounded = packed(*(t.to(half) for t in (q, k, v, grad_out)), segments, 0.5, 0)
    assert any(
        all(torch.equal(mine.to(half), other.to(half)) for mine, other in zip(results, results_of, strict=True))
        for results_of in (whole, rounded)
    )


def test_a_nan_key_reaches_only_the_queries_that_see_it(mode):
    q, k, v, _ = random_qkv([(4, [3, 2])], 1, 1, 8)
    k[6, 0, 0] = float("nan")  # the last row of the first answer: the second answer never sees it
    out = ragged_attention(q, k, v, segments_of([(4, [3, 2])]), 0.5, 0)
    assert out.isnan().any(-1).any(-1).tolist() == [False] * 6 + [True] + [False] * 2


@pytest.mark.parametrize(
    "segments",
    [
        [(0, 4, 0, 0)],  # rows 4 to 9 left out
        [(0, 4, 0, 0), (5, 9, 0, 2)],  # a gap
        [(0, 9, 0, 0), (9, 12, 0, 2)],  # past the end
        [(0, 4, 0, 0), (4, 9, 0, 5)],  # a prefix that reaches into its segment
        [(0, 4, 0, 0), (4, 9, -1, 2)],
        [(0, 4, 0, 0), (4, 9, 3, 2)],
    ],
)
def test_segments_that_do_not_tile_are_refused(mode, segments):
    q, k, v, _ = random_qkv([(4, [3, 2])], 1, 1, 8)
    with pytest.raises(ValueError, match="segment"):
        ragged_attention(q, k, v, torch.tensor(segments, dtype=torch.int32), 0.5, 0)


def test_wrong_inputs_are_refused(mode):
    q, k, v, _ = random_qkv([(4, [3, 2])], 4, 2, 8)
    segments = segments_of([(4, [3, 2])])
    for changed in (
        (q[:, :3], k, v, segments, 0.5, 0),  # 3 heads over 2
        (q[:5], k, v, segments, 0.5, 0),
        (q, k[..., :4], v, segments, 0.5, 0),
        (q, k, v[:, :1], segments, 0.5, 0),
        (q, k, v, segments, 0.5, 0, -1.0),
        (q, k, v, segments, 0.5, 0, float("nan")),
        (q, k, v, segments, 0.5, 0, 0.0, torch.ones(2)),
        (q, k, v, segments, 0.5, 0, 0.0, None, torch.ones(4, dtype=torch.int64)),
        (q.long(), k, v, segments, 0.5, 0),
        (q, k, v.to("meta"), segments, 0.5, 0),
        (q, k, v, segments.long(), 0.5, 0),
        (q, k, v, segments.flatten(), 0.5, 0),
        (q, k, v, segments, 0.5, -1),
    ):
        with pytest.raises(ValueError, match="ragged_attention"):
            ragged_attention(*changed)
