"""`rmcore::tiled_attention` and its backward in Triton, for CUDA. The contract is tiled_attention.py.

Input and output: as in the contract. Three kernels: the forward and the gradient of queries, of which a program
computes some rows of a block of queries; and the gradients of keys and values, of which a program computes some rows of
a block of keys, over all pieces and query heads that read them. The method is FlashAttention's (Dao, arXiv 2307.08691):
the softmax is rescaled as keys come, and the backward computes the probabilities again from their log-sum-exp.
Example: 13,000 rows of 8 heads, 256 segments: some 330 blocks of 64 queries, times 8 programs.

Scores and sums are fp32. Products of half precision take half-precision inputs, probabilities and gradients of scores
included; those of fp32 run in fp32, without TF32. Nothing is added atomically, so reruns are bitwise equal.

With TRITON_INTERPRET=1 set before triton is imported, the kernels run on CPU tensors too, as in the tests.
"""

# mypy: disable-error-code="no-untyped-def"
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmcore.ops.tiled_attention import BLOCK, reference_backward, reference_forward


class Tile(NamedTuple):
    """Rows of queries and of keys that a program has at once (at most BLOCK), and its warps."""

    queries: int
    keys: int
    warps: int


# By the largest head size: the tiles of the forward, of the gradient of queries, and of that of keys and values. They
# need at most 99 KiB of shared memory on GPUs that have no more. On sm_80, 90 and 100 no registers spill (Triton 3.9).
HALF = {
    64: (Tile(64, 64, 4), Tile(64, 32, 8), Tile(32, 64, 4)),
    128: (Tile(64, 64, 4), Tile(64, 32, 8), Tile(32, 64, 8)),
    256: (Tile(64, 32, 8), Tile(32, 32, 4), Tile(32, 32, 8)),
}
FP32 = {
    128: (Tile(32, 16, 4), Tile(16, 32, 4), Tile(16, 32, 4)),
    256: (Tile(16, 16, 4), Tile(16, 16, 4), Tile(16, 16, 4)),
}
STAGES = 2  # tiles that are being loaded
LOG2_E = tl.constexpr(1.4426950408889634)  # exp2 is what the GPU has
LEAST = tl.constexpr(-1e30)  # a maximum before any key: finite, so that no difference of two is NaN


@triton.jit
def _scores(products, behind, slope, visible, SCALE: tl.constexpr, CAP: tl.constexpr, SLOPES: tl.constexpr):
    """From q k^T the scores times log2(e), -inf where not visible; and the tanh of the soft cap, if there is one."""
    scores = products * SCALE
    bent = scores
    if CAP > 0:
        bent = 1 - 2 / (tl.exp2(scores * (2 * LOG2_E / CAP)) + 1)
        scores = bent * CAP
    if SLOPES:
        scores -= slope * behind
    return tl.where(visible, scores * LOG2_E, float("-inf")), bent


