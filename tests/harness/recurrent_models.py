"""Tiny sequence-classification models of every family whose layers are recurrent."""

from contextlib import AbstractContextManager, nullcontext

import torch
import transformers
from transformers import PreTrainedModel

from rmcore.model.backbone import turn_dropout_off
from rmcore.model.classifier import new_classifier
from tests.harness.double import InDouble
from tests.harness.oracle import GROUPED, SMALL

FOUR = {**SMALL, "num_hidden_layers": 4}
GROUPED_FOUR = {**GROUPED, "num_hidden_layers": 4, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
DELTA = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
KIMI = {"linear_num_heads": 4, "linear_head_dim": 8}
MAMBA1 = {"state_size": 4, "time_step_rank": 4, "conv_kernel": 4}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 16}
RECURRENT = {
    # gated delta net
    "qwen3_5": ("Qwen3_5TextConfig", {**GROUPED_FOUR, **DELTA}),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        {**GROUPED_FOUR, **DELTA, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {**GROUPED_FOUR, **DELTA, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "olmo_hybrid": (
        "OlmoHybridConfig",
        {**GROUPED, **DELTA, "num_hidden_layers": 4, "linear_num_key_heads": 4, "linear_value_head_dim": 16},
    ),
    # Kimi delta attention
    "kimi_linear": (
        "KimiLinearConfig",
        {
            **FOUR,
            **KIMI,
            **LATENT,
            **EXPERTS,
            "num_experts": 4,
            "num_key_value_heads": 4,
            "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "bailing_hybrid": (
        "BailingHybridConfig",
        {
            **FOUR,
            **KIMI,
            **LATENT,
            **EXPERTS,
            "num_experts": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    # Mamba 1
    "mamba": ("MambaConfig", {**SMALL, **MAMBA1}),
    "falcon_mamba": ("FalconMambaConfig", {**SMALL, **MAMBA1}),
    "jamba": (
        "JambaConfig",
        {
            **GROUPED,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
    ),
    "zamba": (
        "ZambaConfig",
        {
            **FOUR,
            "num_key_value_heads": 4,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "n_mamba_heads": 2,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
    ),
    # Mamba 2
    "mamba2": (
        "Mamba2Config",
        {**SMALL, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 16},
    ),
    "bamba": ("BambaConfig", {**GROUPED, **MAMBA2, "attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1Config", {**GROUPED, **MAMBA2, "head_dim": 8, "mamba_d_ssm": 64}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **GROUPED,
            **MAMBA2,
            "layer_types": ["mamba", "attention", "mamba"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 16,
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            **GROUPED,
            **EXPERTS,
            "head_dim": 8,
            "layers_block_type": ["mamba", "attention", "moe", "mamba"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    "zamba2": (
        "Zamba2Config",
        {
            **FOUR,
            "num_key_value_heads": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 8,
            "n_mamba_heads": 4,
            "mamba_ngroups": 2,
            "chunk_size": 16,
            "num_mem_blocks": 1,
        },
    ),
    # others
    "minimax": (
        "MiniMaxConfig",
        {**GROUPED_FOUR, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 16},
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {**GROUPED, "lru_width": 32, "head_dim": 8, "attention_window_size": 7, "intermediate_size": 96},
    ),
    "lfm2": (
        "Lfm2Config",
        {**GROUPED, "layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3, "block_multiple_of": 16},
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {
            **GROUPED,
            **EXPERTS,
            "layer_types": ["conv", "full_attention", "conv"],
            "conv_L_cache": 3,
            "num_experts": 4,
            "num_dense_layers": 1,
        },
    ),
    "lfm3": ("Lfm3Config", {**GROUPED, "layer_types": ["conv", "full_attention", "conv"]}),
    "rwkv": ("RwkvConfig", {**SMALL, "attention_hidden_size": 32, "context_length": 96}),
    "xlstm": ("xLSTMConfig", {**SMALL, "num_heads": 4, "chunk_size": 16}),
}
# One family for each kind of recurrent layer.
KINDS = ["qwen3_5", "kimi_linear", "mamba", "mamba2", "minimax", "recurrent_gemma", "lfm2", "rwkv", "xlstm"]


def recurrent_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model of the family with random weights and without dropout; in fp64, run it within `precision(dtype)`."""
    config_class, arguments = RECURRENT[family]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**arguments)
    config._experts_implementation = "eager"  # the one that computes in fp64, too
    model = new_classifier(config, dtype)
    for parameter in model.parameters():
        parameter.data.mul_(3.0 if parameter.ndim > 1 else 1.0)
    turn_dropout_off(model)
    return model


def precision(dtype: torch.dtype) -> AbstractContextManager:
    """Where a model of this dtype computes in this dtype throughout."""
    return InDouble() if dtype == torch.float64 else nullcontext()
