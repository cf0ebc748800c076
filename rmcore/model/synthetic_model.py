"""The transformers config of the tiny model that comes with rmcore, for the synthetic task and random weights."""

from transformers import LlamaConfig

from rmcore.data.synthetic import MAX_POSITIONS

SYNTHETIC = "synthetic"  # model.name of the tiny model that comes with rmcore


def synthetic_model_config() -> LlamaConfig:
    """A Llama of two layers and 0.36 million parameters, which learns the synthetic task from random weights."""
    return LlamaConfig(
        vocab_size=264,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=256,
        max_position_embeddings=MAX_POSITIONS,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.06,  # learns in half as many steps as with the usual 0.02
    )
