"""A model without its weights, and a way to fill any rows of them: for models larger than the memory of one rank.

Input: the section `model` of the config, and the size and padding token of the tokenizer.
Output: a `LazyModel`. `build()` makes the model as transformers does, with its parameters on the meta device (shapes
without memory) and its buffers real. `fill()` gives the rows that a rank holds their values, read from safetensors
files or drawn. Model and values are those of `load_model`, bit for bit.
Example: 4 ranks hold 1/4 of each weight of a model of 1.0e9 parameters: 1 GB per rank in fp32. Each rank reads its
quarter of every weight from the files (0.5 GB in bf16) and never holds more than that.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from rmcore.config import UserError
from rmcore.config.schema import ModelConfig
from rmcore.model import backbone
from rmcore.model.classifier import brings_code, text_prefix, towers
from rmcore.model.conversion import CannotConvert
from rmcore.model.found_weights import SCORE
from rmcore.model.meta_model import added_rows, fresh_head, grow, model_on_meta, other_heads
from rmcore.model.random_weights import NoDrawingRule, RandomWeights
from rmcore.model.safetensors_weights import StoredWeights, WantedRows, head_files, open_weights, weight_files


class NeedsWholeModel(Exception):
    """The model cannot be built part by part, for the reason in the message; `load_model` builds it whole."""


@dataclass(frozen=True)
class LazyModel:
    """A model whose weights are filled row by row.

    `source`: where the weights come from. `embedding`: name of the embedding, which grows to `vocabulary` rows; the
    rows that the source does not have are drawn. `fresh_head`: draw the score head, whatever the source has. `note`: a
    line about a head in the checkpoint that is not used.
    """

    hf_config: PretrainedConfig
    source: StoredWeights | RandomWeights
    seed: int
    embedding: str
    vocabulary: int
    pad_token_id: int
    fresh_head: bool
    note: str = ""

    def build(self) -> PreTrainedModel:
        """The model with parameters on meta and buffers on the CPU; dropout off."""
        model = model_on_meta(self.hf_config)
        grow(model, self.vocabulary, self.pad_token_id)
        backbone.turn_dropout_off(model)
        if isinstance(self.source, StoredWeights):
            self.source.fill({name: (0, buffer) for name, buffer in stored_buffers(model).items()})
        return backbone.train_text_only(model)

    def towers(self) -> dict[str, Tensor]:
        """The weights that take no part in a reward, read whole in fp32, and counts; by their names in transformers."""
        weights = {
            name: torch.empty(tensor.shape, dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in towers(self.build()).items()
        }
        self.fill({name: (0, weight) for name, weight in weights.items()})
        return weights

    def prefix(self) -> str:
        """What the names of the text model's weights begin with in transformers."""
        return text_prefix(self.build())

    @torch.no_grad()
    def fill(self, wanted: WantedRows) -> None:
        """Give the wanted rows their values: name in transformers -> (first row, [rows, ...] to fill).

        Raises UserError: a file cannot be read, or the architecture has no rule to draw a weight.
        """
        remaining = dict(wanted)
        if self.fresh_head and SCORE in remaining:
            first, rows = remaining.pop(SCORE)
            outputs = cast(int, self.hf_config.num_labels)
            rows.copy_(fresh_head(outputs, rows.shape[-1], self.seed)[first : first + rows.shape[0]])
        if self.embedding in remaining:
            # The source fills the rows that it has; the rows beyond them are the ones that `grow` draws.
            first, rows = remaining[self.embedding]
            stored = self.source.shape(self.embedding)[0]
            split = min(max(stored - first, 0), rows.shape[0])
            remaining[self.embedding] = (first, rows[:split])
            if split < rows.shape[0]:
                added = added_rows(self.build(), self.embedding, self.seed)
                rows[split:].copy_(added[first + split : first + rows.shape[0]])
        try:
            self.source.fill(remaining)
        except NoDrawingRule as error:
            raise UserError(f"model.init=random: {error}; it cannot be built in parts, use ddp or zero1") from None


