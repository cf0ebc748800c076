"""Tries every decoder of the installed transformers with a tiny random model: its path, and whether it can be exported.

Input: model types, by default all of transformers' mappings of decoders. Output: one line for each, and a results file.
Example: `python -m rmcore.bench models llama` prints `llama: shared, pruned; exported, loads in transformers`.

Each model is written as a checkpoint with its language-model head, loaded as a run loads it, tested with gradients,
exported and reloaded. A tiny config has four layers, of every kind that the family has, and a width of 32.
Where sizes depend on each other in a way that names do not show, `ODD` has them.
"""

import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto as auto

from rmcore.bench.measure import machine, parser, write_results
from rmcore.config import UserError
from rmcore.config.schema import ModelConfig
from rmcore.data.synthetic import byte_tokenizer
from rmcore.data.tokens.comparisons import TokenizedComparisons
from rmcore.data.tokens.templates import load_template
from rmcore.hf_export.directory import Package, export_model
from rmcore.hf_export.probe import probe_of
from rmcore.model.backbone import load_model
from rmcore.model.classifier import classifier_class, decoder_class, is_made, part_that_reads, text_model, towers
from rmcore.model.meta_model import set_padding
from rmcore.model.reward_model import PADDED, SHARED, RewardModel
from rmcore.model.selftest import choose_path
from rmcore.scoring.scorer import pack

CPU = torch.device("cpu")
VOCABULARY = 264  # the 259 tokens of the byte tokenizer, in a multiple of 8
LAYERS = 4
# Small sizes by the names that configs use. A size is set only where the family's own config has an integer there.
SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "word_embed_proj_dim", "embedding_dim"), 32),
    **dict.fromkeys(("attention_hidden_size", "lru_width", "dim_model_base", "output_hidden_size"), 32),
    **dict.fromkeys(("out_hidden_size", "projection_dim", "router_hidden_size", "hidden_size_global"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "depth"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "num_query_groups", "linear_num_heads"), 4),
    # As in the real models: with few heads many keys have a score of exactly 0, and the choice among them is arbitrary.
    "index_n_heads": 64,
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
TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}  # of the byte tokenizer
# Prompts and answers that packing may get wrong: no common prefix, an answer that begins another, one token, many.
TEXTS = (
    ("A prompt of some length, longer than any window. ", ("An answer.", "Another one, which is longer.")),
    ("Short: ", ("y", "yes", "yes, of course", "n", "no", "", "perhaps")),
    ("", ("one text", "a second text")),
    ("x", ("", "y")),
)


@dataclass(frozen=True)
class Result:
    """What became of one family.

    `outcome`: `exact` (a path was found and the export loads), `refused` (one sentence for the user), `failed` (an
    error that a user would see as a traceback) or `not tried` (no tiny config). `line`: the self-test's line, or the
    reason.
    """

    family: str
    outcome: str
    path: str = ""
    pruned: bool = False
    export: str = ""
    line: str = ""


def main(arguments: list[str]) -> int:
    p = parser("models", __doc__)
    p.add_argument("families", nargs="*", metavar="MODEL_TYPE", help="default: every decoder of transformers")
    p.add_argument("--out", help="result file; default: rmcore/bench/results/models.json")
    options = p.parse_args(arguments)
    began, results = time.perf_counter(), []
    for family in options.families or families():
        results.append(tried(family))
        print(shown(results[-1]), flush=True)
    counts = Counter(result.outcome for result in results)
    paths = Counter(result.path for result in results if result.outcome == "exact")
    print(f"{len(results)} families: {dict(counts)}; paths: {dict(paths)}; {time.perf_counter() - began:.0f} s")
    record: dict[str, Any] = {"what": "models", "machine": machine(), "transformers": transformers.__version__}
    record |= {"families": [asdict(result) for result in results]}
    if not options.families or options.out:
        print(f"written: {write_results('models', record, options.out)}")
    return 0


def shown(result: Result) -> str:
    """One line about a family."""
    if result.outcome != "exact":
        return f"{result.family}: {result.outcome}: {result.line}"
    return f"{result.family}: {result.path}{', pruned' * result.pruned}; {result.export}; {result.line}"


def tried(family: str) -> Result:
    """Build, load, test, export and reload a tiny model of the family."""
    try:
        config = tiny_config(family)
        classifier_class(part_that_reads(config))
        set_padding(config, TOKENS["pad_token_id"])
    except UserError as error:
        return Result(family, "refused", line=str(error))
    except Exception as error:  # whatever the family's config class finds wrong with small sizes
        return Result(family, "not tried", line=one_line(error))
    with tempfile.TemporaryDirectory(prefix="rmcore-models-") as directory:
        checkpoint, exported = Path(directory, "checkpoint"), Path(directory, "model")
        try:
            torch.manual_seed(0)
            decoder_class(type(config))._from_config(config, dtype=torch.float32).save_pretrained(checkpoint)
        except Exception as error:  # sizes that do not fit each other, a package that is not installed
            return Result(family, "not tried", line=one_line(error))
        try:
            return exact(family, checkpoint, exported)
        except UserError as error:
            return Result(family, "refused", line=one_line(error, directory))
        except Exception as error:  # this is what the benchmark looks for
            return Result(family, "failed", line=f"{type(error).__name__}: {one_line(error, directory)}")