@triton.jit
def _rows(pointer, row, stride, d, last, D: tl.constexpr):
    """The rows `row` of one head, [., D]; zeros from row `last` on."""
    mask = (row < last)[:, None]
    if d.shape[0] > D:
        mask &= (d < D)[None, :]
    return tl.load(pointer + row.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def _columns(pointer, row, stride, d, last, D: tl.constexpr):
    """The same, transposed: [D, .]."""
    mask = (row < last)[None, :]
    if d.shape[0] > D:
        mask &= (d < D)[:, None]
    return tl.load(pointer + row.to(tl.int64)[None, :] * stride + d[:, None], mask=mask, other=0.0)


@triton.jit
def _store(pointer, row, stride, d, last, D, values):
    mask = (row < last)[:, None] & (d < D)[None, :]
    tl.store(pointer + row.to(tl.int64)[:, None] * stride + d[None, :], values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _attend(
    q,
    k,
    v,
    sinks,
    slopes,
    pieces,
    query_blocks,
    out,
    log_sum,
    q_n,
    q_h,
    k_t,
    k_g,
    v_t,
    v_g,
    N,
    H,
    SHARE: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SINKS: tl.constexpr,
    SLOPES: tl.constexpr,
    PARTS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Part of a block of queries, of one head. q_n .. v_g are strides."""
    block, part, h = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1).to(tl.int64)
    first = tl.load(query_blocks + 4 * block) + part * QUERIES
    last = tl.minimum(tl.load(query_blocks + 4 * block + 1), first + QUERIES)
    if first >= last:
        return
    row, d, e = first + tl.arange(0, QUERIES), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    query = _rows(q + h * q_h, row, q_n, d, last, K)
    keys, values = k + (h // SHARE) * k_g, v + (h // SHARE) * v_g
    slope = tl.load(slopes + h).to(tl.float32) if SLOPES else 0.0
    most = tl.full([QUERIES], LEAST, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    if SINKS:  # one more key, whose value is zero
        most = tl.zeros([QUERIES], tl.float32) + tl.load(sinks + h).to(tl.float32) * LOG2_E
        total += 1.0
    sums = tl.zeros([QUERIES, BLOCK_V], tl.float32)
    for n in range(tl.load(query_blocks + 4 * block + 2), tl.load(query_blocks + 4 * block + 3)):
        key_first, key_last = tl.load(pieces + 5 * n + 2), tl.load(pieces + 5 * n + 3)
        offset = tl.load(pieces + 5 * n + 4)
        key_last = tl.minimum(key_last, last + offset)  # the last key of the last query
        if WINDOW:
            key_first = tl.maximum(key_first, first + offset - WINDOW + 1)  # the first key of the first query
        for start in range(key_first, key_last, KEYS):
            column = start + tl.arange(0, KEYS)
            behind = (row + offset)[:, None] - column[None, :]
            visible = (behind >= 0) & (column < key_last)[None, :]
            if WINDOW:
                visible &= behind < WINDOW
            products = tl.dot(query, _columns(keys, column, k_t, d, key_last, K), input_precision="ieee")
            scores, _ = _scores(products, behind, slope, visible, SCALE, CAP, SLOPES)
            more = tl.maximum(most, tl.max(scores, 1))
            p = tl.exp2(scores - more[:, None])
            shrink = tl.exp2(most - more)
            total = total * shrink + tl.sum(p, 1)
            value = _rows(values, column, v_t, e, key_last, V)
            sums = sums * shrink[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
            most = more
    real = row < last
    total = tl.where(real, total, 1.0)  # a row of padding sees nothing
    _store(out + h * V, row, H * V, e, last, V, sums / total[:, None])
    tl.store(log_sum + h * N + row, (most + tl.log2(total)) / LOG2_E, mask=real)


@triton.jit(do_not_specialize=["N"])
def _queries_back(
    grad_out,
    q,
    k,
    v,
    out,
    log_sum,
    slopes,
    pieces,
    query_blocks,
    grad_q,
    delta,
    q_n,
    q_h,
    k_t,
    k_g,
    v_t,
    v_g,
    N,
    H,
    SHARE: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SLOPES: tl.constexpr,
    PARTS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The gradient of part of a block of queries, of one head; and delta = dO . O, for the keys."""
    block, part, h = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1).to(tl.int64)
    first = tl.load(query_blocks + 4 * block) + part * QUERIES
    last = tl.minimum(tl.load(query_blocks + 4 * block + 1), first + QUERIES)
    if first >= last:
        return
    row, d, e = first + tl.arange(0, QUERIES), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    real = row < last
    grad = _rows(grad_out + h * V, row, H * V, e, last, V)
    delta_of = tl.sum(grad.to(tl.float32) * _rows(out + h * V, row, H * V, e, last, V).to(tl.float32), 1)
    log2_sum = tl.load(log_sum + h * N + row, mask=real, other=0.0) * LOG2_E
    tl.store(delta + h * N + row, delta_of, mask=real)
    query = _rows(q + h * q_h, row, q_n, d, last, K)
    keys, values = k + (h // SHARE) * k_g, v + (h // SHARE) * v_g
    slope = tl.load(slopes + h).to(tl.float32) if SLOPES else 0.0
    sums = tl.zeros([QUERIES, BLOCK_K], tl.float32)
    for n in range(tl.load(query_blocks + 4 * block + 2), tl.load(query_blocks + 4 * block + 3)):
        key_first, key_last = tl.load(pieces + 5 * n + 2), tl.load(pieces + 5 * n + 3)
        offset = tl.load(pieces + 5 * n + 4)
        key_last = tl.minimum(key_last, last + offset)
        if WINDOW:
            key_first = tl.maximum(key_first, first + offset - WINDOW + 1)
        for start in range(key_first, key_last, KEYS):
            column = start + tl.arange(0, KEYS)
            behind = (row + offset)[:, None] - column[None, :]
            visible = (behind >= 0) & (column < key_last)[None, :]
            if WINDOW:
                visible &= behind < WINDOW
            key = _columns(keys, column, k_t, d, key_last, K)
            products = tl.dot(query, key, input_precision="ieee")
            scores, bent = _scores(products, behind, slope, visible, SCALE, CAP, SLOPES)
            p = tl.exp2(scores - log2_sum[:, None])
            grad_p = tl.dot(grad, _columns(values, column, v_t, e, key_last, V), input_precision="ieee")
            grad_scores = p * (grad_p - delta_of[:, None])
            if CAP > 0:
                grad_scores *= 1 - bent * bent
            sums += tl.dot(grad_scores.to(key.dtype), tl.trans(key), input_precision="ieee")
    _store(grad_q + h * K, row, H * K, d, last, K, sums * SCALE)


@triton.jit(do_not_specialize=["N"])
def _keys_back(
    grad_out,
    q,
    k,
    v,
    log_sum,
    delta,
    slopes,
    pieces,
    key_blocks,
    readers,
    grad_k,
    grad_v,
    q_n,
    q_h,
    k_t,
    k_g,
    v_t,
    v_g,
    N,
    G,
    SHARE: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SLOPES: tl.constexpr,
    PARTS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The gradients of part of a block of keys and values, of one key head; scores are transposed, [KEYS, QUERIES].

    The loop goes over the pieces that read the block, and for each over the query heads of the key head.
    """
    block, part, g = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1).to(tl.int64)
    first = tl.load(key_blocks + 4 * block) + part * KEYS
    last = tl.minimum(tl.load(key_blocks + 4 * block + 1), first + KEYS)
    if first >= last:
        return
    row, d, e = first + tl.arange(0, KEYS), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    key = _rows(k + g * k_g, row, k_t, d, last, K)
    value = _rows(v + g * v_g, row, v_t, e, last, V)
    sums_k = tl.zeros([KEYS, BLOCK_K], tl.float32)
    sums_v = tl.zeros([KEYS, BLOCK_V], tl.float32)
    first_reader, last_reader = tl.load(key_blocks + 4 * block + 2), tl.load(key_blocks + 4 * block + 3)
    for n in range(first_reader * SHARE, last_reader * SHARE):
        piece = pieces + 5 * tl.load(readers + n // SHARE)
        h = g * SHARE + n % SHARE
        slope = tl.load(slopes + h).to(tl.float32) if SLOPES else 0.0
        query_first, query_last, offset = tl.load(piece), tl.load(piece + 1), tl.load(piece + 4)
        key_first, key_last = tl.load(piece + 2), tl.load(piece + 3)
        query_first = tl.maximum(query_first, tl.maximum(first, key_first) - offset)  # the first that sees a key
        if WINDOW:
            query_last = tl.minimum(query_last, tl.minimum(last, key_last) - 1 - offset + WINDOW)
        for start in range(query_first, query_last, QUERIES):
            column = start + tl.arange(0, QUERIES)
            behind = (column + offset)[None, :] - row[:, None]
            real, read = column < query_last, (row >= key_first) & (row < key_last)
            visible = read[:, None] & real[None, :] & (behind >= 0)
            if WINDOW:
                visible &= behind < WINDOW
            query = _columns(q + h * q_h, column, q_n, d, query_last, K)
            products = tl.dot(key, query, input_precision="ieee")
            scores, bent = _scores(products, behind, slope, visible, SCALE, CAP, SLOPES)
            p = tl.exp2(scores - tl.load(log_sum + h * N + column, mask=real, other=0.0)[None, :] * LOG2_E)
            grad = _rows(grad_out + h * V, column, G * SHARE * V, e, query_last, V)
            sums_v += tl.dot(p.to(grad.dtype), grad, input_precision="ieee")
            grad_p = tl.dot(value, tl.trans(grad), input_precision="ieee")
            grad_scores = p * (grad_p - tl.load(delta + h * N + column, mask=real, other=0.0)[None, :])
            if CAP > 0:
                grad_scores *= 1 - bent * bent
            sums_k += tl.dot(grad_scores.to(query.dtype), tl.trans(query), input_precision="ieee")
    _store(grad_k + g * K, row, G * K, d, last, K, sums_k * SCALE)
    _store(grad_v + g * V, row, G * V, e, last, V, sums_v)


def _sizes(k: Tensor, v: Tensor) -> tuple[int, int]:
    """K and V, rounded up to sizes that a tile can have."""
    return tuple(max(16, triton.next_power_of_2(x.shape[2])) for x in (k, v))  # type: ignore[return-value]


def _tiles(k: Tensor, v: Tensor) -> tuple[Tile, Tile, Tile] | None:
    """The tiles of the three kernels, or None for fp64 and heads that are too large for them."""
    rows = {torch.float64: {}, torch.float32: FP32}.get(v.dtype, HALF)
    return next((tiles for size, tiles in rows.items() if max(_sizes(k, v)) <= size), None)


def _launch(kernel, tile: Tile, blocks: Tensor, heads: int, tensors: tuple, qkv: tuple, terms: tuple, **more) -> None:
    """Run a kernel for each part of each block and each head. `terms`: scale, window, soft cap and slopes."""
    if not (len(blocks) and heads):
        return
    q, k, v = qkv
    scale, window, softcap, slopes = terms
    parts = BLOCK // (tile.keys if kernel is _keys_back else tile.queries)
    block_k, block_v = _sizes(k, v)
    kernel[(len(blocks) * parts, heads)](
        *tensors,
        *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        q.shape[0],
        heads,
        SHARE=q.shape[1] // k.shape[1],
        K=k.shape[2],
        V=v.shape[2],
        SCALE=scale,
        WINDOW=window,
        CAP=softcap,
        SLOPES=slopes is not None,
        PARTS=parts,
        QUERIES=tile.queries,
        KEYS=tile.keys,
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        num_warps=tile.warps,
        num_stages=STAGES,
        **more,
    )


def _rowwise(*tensors: Tensor) -> list[Tensor]:
    """The tensors with the numbers of a head next to each other, which most models give them already."""
    return [x if x.stride(2) == 1 else x.contiguous() for x in tensors]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pieces: Tensor,
    query_blocks: Tensor,
    key_blocks: Tensor,
    readers: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `tiled_attention.reference_forward`."""
    tiles = _tiles(k, v)
    if tiles is None:
        plan = pieces, query_blocks, key_blocks, readers
        return reference_forward(q, k, v, *plan, scale, window, softcap, sinks, slopes)
    q, k, v = _rowwise(q, k, v)
    heads = q.shape[1]
    out = q.new_empty((*q.shape[:2], v.shape[2]))
    log_sum = q.new_empty((heads, q.shape[0]), dtype=torch.float32)
    tensors = q, k, v, sinks, slopes, pieces, query_blocks, out, log_sum
    terms = scale, window, softcap, slopes
    _launch(_attend, tiles[0], query_blocks, heads, tensors, (q, k, v), terms, SINKS=sinks is not None)
    return out, log_sum


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    pieces: Tensor,
    query_blocks: Tensor,
    key_blocks: Tensor,
    readers: Tensor,
    scale: float,
    window: int,
    softcap: float,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `tiled_attention.reference_backward`."""
    tiles = _tiles(k, v)
    if tiles is None:
        plan = pieces, query_blocks, key_blocks, readers
        return reference_backward(grad_out, q, k, v, out, log_sum, *plan, scale, window, softcap, slopes)
    q, k, v = _rowwise(q, k, v)
    grad_out, terms = grad_out.contiguous(), (scale, window, softcap, slopes)
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(log_sum)
    queries = grad_out, q, k, v, out, log_sum, slopes, pieces, query_blocks, grad_q, delta
    _launch(_queries_back, tiles[1], query_blocks, q.shape[1], queries, (q, k, v), terms)
    keys = grad_out, q, k, v, log_sum, delta, slopes, pieces, key_blocks, readers, grad_k, grad_v
    _launch(_keys_back, tiles[2], key_blocks, k.shape[1], keys, (q, k, v), terms)
    return grad_q, grad_k, grad_v, delta
