"""Builds a classifier without memory for its weights, and draws the few weights that rmcore itself adds.

Input: a transformers config. Output: the model with its parameters on the meta device (shapes without memory) and its
buffers real: modules compute buffers (rotary frequencies, masks) when they are made, and no checkpoint holds them.
Example: a 7B Mistral takes a second and some kilobytes.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rmcore.config import UserError
from rmcore.model.classifier import decoder_class, new_classifier, text_model

OLD_GPT_NEOX_HEAD = "embed_out.weight"  # the language-model head in GPT-NeoX checkpoints; transformers: lm_head


def model_on_meta(hf_config: PretrainedConfig) -> PreTrainedModel:
    """The classifier with parameters on meta and real buffers. Raises as `new_classifier`."""
    with parameters_on_meta():
        return new_classifier(copy.deepcopy(hf_config))


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within this context, the parameters of new modules are moved to meta at once; their buffers stay real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # else a shared weight would become two
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def other_heads(model: PreTrainedModel) -> set[str]:
    """Names of the weights that a causal language model of this architecture has in addition to the classifier's."""
    with parameters_on_meta():
        try:
            made_of = getattr(type(model), "decoder", None)
            causal = (made_of or decoder_class(type(model.config)))._from_config(copy.deepcopy(model.config))
        except (UserError, ValueError, KeyError, AttributeError):
            return set()
    return (set(causal.state_dict()) - set(model.state_dict())) | {OLD_GPT_NEOX_HEAD}


def grow(model: PreTrainedModel, vocabulary: int, pad_token_id: int) -> None:
    """Add rows to the embedding until it fits the tokenizer (a multiple of 8); transformers' rule draws them.

    Then the padding token has a row, and its id is written to the model's config.
    """
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    if vocabulary > embedding.weight.shape[0]:
        how: dict[str, Any] = {"pad_to_multiple_of": 8, "mean_resizing": False}
        generator = torch.random.get_rng_state()
        try:
            model.resize_token_embeddings(vocabulary, **how)
        except AttributeError:  # the rules of Gemma 4 and xLSTM know the text model alone
            torch.random.set_rng_state(generator)
            text_model(model).resize_token_embeddings(vocabulary, **how)
        embedding = cast(nn.Embedding, model.get_input_embeddings())
        for part in model.modules():  # BLT's encoder has a config of its own, which transformers leaves as it is
            if isinstance(part, PreTrainedModel) and any(child is embedding for child in part.children()):
                part.config.vocab_size = embedding.num_embeddings
    set_padding(model.config, pad_token_id)


def set_padding(hf_config: PretrainedConfig, pad_token_id: int | None) -> None:
    """Write the padding token into a config, and into that of its text model, which is where transformers reads it."""
    hf_config.pad_token_id = hf_config.get_text_config().pad_token_id = pad_token_id


def fresh_head(outputs: int, width: int, seed: int) -> Tensor:
    """[K, D], normal with standard deviation 1/sqrt(D + 1): Stiennon et al., arXiv 2009.01325, p. 11."""
    return torch.empty(outputs, width).normal_(0.0, (width + 1) ** -0.5, generator=torch.Generator().manual_seed(seed))


def added_rows(model: PreTrainedModel, embedding: str, seed: int) -> Tensor:
    """The whole embedding with the values that `grow` draws; only the rows beyond the stored ones are used."""
    generator = torch.random.get_rng_state()
    torch.manual_seed(seed + 1)
    fresh = nn.Embedding(*model.get_parameter(embedding).shape)
    model._init_weights(fresh)
    torch.random.set_rng_state(generator)
    return fresh.weight.detach()
