"""Finds the shape of the model that a config uses: from its own config where that is available, else from SHAPES.

Input: the section `model` of the config; optionally a file that replaces the model's own config.
Output: the Hugging Face config, and where it was read. No weights are read.
Example: EleutherAI/pythia-1b-deduped without a network -> 16 layers, D 2048, from SHAPES.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from rmcore.config import UserError
from rmcore.config.schema import ModelConfig
from rmcore.host.hub_access import offline_if_unreachable
from rmcore.model.backbone import load_model_config


def _pythia(width: int, layers: int, heads: int, inner: int, vocabulary: int = 50304) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": 2048,
    }


def _llama(
    kind: str, width: int, layers: int, heads: int, groups: int, inner: int, vocabulary: int, positions: int
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": inner,
        "max_position_embeddings": positions,
    }


def _qwen3(width: int, layers: int, heads: int, inner: int) -> dict[str, Any]:
    return {**_llama("qwen3", width, layers, heads, 8, inner, 151936, 40960), "head_dim": 128}


# From the published config.json files of models that rmcore's configs and users often train.

SHAPES: dict[str, dict[str, Any]] = {
    "EleutherAI/pythia-14m": _pythia(128, 6, 4, 512),
    "EleutherAI/pythia-70m": _pythia(512, 6, 8, 2048),
    "EleutherAI/pythia-160m": _pythia(768, 12, 12, 3072),
    "EleutherAI/pythia-410m": _pythia(1024, 24, 16, 4096),
    "EleutherAI/pythia-1b": _pythia(2048, 16, 8, 8192),
    "EleutherAI/pythia-1.4b": _pythia(2048, 24, 16, 8192),
    "EleutherAI/pythia-2.8b": _pythia(2560, 32, 32, 10240),
    "EleutherAI/pythia-6.9b": _pythia(4096, 32, 32, 16384, 50432),
    "EleutherAI/pythia-12b": _pythia(5120, 36, 40, 20480, 50688),
    "mistralai/Mistral-7B-v0.1": _llama("mistral", 4096, 32, 32, 8, 14336, 32000, 32768),
    "HuggingFaceH4/mistral-7b-sft-beta": _llama("mistral", 4096, 32, 32, 8, 14336, 32000, 32768),
    "meta-llama/Llama-3.1-8B": _llama("llama", 4096, 32, 32, 8, 14336, 128256, 131072),
    "meta-llama/Llama-3.1-8B-Instruct": _llama("llama", 4096, 32, 32, 8, 14336, 128256, 131072),
    "allenai/Llama-3.1-Tulu-3-8B-SFT": _llama("llama", 4096, 32, 32, 8, 14336, 128264, 131072),
    "meta-llama/Llama-3.2-3B-Instruct": {
        **_llama("llama", 3072, 28, 24, 8, 8192, 128256, 131072),
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "meta-llama/Meta-Llama-3-70B": _llama("llama", 8192, 80, 64, 8, 28672, 128256, 8192),
    "Qwen/Qwen2.5-1.5B-Instruct": {
        **_llama("qwen2", 1536, 28, 12, 2, 8960, 151936, 32768),
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-0.6B": _qwen3(1024, 28, 16, 3072),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 28, 16, 6144),
    "Qwen/Qwen3-4B": _qwen3(2560, 36, 32, 9728),
    "Qwen/Qwen3-14B": _qwen3(5120, 40, 40, 17408),
    "Qwen/Qwen3-32B": _qwen3(5120, 64, 64, 25600),
    "meta-llama/Llama-3.1-70B": _llama("llama", 8192, 80, 64, 8, 28672, 128256, 131072),
}


def shape_of(model: ModelConfig, file: str | None = None) -> tuple[PretrainedConfig, str]:
    """The model's config, and the place where it was read, as a phrase.

    file: a config.json, or a directory with one, that is read in place of the model's own.
    Raises UserError when no config can be found; the message says what to give.
    """
    if file is not None:
        return _from_values(_read(file), file), f"shape from {file}"
    if model.name == "synthetic" or Path(model.name).is_dir():
        return load_model_config(model), "shape from its own config"
    try:
        with offline_if_unreachable():
            return load_model_config(model), "shape from its config on the hub"
    except UserError as error:
        if known := SHAPES.get(model.name) or SHAPES.get(model.name.removesuffix("-deduped")):
            return _from_values(known, model.name), "shape from rmcore's table, because the hub does not provide it"
        raise UserError(f"{error}; give its config.json with --model-config FILE") from None


def _read(file: str) -> dict[str, Any]:
    path = Path(file).expanduser()
    try:
        values = json.loads((path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--model-config {file} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise UserError(f"--model-config {file} is not a model's config.json: model_type is missing")
    return values


def _from_values(values: dict[str, Any], name: str) -> PretrainedConfig:
    values = dict(values)
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name}: {' '.join(str(error).split())[:300]}") from None
