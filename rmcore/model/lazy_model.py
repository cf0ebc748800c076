"""A model without its weights, and a way to fill any rows of them: for models larger than a rank's memory.

Enters: `model.*` of the config, the tokenizer's size. Leaves: an `Outline`: `build()` makes the model as transformers
does, its parameters on the meta device (shapes alone), its buffers real; `fill` gives the rows that a rank holds their
values, read from safetensors or drawn. Both are those that `load_model` gives, bit for bit.

Example: 4 ranks hold 1/4 of each weight of a 1.0e9 parameter model, 1 GB a rank in fp32; each reads its quarter of
every weight from the files (bf16: 0.5 GB) and never has more than that.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from rmcore.config import UserError
from rmcore.config.schema import ModelConfig
from rmcore.model import backbone
from rmcore.model.meta_model import added_rows, empty_model, fresh_head, grow, other_heads
from rmcore.model.random_weights import Drawn, Undrawn
from rmcore.model.safetensors_weights import Stored, Wanted, is_rewritten, open_stored, weight_files

SCORE = "score.weight"


class Whole(Exception):
    """Why this model cannot be built part by part: `load_model` builds it whole."""


@dataclass(frozen=True)
class Outline:
    """`source`: where weights come from. `embedding`: the name of the one that grows to `rows` rows, drawn beyond what
    the source has. `fresh_head`: the score head is drawn whatever the source has.
    """

    hf_config: PretrainedConfig
    source: Stored | Drawn
    seed: int
    embedding: str
    vocabulary: int
    pad_token_id: int
    fresh_head: bool

    def build(self) -> PreTrainedModel:
        """The model on meta, its buffers on the CPU; dropout off."""
        model = empty_model(self.hf_config)
        grow(model, self.vocabulary, self.pad_token_id)
        backbone.turn_dropout_off(model)
        return model.requires_grad_(True)

    @torch.no_grad()
    def fill(self, wanted: Wanted) -> None:
        """Give each of the wanted rows its values: name in transformers -> (first row, [rows, ...] to fill).

        Raises UserError: a file cannot be read.
        """
        asked = dict(wanted)
        if self.fresh_head and SCORE in asked:
            first, rows = asked.pop(SCORE)
            rows.copy_(fresh_head(rows.shape[-1], self.seed)[first : first + rows.shape[0]])
        if self.embedding in asked:
            first, rows = asked[self.embedding]
            stored = self.source.shape(self.embedding)[0]
            split = min(max(stored - first, 0), rows.shape[0])
            asked[self.embedding] = (first, rows[:split])
            if split < rows.shape[0]:
                added = added_rows(self.build(), self.embedding, self.seed)
                rows[split:].copy_(added[first + split : first + rows.shape[0]])
        try:
            self.source.fill(asked)
        except Undrawn as error:
            raise UserError(f"model.init=random: {error}: it cannot be built in parts, use ddp or zero1") from None


def outline(config: ModelConfig, *, seed: int, vocabulary: int, pad_token_id: int) -> Outline:
    """Look at a model's config and at the names and shapes of its weights; arguments as for `load_model`.

    Raises:
        Whole: it must be loaded whole; the message says why.
        UserError: files missing or broken, weights missing or unexpected.
    """
    hf_config = backbone.reward_config(config, pad_token_id)
    if backbone.brings_code(config, hf_config):
        raise Whole("its code comes with it")
    if is_rewritten(hf_config):
        raise Whole(f"transformers rearranges the weights of {hf_config.model_type} while loading")
    try:
        model = empty_model(hf_config)
    except ValueError as error:
        raise UserError(backbone.unreadable(config, error)) from None
    if len(dict(model.named_parameters(remove_duplicate=False))) > len(dict(model.named_parameters())):
        raise Whole("some of its weights are one")
    if len(model.state_dict()) > len(dict(model.named_parameters())):
        raise Whole("some of its buffers are stored")
    backbone.check_score(config, model)
    embedding = _embedding_of(model)
    source: Stored | Drawn
    if config.init == "random":
        source = backbone.drawn_weights(config, hf_config, seed)
    else:
        source = _stored_weights(config, model, embedding)
    return Outline(hf_config, source, seed, embedding, vocabulary, pad_token_id, config.head == "fresh")


def exported(directory: Path) -> Outline:
    """An exported model as its files have it, nothing drawn. Raises UserError: names or shapes that do not fit."""
    hf_config = AutoConfig.from_pretrained(directory)
    model = empty_model(hf_config)
    source = open_stored(weight_files(str(directory), None) or [], model, heads=set(), replaced=set())
    return Outline(hf_config, source, 0, _embedding_of(model), 0, hf_config.pad_token_id, fresh_head=False)


def _stored_weights(config: ModelConfig, model: PreTrainedModel, embedding: str) -> Stored:
    backbone.refuse_embedded(config)
    replaced = {SCORE} if config.head == "fresh" else set()
    try:
        files = weight_files(config.name, config.revision)
        if files is None:
            raise Whole("it has no safetensors files")
        return open_stored(files, model, other_heads(model), replaced, embedding)
    except UserError as error:
        raise UserError(f"model.name {config.name}: {error}") from None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(backbone.unreadable(config, error)) from None


def _embedding_of(model: PreTrainedModel) -> str:
    weight = cast(nn.Embedding, model.get_input_embeddings()).weight
    return next(name for name, parameter in model.named_parameters() if parameter is weight)
