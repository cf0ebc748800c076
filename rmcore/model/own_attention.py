"""Packed rows for architectures that compute attention in their own code, where transformers calls no function of ours.

Input: a Hugging Face decoder.
Output: the same modules and parameters. Within a packed forward, the attention of Bloom, Falcon with rotary embeddings,
GPT-J, CodeGen and GPT-Neo is that of rmcore.model.attention; elsewhere it is transformers'.
Example: GPT-J projects and rotates queries, keys and values as before; `_attn` then gets them as [1, H, T, K], and
computes them by the op in place of a product of all rows with all rows.

Others of this kind share prompts by masks (rmcore.model.masks): Falcon with ALiBi, because it rounds the biases to
bf16, which slopes cannot repeat; MPT, whose code needs a mask; XGLM.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.bloom import modeling_bloom as bloom
from transformers.models.codegen.modeling_codegen import CodeGenAttention
from transformers.models.falcon import modeling_falcon as falcon
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from transformers.models.gptj.modeling_gptj import GPTJAttention

from rmcore.model.attention import attend
from rmcore.model.attention_terms import Terms
from rmcore.model.layout_context import current_layout


class PackedBloomAttention(bloom.BloomAttention):
    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Tensor | None, **keywords: Any
    ) -> tuple[Tensor, Tensor | None]:
        layout = current_layout()
        if layout is None:
            return super().forward(hidden_states, residual, alibi, attention_mask, **keywords)  # type: ignore[arg-type]
        if alibi.shape[2] == 1:  # a row of one token has no bias of position 1, which is the slope
            alibi = bloom.build_alibi_tensor(alibi.new_ones(1, 2), self.num_heads, alibi.dtype)
        terms = Terms(self.inv_norm_factor, slopes_H=alibi[:, 0, 1])
        out = attend(*self._reshape(self.query_key_value(hidden_states)), layout, terms)
        return self.dense(out.flatten(2)) + residual, None


class PackedFalconAttention(falcon.FalconAttention):
    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **keywords: Any,
    ) -> tuple[Tensor, Tensor | None]:
        layout = current_layout()
        if layout is None or alibi is not None or position_embeddings is None:
            return super().forward(
                hidden_states,
                alibi,
                attention_mask,  # type: ignore[arg-type]
                position_embeddings=position_embeddings,
                **keywords,
            )
        query, key, value = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
        query, key = falcon.apply_rotary_pos_emb(query, key, *position_embeddings)
        return self.dense(attend(query, key, value, layout, Terms(self.inv_norm_factor)).flatten(2)), None

    def _split_heads(self, fused_qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [1, T, H, K], and keys and values [1, T, G, K], which transformers repeats for each query."""
        if current_layout() is None or not self.new_decoder_architecture:
            return super()._split_heads(fused_qkv)
        grouped = fused_qkv.unflatten(-1, (self.num_kv_heads, -1, self.head_dim))
        return grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]


class _PackedScores:
    """For attention whose queries, keys and values [1, H, T, K] meet in a method of its own."""

    scale_attn: float

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        layout = current_layout()
        if layout is None:
            return super()._attn(query, key, value, attention_mask)  # type: ignore[misc]
        return attend(query, key, value, layout, self._terms()).transpose(1, 2), None

    def _terms(self) -> Terms:
        return Terms(1 / self.scale_attn)


class PackedGPTJAttention(_PackedScores, GPTJAttention):
    """Attention of GPT-J."""


class PackedCodeGenAttention(_PackedScores, CodeGenAttention):
    """Attention of CodeGen."""


class PackedGPTNeoAttention(_PackedScores, GPTNeoSelfAttention):
    """Attention of GPT-Neo: scores are not scaled, and some layers have windows."""

    def _terms(self) -> Terms:
        return Terms(1.0, self.config.window_size if self.attention_type == "local" else 0)


PACKED: dict[type[nn.Module], type[nn.Module]] = {
    bloom.BloomAttention: PackedBloomAttention,
    falcon.FalconAttention: PackedFalconAttention,
    GPTJAttention: PackedGPTJAttention,
    CodeGenAttention: PackedCodeGenAttention,
    GPTNeoSelfAttention: PackedGPTNeoAttention,
}


def pack_own_attention(backbone: PreTrainedModel) -> None:
    """Give the attention of all layers the classes of this file, where it has one for it."""
    for module in backbone.modules():
        if type(module) in PACKED:
            namespace: Any = sys.modules[type(module).__module__]
            module.__class__ = PACKED[type(module)]
            if not hasattr(namespace.create_causal_mask, "rmcore"):
                namespace.create_causal_mask = _unless_packed(namespace.create_causal_mask)


def _unless_packed(original: Callable[..., Any]) -> Callable[..., Any]:
    """A mask has the square of the row's length, and where it looks for packed texts the host waits for a GPU."""

    @wraps(original)
    def mask(*arguments: Any, **keywords: Any) -> Any:
        return original(*arguments, **keywords) if current_layout() is None else None

    mask.rmcore = True  # type: ignore[attr-defined]
    return mask
