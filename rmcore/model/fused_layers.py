"""Layers of GPT-NeoX whose elementwise work on GPUs runs in one pass, in place of one pass for each step.

Input: a Hugging Face decoder.
Output: the same modules and parameters. For a packed row on CUDA in half precision, in all layers but the last, one
kernel each way rotates queries and keys and gathers keys and values (rmcore.ops.rotate_gather); and two gradients of
biases, of the joined projection and of the MLP's first layer, are summed where the gradients of their outputs are made,
so that nothing reads these for it again (rmcore.ops.biased_gelu, too).
Example: a layer of width 2048 with 26,000 tokens moves 1.8 GB less, of the 8 GB that its kernels other than products
and attention moved forward and backward (`rmcore.bench nullgpu`, compiled).

Everything else computes by transformers' own forward: CPUs, other precisions, padded rows, rows that are split over
ranks, projections that LoRA or FP8 replaced. The last layer does as well, because it attends from the scored rows only.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import GELUActivation
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXMLP

from rmcore.model.attention_terms import Terms
from rmcore.model.backbone import decoder_layers
from rmcore.model.layout_context import current_layout, current_part
from rmcore.model.varlen import HALF, attend_gathered
from rmcore.ops.biased_gelu import biased_gelu
from rmcore.ops.gather_prefix import GatherPlan
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
        plan, linear = _plan(hidden_states), self.query_key_value
        plain = attention_mask is None and layer_past is None and position_embeddings is not None
        if plan is None or not plain or type(linear) is not nn.Linear or (self.training and self.attention_dropout):
            return super().forward(
                hidden_states,
                attention_mask,  # type: ignore[arg-type]
                layer_past=layer_past,
                position_embeddings=position_embeddings,
                **keywords,
            )
        assert position_embeddings is not None
        cos_TR, sin_TR = (x.squeeze(0) for x in position_embeddings)
        bias = linear.bias
        qkv = F.linear(hidden_states.squeeze(0), linear.weight, None if bias is None else bias.detach())
        heads = qkv.shape[-1] // (3 * self.head_size)
        query, key, value = rotate_gather(qkv, bias, cos_TR, sin_TR, plan, heads)
        out_THV = attend_gathered(query, key, value, plan, Terms(self.scaling))
        return self.dense(out_THV.flatten(1).unsqueeze(0)), None


class FusedMLP(GPTNeoXMLP):
    """GPT-NeoX's MLP: a linear layer, GELU, another one."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        linear = self.dense_h_to_4h
        if _plan(hidden_states) is None or type(linear) is not nn.Linear or type(self.act) is not GELUActivation:
            return super().forward(hidden_states)
        pre_TF = F.linear(hidden_states.squeeze(0), linear.weight, linear.bias.detach())
        return self.dense_4h_to_h(biased_gelu(pre_TF, linear.bias).unsqueeze(0))


FUSED: dict[type[nn.Module], type[nn.Module]] = {GPTNeoXAttention: FusedAttention, GPTNeoXMLP: FusedMLP}


def fuse_layers(backbone: PreTrainedModel) -> None:
    """Give the modules of all decoder layers but the last the classes of this file, where it has one for them."""
    for layer in decoder_layers(backbone)[:-1]:
        for module in layer.modules():
            module.__class__ = FUSED.get(type(module), type(module))


def _plan(hidden_1TD: Tensor) -> GatherPlan | None:
    """The gather plan of a whole packed row that computes in half precision on CUDA; else None."""
    layout = current_layout()
    if layout is None or layout.gather is None or current_part() is not None or hidden_1TD.shape[0] != 1:
        return None
    kind = hidden_1TD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_1TD.dtype
    return layout.gather if dtype in HALF else None
