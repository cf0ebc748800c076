"""Recurrences over packed rows: for each kind of layer, a function that replaces the one transformers calls.

Input: the function of transformers that is replaced, the batch's `AttentionLayout`, and what a layer passes to it for
a packed row. Output: what the function returns for a packed row, without a final state.
Example: the gated delta rule of the row [p0 p1 | a | b] scans p0 p1 once, from a zero state, and then a and b as a
batch of two, both from the state after p1.

The replaced function computes each batch of pieces, so transformers' own arithmetic (PyTorch, or the packages that
transformers uses on a GPU) runs on fewer tokens. Nothing here has been run on a GPU yet; `tests/peers/kernels.py` runs
those packages' Triton kernels on the CPU.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmcore.data.batches.batch import AttentionLayout
from rmcore.model.recurrent.pieces import Batch, arrange, restore, scan_of, window_of

Function = Callable[..., Any]

# Tokens. In PyTorch, the work within a chunk grows with its size, and in Kimi's rule the memory too, so that small
# chunks are faster than those that transformers chooses for its GPU kernels.
CHUNK, KIMI_CHUNK = 32, 16


def runs_kernels(rows: Tensor) -> bool:
    """Whether these rows lie where the packages' kernels run. Elsewhere transformers' PyTorch functions compute."""
    return rows.is_cuda


def reference(original: Function) -> Function:
    """The PyTorch function behind one of transformers' functions, which call a package if it can be imported.

    The packages' kernels raise for tensors on the CPU, and transformers does not look where the tensors are.
    """
    wrapped = getattr(original, "__wrapped__", None)
    return wrapped if wrapped is not None and original.__module__.startswith("transformers.") else original


def _grain(rows: Tensor) -> int:
    """Tokens by which the lengths of a rectangle's pieces may differ: on a GPU, few large calls are best."""
    return 256 if runs_kernels(rows) else CHUNK


def takes_bounds(rows: Tensor) -> bool:
    """Whether the delta rules are those of flash-linear-attention, which take pieces of any length as one row."""
    return runs_kernels(rows) and has_delta_rules()


@cache
def has_delta_rules() -> bool:
    """Whether the package can be imported, as transformers tries it: without Triton it is installed and unusable."""
    try:
        importlib.import_module("fla.ops.gated_delta_rule")
        importlib.import_module("fla.ops.kda")
    except Exception:
        return False
    return True


def causal_conv(
    original: Function, layout: AttentionLayout, hidden_states: Tensor, weight: Tensor, *rest: Any, **options: Any
) -> Tensor:
    """A causal depthwise convolution [1, D, T] with weight [D, K]: an answer sees the last K - 1 tokens of its prompt.

    It runs over the row with those tokens in front of each segment, and their outputs are dropped.
    """
    places = window_of(layout, weight.shape[-1], hidden_states.device)
    window = arrange(hidden_states.squeeze(0).T, places).T.unsqueeze(0)
    return restore(original(window, weight, *rest, **options).squeeze(0).T, places).T.unsqueeze(0)


def fused_layer(original: Function, layout: AttentionLayout, *arguments: Any, **options: Any) -> None:
    """A kernel that computes a whole Mamba layer. None makes transformers call the convolution and the scan instead."""


