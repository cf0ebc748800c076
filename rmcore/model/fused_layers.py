"""Layers of GPT-NeoX whose elementwise work runs in one pass, in place of one pass for each step.

Input: a Hugging Face decoder.
Output: the same modules and parameters. For a packed row, in all layers but the last, one kernel each way rotates
queries and keys: on a CPU rmcore.ops.layers.rotate_qkv, on CUDA in half precision rmcore.ops.rotate_gather, which also
gathers keys and values. And two gradients of biases, of the joined projection and of the MLP's first layer, are summed
where the gradients of their outputs are made, so that nothing reads these for it again.
Example: a layer of width 2048 with 26,000 tokens moves 1.8 GB less on a GPU, of the 8 GB that its kernels other than
products and attention moved forward and backward (`rmcore.bench nullgpu`, compiled).

Everything else computes by transformers' own forward: other precisions on CUDA, padded rows, rows that are split over
ranks, projections that LoRA or FP8 replaced. The last layer does as well, because it attends from the scored rows only.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import GELUActivation
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXMLP

from rmcore.data.batches.batch import AttentionLayout
from rmcore.model.attention_terms import Terms
from rmcore.model.backbone import decoder_layers
from rmcore.model.cpu_layers import op_takes
from rmcore.model.layout_context import current_layout, current_part
from rmcore.model.varlen import HALF, attend_gathered
from rmcore.ops import layers
from rmcore.ops.biased_gelu import biased_gelu
from rmcore.ops.ragged_attention import ragged_attention
from rmcore.ops.rotate_gather import rotate_gather


class FusedAttention(GPTNeoXAttention):
    """GPT-NeoX's attention: the joined projection, rotation and gather, attention, the output projection."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        layer_past: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **keywords: Any,
    ) -> tuple[Tensor, Tensor | None]:
        layout, linear = _layout(hidden_states), self.query_key_value
        plain = attention_mask is None and layer_past is None and position_embeddings is not None
        if layout is not None and layout.gather is None:  # FSDP's policy makes angles bf16
            plain = plain and position_embeddings[0].dtype == torch.float32  # type: ignore[index]
        if layout is None or not plain or type(linear) is not nn.Linear or (self.training and self.attention_dropout):
            return super().forward(
                hidden_states,
                attention_mask,  # type: ignore[arg-type]
                layer_past=layer_past,
                position_embeddings=position_embeddings,
                **keywords,
            )
        assert position_embeddings is not None
        cos_TR, sin_TR = (x.squeeze(0) for x in position_embeddings)
        qkv, heads, terms = _without_gradient_of_bias(linear, hidden_states), self._heads, Terms(self.scaling)
        if layout.gather is None:
            query, key, value = layers.rotate_qkv(qkv, linear.bias, cos_TR, sin_TR, heads)
            out_THV = ragged_attention(query, key, value, layout.segments_S4, *terms)
        else:
            query, key, value = rotate_gather(qkv, linear.bias, cos_TR, sin_TR, layout.gather, heads)
            out_THV = attend_gathered(query, key, value, layout.gather, terms)
        return self.dense(out_THV.flatten(1).unsqueeze(0)), None

    @property
    def _heads(self) -> int:
        return self.query_key_value.out_features // (3 * self.head_size)


class FusedMLP(GPTNeoXMLP):
    """GPT-NeoX's MLP: a linear layer, GELU, another one."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        linear = self.dense_h_to_4h
        layout = _layout(hidden_states)
        if layout is None or type(linear) is not nn.Linear or type(self.act) is not GELUActivation:
            return super().forward(hidden_states)
        gelu = layers.gelu if layout.gather is None else biased_gelu
        activated_TF = gelu(_without_gradient_of_bias(linear, hidden_states), linear.bias)
        return self.dense_4h_to_h(activated_TF.unsqueeze(0))


CPU_DTYPES = torch.float32, torch.bfloat16
FUSED: dict[type[nn.Module], type[nn.Module]] = {GPTNeoXAttention: FusedAttention, GPTNeoXMLP: FusedMLP}


def fuse_layers(backbone: PreTrainedModel) -> None:
    """Give the modules of all decoder layers but the last the classes of this file, where it has one for them."""
    for layer in decoder_layers(backbone)[:-1]:
        for module in layer.modules():
            module.__class__ = FUSED.get(type(module), type(module))


def _without_gradient_of_bias(linear: nn.Linear, hidden_1TD: Tensor) -> Tensor:
    """The output [T, F] of a linear layer whose bias gets its gradient elsewhere."""
    return F.linear(hidden_1TD.squeeze(0), linear.weight, None if linear.bias is None else linear.bias.detach())


def _layout(hidden_1TD: Tensor) -> AttentionLayout | None:
    """The layout of a whole packed row, if the kernels of its device take its precision; else None.

    A layout without a gather plan is one for a CPU.
    """
    layout = current_layout()
    if layout is None or current_part() is not None or hidden_1TD.shape[0] != 1:
        return None
    kind = hidden_1TD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_1TD.dtype
    if layout.gather is not None:
        return layout if dtype in HALF else None
    return layout if op_takes(hidden_1TD, *CPU_DTYPES) and dtype in CPU_DTYPES and layers.available() else None