def stored_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """The buffers that checkpoints hold, such as the biases that balance DeepSeek's experts. They are not trained."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def open_lazy_model(config: ModelConfig, *, seed: int, vocabulary: int, pad_token_id: int) -> LazyModel:
    """Read a model's config, and the names and shapes of its weights. Arguments as for `load_model`.

    Raises:
        NeedsWholeModel: the model must be loaded whole; the message says why.
        UserError: files are missing or broken, weights are missing or unexpected.
    """
    hf_config = backbone.reward_config(config, pad_token_id)
    if brings_code(hf_config, trust_remote_code=config.trust_remote_code):
        raise NeedsWholeModel("its code comes with it")
    try:
        model = model_on_meta(hf_config)
    except ValueError as error:
        raise UserError(backbone.unreadable(config, error)) from None
    if len(dict(model.named_parameters(remove_duplicate=False))) > len(dict(model.named_parameters())):
        raise NeedsWholeModel("some of its weights are shared")
    backbone.check_score(config, model)
    embedding = _embedding_of(model)
    source: StoredWeights | RandomWeights
    note = ""
    if config.init == "random":
        source = backbone.random_weights(config, hf_config, seed)
    else:
        source, note = _stored_weights(config, model, embedding)
    lazy = LazyModel(hf_config, source, seed, embedding, vocabulary, pad_token_id, config.head == "fresh", note)
    if vocabulary > source.shape(embedding)[0]:
        _check_growth(model, lazy)
    return lazy


def _check_growth(model: PreTrainedModel, lazy: LazyModel) -> None:
    """Raises NeedsWholeModel where more grows with the vocabulary than one embedding, or by a rule of its own."""
    try:
        model._init_weights(nn.Embedding(1, 1))
    except AttributeError:  # xLSTM's rule draws an embedding by its place in the text model
        raise NeedsWholeModel("the new rows of its embedding cannot be drawn alone") from None
    before = {name: parameter.shape for name, parameter in model.named_parameters()}
    after = {name: parameter.shape for name, parameter in lazy.build().named_parameters()}
    grown = [name for name, shape in after.items() if shape != before[name] and name != lazy.embedding]
    if grown:  # Gemma 3n and 4 have an embedding for the layers, too
        raise NeedsWholeModel(f"{grown[0]} grows with the vocabulary")


def open_exported(directory: Path) -> LazyModel:
    """An exported model with the weights of its files; nothing is drawn.

    Raises UserError: names or shapes do not fit the class that config.json states.
    """
    hf_config = AutoConfig.from_pretrained(directory)
    model = model_on_meta(hf_config)
    source, _ = open_weights(weight_files(str(directory), None) or [], model, heads=set(), head="stored")
    return LazyModel(hf_config, source, 0, _embedding_of(model), 0, hf_config.pad_token_id, fresh_head=False)


def _stored_weights(config: ModelConfig, model: PreTrainedModel, embedding: str) -> tuple[StoredWeights, str]:
    backbone.refuse_synthetic(config)
    try:
        files = weight_files(config.name, config.revision)
        if files is None:
            raise NeedsWholeModel("it has no safetensors files")
        if hasattr(model.config, "quantization_config"):
            raise NeedsWholeModel("its weights are quantised")
        others = head_files(config.name, config.revision)
        return open_weights(files, model, other_heads(model), config.head, embedding, others)
    except CannotConvert as reason:
        raise NeedsWholeModel(str(reason)) from None
    except UserError as error:
        raise UserError(f"model.name {config.name}: {error}") from None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(backbone.unreadable(config, error)) from None


def _embedding_of(model: PreTrainedModel) -> str:
    weight = cast(nn.Embedding, model.get_input_embeddings()).weight
    return next(name for name, parameter in model.named_parameters() if parameter is weight)