def delta_rule(
    original: Function,
    layout: AttentionLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **options: Any,
) -> tuple[Tensor, None]:
    """The gated delta rule (Yang et al., arXiv 2412.06464) and Kimi delta attention (arXiv 2510.26692).

    query, key [1, T, H, K]; value [1, T, G, V]; g [1, T, G], or [1, T, H, K] in Kimi's; beta [1, T, G]. States
    [B, G, K, V].
    """
    chunk = KIMI_CHUNK if g.dim() == 4 else CHUNK
    kernel = takes_bounds(query)

    def step(inputs: list[Tensor], batch: Batch, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        q, k, v, decay, rate = inputs
        form = {"cu_seqlens": batch.bounds} if kernel else {"chunk_size": chunk}
        return original(
            q,
            k,
            v,
            g=decay,
            beta=rate,
            initial_state=state,
            output_final_state=keep,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            **form,
        )

    scan = scan_of(layout, 0 if kernel else _grain(query), query.device)
    return scan.run([query, key, value, g, beta], step), None


def selective_scan(
    original: Function,
    layout: AttentionLayout,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **options: Any,
) -> Tensor:
    """Mamba's selective scan (Gu and Dao, arXiv 2312.00752): h = exp(dt A) h + dt B x, y = C h + D x, gated by z.

    hidden_states, dt, z [1, E, T]; A [E, N]; B, C [1, N, T]; D, delta_bias [E]. States [B, E, N].

    The kernel neither starts from a state nor returns one that has a gradient. Therefore N more tokens in front of a
    piece write the state, column by column, and N more behind it read it. A written column decays by exp(2^-60 A),
    which is 1 in fp64, until the piece starts; the tokens that read have dt = 0.
    """
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        dt = F.softplus(dt)
    columns = torch.eye(A.shape[1], dtype=torch.float32, device=A.device)
    size, tick = A.shape[1], 2.0**-60

    def step(inputs: list[Tensor], batch: Batch, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        x, time, write, read = inputs
        length, unit = x.shape[1], columns.to(x.dtype).expand(batch.rows, -1, -1)
        if state is not None:
            values = state.transpose(1, 2)
            x, time = torch.cat([values / tick, x], 1), torch.cat([torch.full_like(values, tick), time], 1)
            write, read = torch.cat([unit, write], 1), torch.cat([torch.zeros_like(unit), read], 1)
        if keep:
            x, time = F.pad(x, (0, 0, 0, size)), F.pad(time, (0, 0, 0, size))
            write, read = F.pad(write, (0, 0, 0, size)), torch.cat([read, unit], 1)
        x, time, write, read = (tensor.transpose(1, 2) for tensor in (x, time, write, read))
        with torch.autocast(x.device.type, enabled=False):
            y = original(x, time, A, write, read, **options).transpose(1, 2)
        final = y[:, -size:].transpose(1, 2) if keep else None
        y = y[:, :-size] if keep else y
        return y[:, -length:], final

    # At least in fp32, in which the kernel keeps the state: the tokens that write and read it would round it.
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    rows = [tensor.transpose(1, 2).to(wide) for tensor in (hidden_states, dt, B, C)]
    out = scan_of(layout, _grain(hidden_states), hidden_states.device).run(rows, step).transpose(1, 2)
    if D is not None:
        out = out + hidden_states * D[:, None]
    return out if z is None else out * F.silu(z)


def chunk_scan(
    original: Function,
    layout: AttentionLayout,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    *,
    initial_states: None = None,
    return_final_states: bool = False,
    seq_idx: None = None,
    **options: Any,
) -> Tensor:
    """Mamba 2's scan (Dao and Gu, arXiv 2405.21060).

    hidden_states [1, T, H, P]; dt [1, T, H]; A [H]; B, C [1, T, G, N]. States [B, H, P, N].
    """
    if not runs_kernels(hidden_states):
        chunk_size = min(chunk_size, CHUNK)

    def step(inputs: list[Tensor], batch: Batch, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        x, time, write, read = inputs
        out = original(x, time, A, write, read, chunk_size, initial_states=state, return_final_states=keep, **options)
        return out if keep else (out, None)

    return scan_of(layout, _grain(hidden_states), hidden_states.device).run([hidden_states, dt, B, C], step)


def linear_recurrence(
    original: Function,
    layout: AttentionLayout,
    layer: nn.Module,
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The scan of the RG-LRU (De et al., arXiv 2402.19427): h = a h + x; a, x [1, T, E]. States [B, E]."""

    def step(inputs: list[Tensor], batch: Batch, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        x, gate = inputs
        never = torch.zeros_like(gate[..., :1], dtype=torch.bool)
        output, final = original(layer, x, gate, never, state, **options)
        return output, final if keep else None

    scan = scan_of(layout, _grain(hidden_states), hidden_states.device)
    return scan.run([hidden_states, recurrent_gate * ~reset], step), None


def wkv(
    original: Function,
    layout: AttentionLayout,
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: None = None,
    return_state: bool = False,
) -> tuple[Tensor, None]:
    """RWKV's attention (Peng et al., arXiv 2305.13048): key, value [1, T, E]. States [B, 3, E].

    A state is a weighted mean of values. A padded token must not weigh anything, so its key becomes -1e4.
    """
    real = torch.ones_like(key[..., :1])

    def step(inputs: list[Tensor], batch: Batch, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        k, v, is_real = inputs
        k = k.masked_fill(is_real == 0, -1e4)
        start = None if state is None else [part.contiguous() for part in state.unbind(1)]
        output, final = original(time_decay, time_first, k, v, start, keep)
        return output, torch.stack(final, 1) if keep else None

    return scan_of(layout, _grain(key), key.device).run([key, value, real], step), None


def mlstm(
    original: Function,
    layout: AttentionLayout,
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    igate: Tensor,
    fgate: Tensor,
    c_initial: None = None,
    n_initial: None = None,
    m_initial: None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """xLSTM's matrix memory (Beck et al., arXiv 2405.04517).

    query, key [1, H, T, K]; value [1, H, T, V]; igate, fgate [1, H, T]. A state is the memory [B, H, K, V], the
    normaliser [B, H, K] and the stabiliser [B, H, 1], flattened to [B, H, K V + K + 1].
    """
    sizes = [key.shape[-1] * value.shape[-1], key.shape[-1], 1]

    def step(inputs: list[Tensor], batch: Batch, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        start = [None] * 3
        if state is not None:
            memory, *rest = state.split(sizes, -1)
            start = [memory.unflatten(-1, (key.shape[-1], value.shape[-1])), *rest]
        output, (memory, *rest) = original(layer, *(x.transpose(1, 2) for x in inputs), *start, **options)
        return output.transpose(1, 2), torch.cat([memory.flatten(2), *rest], -1) if keep else None

    rows = [tensor.transpose(1, 2) for tensor in (query, key, value, igate, fgate)]
    return scan_of(layout, _grain(query), query.device).run(rows, step).transpose(1, 2), None


def lightning_attention(
    original: Function, layout: AttentionLayout, layer: Any, hidden_states: Tensor, *arguments: Any, **options: Any
) -> tuple[Tensor, None]:
    """MiniMax's lightning attention layer (arXiv 2501.08313): s = exp(-slope) s + k v^T, y = q s.

    The layer computes that sum within its own forward, so this is another forward of the layer. The sum is Mamba 2's
    with dt = 1, A = -slope, B = k, C = q and x = v.
    """
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan  # older versions of transformers have none

    shape = (*hidden_states.shape[:2], layer.num_attention_heads, 3 * layer.head_dim)
    query, key, value = layer.act_fn(layer.qkv_proj(hidden_states)).reshape(shape).split(layer.head_dim, dim=3)
    ones = torch.ones_like(value[..., 0])
    scan = mamba2_chunk_scan if runs_kernels(value) else reference(mamba2_chunk_scan)
    attended = chunk_scan(scan, layout, value, ones, -layer.slope_rate.flatten(), key, query, 256)
    attended = layer.norm(attended.to(value.dtype).flatten(2))
    return layer.out_proj(F.sigmoid(layer.output_gate(hidden_states)) * attended), None