def exact(family: str, checkpoint: Path, exported: Path) -> Result:
    """The path and the export of a checkpoint; raises what a run would raise."""
    tokenizer = byte_tokenizer()
    hf_model: Any = load_model(ModelConfig(name=str(checkpoint)), seed=1, vocabulary=len(tokenizer), pad_token_id=0)
    model = RewardModel(text_model(hf_model), hf_model.score, pad_token_id=0, path=PADDED)
    data = texts(tokenizer)
    path, line = choose_path(model, data, [*range(len(data))], CPU, gradients=True)
    probe = probe_of(model, data, CPU, path == SHARED, torch.float32)
    state = model.state_dict()
    package = Package(
        model_class=type(hf_model),
        hf_config=hf_model.config,
        tokenizer=tokenizer,
        template=load_template("simple_chat", tokenizer),
        dtype=torch.float32,
        card="",
        config_yaml="",
        towers=towers(hf_model),
    )
    export_model({name: tuple(t.shape) for name, t in state.items()}, state.items(), package, exported, probe)
    where = "loads in rmcore" if is_made(type(hf_model)) else "loads in transformers"
    return Result(family, "exact", path, model.pruned, f"exported, {where}", line)


def texts(tokenizer: Any) -> TokenizedComparisons:
    """`TEXTS` as token ids, each answer with EOS."""
    end = tokenizer.eos_token
    return pack(
        [[np.array(tokenizer.encode(prompt + a + end), np.int32) for a in answers] for prompt, answers in TEXTS]
    )


def one_line(error: Exception, directory: str | None = None) -> str:
    """The message of an error without line breaks and temporary paths."""
    text = " ".join(str(error).split())[:300]
    return text.replace(directory, "DIR") if directory else text


SHARED_KV = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
IMAGES = {"vocabulary_map": {"<image>": 4, "<|extra_200|>": 5}}
ODD: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("glm4v_text", "glm_ocr_text", "qwen2_vl_text", "qwen2_5_vl_text", "paddleocr_vl_text"), MROPE),
    "qwen2_5_omni_text": MROPE,
    "glm4v_moe_text": {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}},
    "apertus1p5": {
        "vision_config": {"codebook_size": 64},
        "audio_config": {"codebook_dim": 32, "codebook_size": 64},
        "image_token_offset": 100,
        "audio_token_offset": 164,
    },
    **dict.fromkeys(("chameleon", "emu3"), IMAGES),
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"] * 2, "num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "ernie4_5_vl_moe_text": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "inkling2_vision": {"text_hidden_size": 32},
    "molmo2": {"adapter_config": {"vision_feature_layer": [3, 1]}},
    "nemotron3_5_transcribe_asr_audio": {"num_key_value_heads": 4},
    "nemotron3_5_transcribe_word_timestamp": {"num_key_value_heads": 4},
    "nemotron3_diarization_audio": {"num_key_value_heads": 4},
    "nemotron3_diarization": {"head_config": {"audio_hidden_size": 32}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "glm5_next_text": {"index_topk": 16, "qk_rope_head_dim": 0},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [0, 1, 2, 3],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},
    },
    "perception_lm": {
        "vision_config": {"architecture": "vit_pe_core_tiny_patch16_384", "model_args": {"embed_dim": 192}}
    },
    "mimi": {"upsample_groups": 32},
    "hunyuan_vl_text": {"head_dim": 8, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 1, 1]}},
    "mistral_large4_text": {"kv_source_layers": [0, 1, 2, 3], "indexer_types": ["full"] * LAYERS},
    "step3p5": {"sliding_window": 7},
    # With random weights the entropies of the patcher lie around 5.1, and patches end where they are larger.
    "blt": {"encoder_hash_byte_group_vocab": 64, "patching_threshold": 5.1},
    "qwen3_omni_moe": {"talker_config": {"spatial_merge_size": 2}},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    "bamba": {**MAMBA2, "attn_layer_indices": [1, 3]},
    "codegen": {"n_ctx": 512, "rotary_dim": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "layer_types": ["full_attention"] * LAYERS,
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 64},
    "gemma3n_text": {**SHARED_KV, "intermediate_size": [48] * LAYERS, "activation_sparsity_pattern": [0.0] * LAYERS},
    "gemma4_text": SHARED_KV,
    "gemma4_unified_text": SHARED_KV,
    "granitemoehybrid": {**MAMBA2, "layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 8},
    "mistral4": {"num_key_value_heads": 4, "head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "hybrid_layer_ids": [1, 3],
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "num_mem_blocks": 1,
        "use_mamba_kernels": False,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def families() -> list[str]:
    """The model types of transformers' mappings of decoders, plain ones first."""
    mappings = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    )
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def tiny_config(family: str) -> PretrainedConfig:
    """A small config of the family; raises whatever the family's own config class raises."""
    kind = CONFIG_MAPPING[family]
    values = _shrunk(kind().to_dict())
    return kind(**_merged(values, ODD.get(family, {})))


def _shrunk(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a config that are to be set, as keyword arguments."""
    if "kv_lora_rank" in values:  # latent attention has a key for every query head
        values = {**values, "num_key_value_heads": None}
    layers = next((values[n] for n in SIZES if SIZES[n] is LAYERS and isinstance(values.get(n), int)), None)
    small: dict[str, Any] = {}
    for name, value in values.items():
        if name in TOKENS:
            small[name] = TOKENS[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            small[name] = 4 + sum(map(ord, name)) % 200
        elif name == "num_key_value_heads" and value is None:
            small[name] = 4
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict) and "mrope_section" in value:
            small[name] = {**value, "mrope_section": [2, 1, 1]}
        elif isinstance(value, dict) and "model_type" in value:
            kind = value["model_type"]
            small[name] = {"model_type": kind, **_merged(_shrunk(value), ODD.get(kind, {}))}
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
