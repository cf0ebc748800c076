"""Attention by tiles equals PyTorch calls per segment in fp64, forward and backward, also in Triton (interpreted)."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from rmcore.model.attention import composed_attention
from rmcore.ops.tiled_attention import BLOCK, tile_plan, tiled_attention
from tests.harness.segments import comparisons_strategy, segments_of
from tests.harness.triton_interpreter import triton_kernel

# A text of several blocks and a short answer; seven answers, one of which is a prefix of the others; one token; no
# common prefix; and a segment without rows.
LONG, ODD = [(70, [75, 3])], [(5, [3, 2, 4, 1, 1, 0, 6]), (0, [1]), (0, [2, 3]), (3, [0, 4])]
SINKS, SLOPES = torch.linspace(-1, 1, 4), torch.linspace(0.1, 0.4, 4)
ALL: dict[str, Any] = {"window": 66, "softcap": 1.5, "sinks_H": SINKS, "slopes_H": SLOPES}
TERMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 5},
    "soft cap": {"softcap": 1.5},
    "sinks": {"sinks_H": SINKS},
    "ALiBi": {"slopes_H": SLOPES},
    "all": ALL,  # the window ends within the prefix
}
# Of fp16, results, probabilities and their gradients are rounded. Triton's interpreter multiplies the bits of bf16.
BOUND = {torch.float32: 2e-6, torch.float16: 2**-9}


def inputs(segments, dtype, heads=4, groups=2, size=8, size_v=6):
    """q, k, v as models give them, heads first, and the gradient of the result."""
    generator, tokens = torch.Generator().manual_seed(0), int(segments[-1, 1])
    shapes = ((heads, size), (groups, size), (groups, size_v), (heads, size_v))
    q, k, v, up = (torch.randn(h, tokens, d, generator=generator).to(dtype).transpose(0, 1) for h, d in shapes)
    return (q, k, v), up.contiguous()


def oracle(qkv, upstream, segments, rows_A=None, **terms):
    """In fp64: the result, and the gradients of q, k, v and the sinks."""
    leaves = [x.double().requires_grad_() for x in qkv]
    more = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in {"window": 0, **terms}.items()}
    if "sinks_H" in more:
        leaves.append(more["sinks_H"].requires_grad_())
    out = composed_attention(*leaves[:3], segments, 0.3, **more)
    out = out if rows_A is None else out[rows_A]
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.double())]


def interpreted(qkv, upstream, plan, window=0, softcap=0.0, sinks_H=None, slopes_H=None):
    """The same by the Triton kernels."""
    forward, backward = (triton_kernel("rmcore.ops.tiled_attention_triton", name) for name in ("forward", "backward"))
    terms = 0.3, window, softcap
    out, log_sum = forward(*qkv, *plan, *terms, sinks_H, slopes_H)
    *grads, delta = backward(upstream, *qkv, out, log_sum, *plan, *terms, slopes_H)
    if sinks_H is not None:
        grads.append(-((sinks_H[:, None] - log_sum).exp() * delta).sum(1))
    return [out, *grads]


def assert_near(found, expected, bound):
    for ours, exact in zip(found, expected, strict=True):
        assert (ours.double() - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("comparisons", [LONG, ODD, LONG + ODD])
def test_the_reference_and_its_autograd(comparisons, terms):
    segments = segments_of(comparisons)
    qkv, upstream = inputs(segments, torch.float64)
    leaves = [x.requires_grad_() for x in qkv]
    given = dict(terms)
    if "sinks_H" in given:
        leaves.append(given["sinks_H"].double().requires_grad_())
        given["sinks_H"] = leaves[-1]
    out = tiled_attention(*leaves[:3], tile_plan(segments), 0.3, **given)
    assert_near([out, *torch.autograd.grad(out, leaves, upstream)], oracle(qkv, upstream, segments, **terms), 1e-12)


@pytest.mark.parametrize(
    "comparisons, terms, heads, dtype",
    [
        (LONG, ALL, (2, 1), torch.float32),
        (ODD[:2], {"window": 3}, (2, 2), torch.float32),
        (ODD[:1], {"softcap": 1.5, "sinks_H": SINKS}, (4, 2), torch.float16),
    ],
    ids=["long with all terms", "a short window", "fp16"],
)
def test_the_kernels(comparisons, terms, heads, dtype):
    pytest.importorskip("triton")
    segments = segments_of(comparisons)
    qkv, upstream = inputs(segments, dtype, *heads)
    terms = {name: x[: heads[0]] if isinstance(x, torch.Tensor) else x for name, x in terms.items()}
    found = interpreted(qkv, upstream, tile_plan(segments), **terms)
    assert all(x.dtype == dtype for x in found[:4])
    assert_near(found, oracle(qkv, upstream, segments, **terms), BOUND[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(
    "size, size_v, terms",
    [*((80, 80, terms) for terms in TERMS), (32, 32, "all"), (192, 128, "all"), (256, 256, "all")],
)
def test_the_kernels_with_all_sizes_and_terms(size, size_v, dtype, terms):
    segments = segments_of(LONG + ODD)
    qkv, upstream = inputs(segments, dtype, size=size, size_v=size_v)
    qkv = tuple(x * (8 / size) ** 0.25 for x in qkv)  # scores of the same size
    found = interpreted(qkv, upstream, tile_plan(segments), **TERMS[terms])
    assert_near(found, oracle(qkv, upstream, segments, **TERMS[terms]), BOUND[dtype])


def test_scored_rows_as_queries():
    """Two answers may be scored at one row, and a row of the prompt may be scored."""
    pytest.importorskip("triton")
    segments, rows_A = segments_of(LONG), np.array([144, 147, 60, 144])
    qkv, upstream = inputs(segments, torch.float32, heads=1, groups=1)
    terms = {"window": 66, "softcap": 1.5, "sinks_H": SINKS[:1]}
    plan, few = tile_plan(segments, rows_A), (qkv[0][rows_A], *qkv[1:])
    expected = oracle(qkv, upstream[: len(rows_A)], segments, rows_A, **terms)
    found = interpreted(few, upstream[: len(rows_A)], plan, **terms)
    found[1] = torch.zeros_like(qkv[0]).index_add(0, torch.from_numpy(rows_A), found[1])
    assert_near(found, expected, BOUND[torch.float32])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(comparisons=comparisons_strategy)
def test_any_plan_pairs_queries_and_keys_once(comparisons):
    """From the side of the queries and from that of the keys, as each row sees the rows of its text."""
    segments = segments_of([(prefix + 2 * BLOCK * (prefix % 3), tails) for prefix, tails in comparisons])
    plan, tokens = tile_plan(segments), int(segments[:, 1].max())
    expected = np.zeros((tokens, tokens), dtype=int)
    for start, end, prefix_start, prefix_end in segments.tolist():
        for row in range(start, end):
            text = [*range(prefix_start, prefix_end), *range(start, row + 1)]
            expected[row, text] = range(len(text), 0, -1)  # the distance, and one
    pieces = plan.pieces.tolist()
    by_queries, by_keys = np.zeros_like(expected), np.zeros_like(expected)

    def add(to, queries, keys, offset):
        query, key = np.arange(*queries)[:, None], np.arange(*keys)
        to[slice(*queries), slice(*keys)] += np.maximum(0, query + offset - key + 1)

    for first, last, first_piece, last_piece in plan.query_blocks.tolist():
        assert 0 < last - first <= BLOCK
        for _, _, key_first, key_last, offset in pieces[first_piece:last_piece]:
            add(by_queries, (first, last), (key_first, key_last), offset)
    for first, last, first_reader, last_reader in plan.key_blocks.tolist():
        assert 0 < last - first <= BLOCK
        for piece in plan.readers[first_reader:last_reader].tolist():
            query_first, query_last, key_first, key_last, offset = pieces[piece]
            add(by_keys, (query_first, query_last), (max(first, key_first), min(last, key_last)), offset)
    assert (by_queries == expected).all() and (by_keys == expected).all()
    assert sum(last - first for first, last, *_ in plan.key_blocks.tolist()) == tokens


def test_opcheck():
    segments = segments_of([(2, [1, 2, 1])])
    qkv, upstream = inputs(segments, torch.float64)
    leaves, plan, terms = [x.requires_grad_() for x in qkv], tile_plan(segments), (0.3, 0, 1.5)
    torch.library.opcheck(torch.ops.rmcore.tiled_attention.default, (*leaves, *plan, *terms, SINKS, SLOPES))
    plain = [x.detach() for x in qkv]
    out, log_sum = torch.ops.rmcore.tiled_attention(*plain, *plan, *terms, SINKS, SLOPES)
    given = (upstream, *plain, out, log_sum, *plan, *terms, SLOPES)
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(torch.ops.rmcore.tiled_attention_backward.default, given, test_utils=checks)


def test_wrong_inputs_are_refused():
    segments = segments_of(ODD)
    (q, k, v), _ = inputs(segments, torch.float32)
    plan = tile_plan(segments)
    for changed in (
        (q[:, :3], k, v, plan),
        (q, k[..., 1:], v, plan),
        (q, k[1:], v, plan),
        (q, k, v, plan.mapped(lambda x: x.to("meta"))),
        (q, k, v, plan, 1.0, 0, 0.0, SINKS[1:]),
    ):
        with pytest.raises(ValueError, match="tiled_attention"):
            tiled_attention(*changed, *([0.3] if len(changed) == 4 else []))
