"""A tiny base model on disk, for trainings that need one: LoRA whose export is an adapter."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rmcore.data.synthetic import byte_tokenizer


def save_base(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A base model on disk: a causal model without a score head."""
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(seed)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = LlamaConfig(**{**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 512, **ids, **changes})
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(3.0 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
