"""A classifier's modules without memory for its weights, and the few weights that rmcore itself draws.

Enters: a transformers config. Leaves: the model with its parameters on the meta device (shapes alone) and its buffers
real, since buffers (rotary frequencies, masks) are computed when a module is made and stand in no checkpoint.
Example: a 7B Mistral takes a second and some kilobytes.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from rmcore.config import UserError
from rmcore.model.safetensors_weights import complaint

EARLIER_HEAD = "embed_out.weight"  # what GPT-NeoX's checkpoints call it, and transformers did until it became lm_head


def empty_model(hf_config: PretrainedConfig) -> PreTrainedModel:
    """The classifier with parameters on meta and real buffers. Raises ValueError: no such class."""
    with parameters_on_meta():
        return AutoModelForSequenceClassification.from_config(copy.deepcopy(hf_config), dtype=torch.float32)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, parameters of new modules are shapes alone as soon as a module has them; buffers are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def other_heads(model: PreTrainedModel) -> set[str]:
    """Names of the weights that a causal language model of this architecture has beyond the classifier's."""
    with parameters_on_meta():
        try:
            causal = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
        except (ValueError, KeyError, AttributeError):
            return set()
    return (set(causal.state_dict()) - set(model.state_dict())) | {EARLIER_HEAD}


def refuse_strangers(model: PreTrainedModel, unexpected: list[str]) -> None:
    """Raises UserError for names that a checkpoint has beyond the model's and a language model's head."""
    strangers = sorted(set(unexpected) - other_heads(model))
    if found := complaint(f"the checkpoint holds weights that {type(model).__name__} has not:", strangers):
        raise UserError(f"{found[0]}; is it the right checkpoint?")


def grow(model: PreTrainedModel, vocabulary: int, pad_token_id: int) -> None:
    """Give the embedding room for the tokenizer, to a multiple of 8; what is added is drawn as transformers does.

    `pad_token_id` goes to the model's config now that it has a row.
    """
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    if vocabulary > embedding.weight.shape[0]:
        model.resize_token_embeddings(vocabulary, pad_to_multiple_of=8, mean_resizing=False)
    model.config.pad_token_id = pad_token_id


def fresh_head(width: int, seed: int) -> Tensor:
    """[1, D], Stiennon et al., arXiv 2009.01325, p. 11: a normal with standard deviation 1/sqrt(D + 1)."""
    return torch.empty(1, width).normal_(0.0, (width + 1) ** -0.5, generator=torch.Generator().manual_seed(seed))


def added_rows(model: PreTrainedModel, embedding: str, seed: int) -> Tensor:
    """The embedding as `grow` draws it, of which the rows beyond the old ones stay."""
    generator = torch.random.get_rng_state()
    torch.manual_seed(seed + 1)
    fresh = nn.Embedding(*model.get_parameter(embedding).shape)
    model._init_weights(fresh)
    torch.random.set_rng_state(generator)
    return fresh.weight.detach()
