"""Which part of a model with towers an export holds: all of it, or its text model alone (`export.towers=false`).

Input: the class, the config and the towers of the trained model (rmcore.model.classifier). Output: those of the
exported one. Example: Gemma3ForSequenceClassification with a vision tower -> Gemma3TextForSequenceClassification.

A reward model is trained on text. Without the towers its directory is that of a plain decoder, which is smaller and
which programs for text models load, such as vLLM (README.md of this folder has what it does with towers).
"""

import copy
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from rmcore.config import Config, UserError
from rmcore.model.classifier import brings_code, classifier_class
from rmcore.model.outputs import Outputs

# Keys that transformers reads from the config of the whole model: what its text config says of them does not count.
_OF_THE_WHOLE = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


class Parts(NamedTuple):
    """The class and the config of the exported model, and its weights that were not trained."""

    model_class: type[PreTrainedModel]
    hf_config: PretrainedConfig
    towers: Mapping[str, Tensor]

    @property
    def separable(self) -> bool:
        """Whether a text model with towers can be exported alone."""
        try:
            return bool(self.towers) and bool(classifier_class(self.hf_config.get_text_config()))
        except UserError:
            return False


def exported_parts(
    config: Config, model_class: type[PreTrainedModel], hf_config: PretrainedConfig, towers: Mapping[str, Tensor]
) -> Parts:
    """The parts of the model that `config.export` asks for; of a model without towers always the whole.

    Raises UserError where the text model is not a decoder of transformers by itself.
    """
    if config.export.towers or (text := hf_config.get_text_config()) is hf_config:
        return Parts(model_class, hf_config, towers)
    if brings_code(hf_config, trust_remote_code=config.model.trust_remote_code):
        raise UserError(f"export.towers=false is for transformers' own classes, which {config.model.name} does not use")
    text = copy.deepcopy(text)
    try:
        text_class = classifier_class(text)
    except UserError as error:
        raise UserError(f"export.towers=false: {error}; leave export.towers out") from None
    for key in _OF_THE_WHOLE:
        if (value := getattr(hf_config, key, None)) is not None:
            setattr(text, key, value)
    Outputs.stored(hf_config).store(text)
    return Parts(text_class, text, {})
