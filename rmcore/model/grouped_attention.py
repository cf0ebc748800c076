"""Attention with a soft cap, sinks, ALiBi or a window in fp32, on CUDA, where no variable-length kernel takes them.

Input: queries [T, H, K], keys [T, G, K] and values [T, G, V] of a packed row, its layout, and the terms.
Output: [T, H, V].
Example: 256 segments of 60 to 700 keys form some 12 groups of like lengths. A layer of Gemma 2 launches its kernels
once per group; one call per segment would launch them 256 times.

The segments of a group are padded to its longest one, and their scores are one product. Which rows belong to a group is
found on the host, once per batch. Scores are computed again in the backward and not kept: at 26,000 tokens those of a
layer with 8 heads take 1 GB. Keys and values are gathered in fp32, so that the gradients of a shared prompt are added
up in it.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rmcore.data.batches.batch import AttentionLayout, sent
from rmcore.model.attention_terms import Terms

ALIKE = 1.25  # most keys of a group's longest segment, as a multiple of those of its shortest one
ROOM = 32  # and so many more
SCORES = 1 << 23  # most scores of a group, per head


class Group(NamedTuple):
    """S segments of like lengths, of at most L queries and M keys. Padding repeats row 0."""

    query_SL: Tensor  # int64: rows
    key_SM: Tensor  # int64: rows, [prefix, own rows]
    queries_S: Tensor  # int64: how many are real
    prefix_S: Tensor  # int64: keys before the first query

    def behind(self) -> Tensor:
        """How far before each query a key is in the text, [S, 1, L, M]; -1 if it is padding, below 0 if it is later.

        A padded query sees one key, because a softmax over none is not a number.
        """
        device = self.query_SL.device
        query_L1 = torch.arange(self.query_SL.shape[1], device=device)[:, None]
        key_M = torch.arange(self.key_SM.shape[1], device=device)
        queries_S11, prefix_S11 = self.queries_S[:, None, None], self.prefix_S[:, None, None]
        real_SLM = (query_L1 < queries_S11) & (key_M < prefix_S11 + queries_S11)
        padding_SLM = torch.where((query_L1 >= queries_S11) & (key_M == 0), 0, -1)
        return torch.where(real_SLM, prefix_S11 + query_L1 - key_M, padding_SLM).unsqueeze(1)


@lru_cache(maxsize=4)  # the layers of one forward, whose layouts may be chunked
def groups_of(layout: AttentionLayout, device: torch.device) -> tuple[list[Group], Tensor]:
    """The groups, on `device`; and of each row of the packed row the place [T] in their joined outputs."""
    segments = layout.segments_S4.numpy().astype(np.int64)
    queries_S, prefix_S = segments[:, 1] - segments[:, 0], segments[:, 3] - segments[:, 2]
    keys_S = queries_S + prefix_S
    order = [int(n) for n in np.argsort(keys_S, kind="stable") if queries_S[n]]
    parts: list[list[int]] = []
    for n in order:
        part = parts[-1] if parts else []
        longest = max([queries_S[m] for m in part], default=0)
        fits = (len(part) + 1) * max(longest, queries_S[n]) * keys_S[n] <= SCORES
        if part and fits and keys_S[n] <= ALIKE * keys_S[part[0]] + ROOM:
            part.append(n)
        else:
            parts.append([n])
    place_T, at, groups = np.zeros(int(segments[:, 1].max(initial=0)), dtype=np.int64), 0, []
    for part in parts:
        query_SL = np.zeros((len(part), int(queries_S[part].max())), dtype=np.int64)
        key_SM = np.zeros((len(part), int(keys_S[part].max())), dtype=np.int64)
        for line, n in enumerate(part):
            start, end, prefix_start, prefix_end = segments[n]
            query_SL[line, : end - start] = np.arange(start, end)
            key_SM[line, : keys_S[n]] = np.concatenate([np.arange(prefix_start, prefix_end), np.arange(start, end)])
            place_T[start:end] = at + line * query_SL.shape[1] + np.arange(end - start)
        at += query_SL.size
        found = (query_SL, key_SM, queries_S[part], prefix_S[part])
        groups.append(Group(*(sent(torch.from_numpy(x), device) for x in found)))
    return groups, sent(torch.from_numpy(place_T), device)


@torch.compiler.disable
def grouped_attention(
    query_THK: Tensor, key_TGK: Tensor, value_TGV: Tensor, layout: AttentionLayout, terms: Terms
) -> Tensor:
    """softmax(adjusted(scale q k^T)) v of every segment, in fp32 (fp64 for fp64 input). Any device."""
    groups, place_T = groups_of(layout, query_THK.device)
    wide = torch.float64 if query_THK.dtype == torch.float64 else torch.float32
    key_TGK, value_TGV, dtype = key_TGK.to(wide), value_TGV.to(wide), value_TGV.dtype
    outputs = []
    for group in groups:
        inputs = (query_THK, key_TGK, value_TGV, group, terms)
        if torch.is_grad_enabled():
            outputs.append(checkpoint(_attend, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(_attend(*inputs))
    return torch.cat(outputs).to(dtype)[place_T]


def _attend(query_THK: Tensor, key_TGK: Tensor, value_TGV: Tensor, group: Group, terms: Terms) -> Tensor:
    """[S L, H, V], rows of padding included."""
    (segments, queries), heads, share = group.query_SL.shape, key_TGK.shape[1], query_THK.shape[1] // key_TGK.shape[1]
    with torch.autocast(query_THK.device.type, enabled=False):
        q = _rows(query_THK, group.query_SL).to(key_TGK.dtype).unflatten(2, (heads, share)).permute(0, 2, 3, 1, 4)
        k, v = (_rows(x, group.key_SM).transpose(1, 2).unsqueeze(2) for x in (key_TGK, value_TGV))
        behind = group.behind()
        visible = (behind >= 0) & (behind < terms.window) if terms.window else behind >= 0
        scores = terms.adjusted((q @ k.mT * terms.scale).flatten(1, 2), behind)
        probabilities = terms.softmax(scores.masked_fill(~visible, -torch.inf))
        out = probabilities.unflatten(1, (heads, share)) @ v
        return out.permute(0, 3, 1, 2, 4).reshape(segments * queries, heads * share, -1)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    return values.index_select(0, index.flatten()).unflatten(0, tuple(index.shape))
