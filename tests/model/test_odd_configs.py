"""Config values that real checkpoints have and the usual tiny models do not: each shares prompts, by the self-test.

The weights are twice as large as a fresh model's, so that a wrong mask, position or state shows in the reward.
"""

from typing import Any

import pytest
import torch

from rmcore.bench.models import CPU, texts, tiny_config
from rmcore.data.synthetic import byte_tokenizer
from rmcore.model.backbone import train_text_only, turn_dropout_off
from rmcore.model.classifier import new_classifier, text_model
from rmcore.model.meta_model import set_padding
from rmcore.model.reward_model import PADDED, SHARED, RewardModel
from rmcore.model.selftest import choose_path

BASE = {"rope_theta": 10000.0}
YARN = {**BASE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {**BASE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
LONG = {**BASE, "rope_type": "longrope", "short_factor": [1.1] * 4, "long_factor": [2.0] * 4}
LONG |= {"original_max_position_embeddings": 40, "factor": 8.0}  # between the lengths of the texts
ALTERNATE = ["sliding_attention", "full_attention"] * 2
MAMBA_ONLY = {"layers_block_type": ["mamba"] * 4}
# Family, and what differs from its tiny config. Those of FAST run by default.
FAST: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 1}),
    ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 40}),
    ("mistral", {"sliding_window": 1}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "layer_types": ALTERNATE}),
    ("qwen3_next", {"layer_types": ["linear_attention"] * 4, "linear_conv_kernel_dim": 2}),
    ("mamba2", {"n_groups": 4, "conv_kernel": 3, "chunk_size": 4}),
    ("mixtral", {"num_experts_per_tok": 1, "num_local_experts": 1, "output_router_logits": True}),
]
SLOW: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": YARN, "attention_bias": True, "mlp_bias": True, "hidden_act": "relu2"}),
    ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "vocab_size": 263, "use_cache": False}),
    ("mistral", {"sliding_window": 61, "head_dim": 24}),  # as long as one of the texts
    ("gemma2", {"attn_logit_softcapping": None, "sliding_window": 1}),
    ("gemma3_text", {"layer_types": ["sliding_attention"] * 4, "sliding_window": 1}),
    ("gemma3n_text", {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]}),
    ("gemma4_text", {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}),
    ("gemma4_text", {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 0}),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16, "enable_bias": False}),
    ("falcon", {"new_decoder_architecture": False, "parallel_attn": False, "num_kv_heads": 4, "bias": True}),
    ("falcon", {"new_decoder_architecture": True, "alibi": True, "num_kv_heads": 1}),
    ("mpt", {"attn_config": {"alibi": True, "alibi_bias_max": 4}, "no_bias": False}),
    ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    ("cohere2", {"sliding_window": 1}),
    ("deepseek_v2", {"first_k_dense_replace": 0, "mlp_layer_types": ["sparse"] * 4, "q_lora_rank": None}),
    ("deepseek_v3", {"num_experts_per_tok": 1, "v_head_dim": 8, "rope_interleave": False}),
    ("gpt_oss", {"num_experts_per_tok": 1, "sliding_window": 1, "attention_bias": False}),
    ("qwen3_5_text", {"layer_types": ["full_attention", "linear_attention", "linear_attention", "linear_attention"]}),
    ("jamba", {"attn_layer_period": 8, "attn_layer_offset": 7, "mamba_d_conv": 2, "num_experts": 1}),
    ("nemotron_h", {**MAMBA_ONLY, "n_groups": 2, "conv_kernel": 2}),
    ("falcon_h1", {"mamba_n_groups": 2, "mamba_rms_norm": True, "mamba_norm_before_gate": False}),
    ("minimax", {"layer_types": ["linear_attention"] * 4, "block_size": 2}),
    ("recurrent_gemma", {"block_types": ["attention"], "attention_window_size": 1}),
    ("lfm2", {"layer_types": ["conv"] * 4, "conv_L_cache": 2}),
    ("bamba", {"attn_layer_indices": [0, 1, 2, 3]}),
    ("zamba2", {**MAMBA_ONLY, "hybrid_layer_ids": []}),
    ("llama4_text", {"attention_chunk_size": 1}),
    ("exaone4", {"sliding_window": 4, "layer_types": ALTERNATE}),
    ("smollm3", {"no_rope_layers": [0] * 4}),
    ("seed_oss", {"residual_dropout": 0.5, "attention_dropout": 0.5}),
]


def named(case: tuple[str, dict[str, Any]]) -> str:
    return f"{case[0]}-{'-'.join(case[1])}"


@pytest.mark.parametrize(
    "case", [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=map(named, [*FAST, *SLOW])
)
def test_an_odd_config_shares_prompts(case: tuple[str, dict[str, Any]]) -> None:
    family, changes = case
    usual = tiny_config(family)
    config = type(usual)(**{**usual.to_dict(), **changes})
    set_padding(config, changes.get("pad_token_id", 0))
    config.num_labels = 1
    torch.manual_seed(0)
    hf_model: Any = new_classifier(config)
    for parameter in hf_model.parameters():
        parameter.data.mul_(2.0 if parameter.ndim > 1 else 1.0)
    turn_dropout_off(hf_model)
    train_text_only(hf_model)
    data = texts(byte_tokenizer())
    model = RewardModel(text_model(hf_model), hf_model.score, pad_token_id=0, path=PADDED)
    path, line = choose_path(model, data, [*range(len(data))], CPU, gradients=True)
    assert path == SHARED, line
