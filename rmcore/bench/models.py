"""Tries every decoder of the installed transformers with a tiny random model: which path is exact, what is exported.

Input: model types, by default all of transformers' mappings of decoders. Output: one line for each, and a table.
Example: `python -m rmcore.bench models llama jamba` prints for llama "shared, pruned, exported" with the line of the
self-test.

A tiny config has four layers, of every kind that the family has, and a width of 32. Where sizes depend on each other in
a way that names do not show, `ODD` has them.
"""

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto as auto

VOCABULARY = 320
LAYERS = 4
# Small sizes by the names that configs use. A size is set only where the family's own config has an integer there.
SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "word_embed_proj_dim", "embedding_dim"), 32),
    **dict.fromkeys(("attention_hidden_size", "lru_width", "dim_model_base", "output_hidden_size"), 32),
    **dict.fromkeys(("out_hidden_size", "projection_dim", "router_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "depth"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "num_query_groups", "linear_num_heads", "index_n_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "dim_head", "kv_channels", "linear_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "index_head_dim"), 8),
    "linear_value_head_dim": 12,
    "v_head_dim": 12,
    "qk_head_dim": 16,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "adapter_rank", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "mlp_dim", "ffn_hidden_size", "dim_ff", "dff"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"), 32),
    **dict.fromkeys(("shared_intermediate_size", "expert_ffn_hidden_size", "dense_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 32),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "d_inner"), 48),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "zero_expert_num"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(
        ("moe_num_shared_experts", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1
    ),
    "moe_layer_end_index": LAYERS - 1,
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), 7),
    **dict.fromkeys(("attention_chunk_size", "local_attention", "index_topk"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 512),
    **dict.fromkeys(("max_target_positions", "model_max_length", "mem_len"), 512),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    "query_pre_attn_scalar": 8,
    "num_kv_shared_layers": 1,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
    "image_size": 16,
    "patch_size": 8,
}
# Tokens of images and sounds, and of generation: any ids that the small vocabulary has.
TOKENS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
ODD: dict[str, dict[str, Any]] = {}


def families() -> list[str]:
    """The model types of transformers' mappings of decoders, plain ones first."""
    mappings = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def tiny_config(family: str) -> PretrainedConfig:
    """A small config of the family; raises whatever the family's own config class raises."""
    kind = CONFIG_MAPPING[family]
    values = _shrunk(kind().to_dict())
    return kind(**_merged(values, ODD.get(family, {})))


def _shrunk(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a config that are to be set, as keyword arguments."""
    layers = next((values[n] for n in SIZES if SIZES[n] is LAYERS and isinstance(values.get(n), int)), None)
    small: dict[str, Any] = {}
    for name, value in values.items():
        if name in TOKENS:
            small[name] = TOKENS[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            small[name] = 4 + sum(map(ord, name)) % 200
        elif isinstance(value, dict) and "model_type" in value:
            small[name] = {"model_type": value["model_type"], **_shrunk(value)}
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            small[name] = SIZES[name]
        elif isinstance(value, list) and layers and len(value) == layers:
            small[name] = _of_every_kind(value)
    return small


def _of_every_kind(values: list[Any]) -> list[Any]:
    """LAYERS entries of a list with one entry per layer, in order, each kind at least once where that is possible."""
    first = values[:LAYERS]
    missing = [value for value in dict.fromkeys(map(str, values)) if value not in map(str, first)]
    kinds = {str(value): value for value in values}
    return first[: LAYERS - len(missing)] + [kinds[name] for name in missing][:LAYERS]


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if both else value
    return merged
