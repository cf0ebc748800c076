"""Finds or makes the sequence-classification class of a decoder, and the part of its model that reads text.

Input: a transformers config. Output: a `*ForSequenceClassification` class. It is transformers' own where there is one
with a linear score head. Otherwise it is made of the family's base class and such a head, and has the name that
transformers would give it.
Example: OlmoeConfig -> OlmoeForSequenceClassification, made here. Gemma4Config (a text model with towers for images and
sound) -> Gemma4ForSequenceClassification; its text model is `model.language_model`, and its towers never run.

Plain transformers has no such class and cannot load its exports (CTRL, XLNet and ModernBERT's decoder: its class has
another head, which it would draw at random); rmcore can. The name is for programs that look for the decoder by it.
"""

import inspect
import sys
from collections.abc import Hashable, Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto import modeling_auto as auto

from rmcore.config import UserError

# Mappings of the classes that compute the next token: of those that hear, of plain decoders, of those with any towers.
_DECODERS = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
)
_SUFFIXES = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
# Where the class in config.json of the family's checkpoints is spelled in another way than the class of transformers.
_NAMES_IN_CHECKPOINTS = {"Phimoe": "PhiMoE"}
# Keys of auto_map in config.json, where code comes with a model.
_CLASSIFIER, _CAUSAL = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
_ONLY_DECODERS = "rmcore trains causal decoders (Llama, Qwen, Gemma and the like)"


class MadeClassifier:
    """The part of a made class that is the same for every family: a base model, a score head, and transformers'
    contract of a sequence classifier, as far as rmcore and its export check use it.

    The base model has the attribute's name that the family's checkpoints use. Only its text model runs.
    `from_decoder`: transformers has no such base model, and the class is the decoder's without its head.
    """

    base_model_prefix: str
    from_decoder: bool

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        if not self.from_decoder:
            setattr(self, self.base_model_prefix, AutoModel.from_config(config))
        _take_heads_out(cast(PreTrainedModel, self))
        self.score = nn.Linear(state_width(config), cast(int, config.num_labels), bias=False)
        self.post_init()  # type: ignore[attr-defined]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **kwargs: Any
    ) -> SequenceClassifierOutput:
        """The logits [rows, labels] at the last token of each row of `input_ids` that is not padding."""
        model = cast(PreTrainedModel, self)
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        present = {name: value for name, value in given.items() if value is not None}
        hidden = text_model(model)(input_ids=input_ids, use_cache=False, **present).last_hidden_state
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (places * (input_ids != model.config.get_text_config().pad_token_id)).argmax(-1)
        logits = self.score(hidden)[torch.arange(len(input_ids), device=last.device), last]
        return SequenceClassifierOutput(logits=logits)


def part_that_reads(hf_config: PretrainedConfig) -> PretrainedConfig:
    """The config of the part of a checkpoint that becomes the reward model: the whole model in most cases.

    Qwen Omni's checkpoints hold a thinker, which reads text, images and sound, and a talker, which speaks: the thinker.
    """
    return getattr(hf_config, "thinker_config", None) or hf_config


def state_width(hf_config: PretrainedConfig) -> int:
    """D, the size of the final hidden states. BLT has no size of its own: they are those of its decoder."""
    text = hf_config.get_text_config()
    return cast(int, getattr(text, "hidden_size", None) or text.decoder_config.hidden_size)


def classifier_class(hf_config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that holds the decoder of `hf_config` and a score head. Of trusted code it is made of its decoder.

    Raises UserError in one sentence for what is not a decoder: its reward could not be read at the last token.
    """
    kind = type(hf_config)
    try:
        text = hf_config.get_text_config()
    except ValueError:  # the config has several texts
        text = None
    encodes = any(getattr(config, "is_encoder_decoder", False) for config in (hf_config, text))
    if encodes or kind in auto.MODEL_FOR_MASKED_LM_MAPPING:
        raise UserError(f"{kind.model_type} has an encoder, which reads a text in both directions; {_ONLY_DECODERS}")
    if getattr(text, "vocab_size", None) is None:
        raise UserError(f"{kind.model_type} does not have one vocabulary that it reads; {_ONLY_DECODERS}")
    decoder = (getattr(hf_config, "auto_map", None) or {}).get(_CAUSAL)
    if decoder is not None and _is_code(kind):  # which is trusted, or the config would have another class
        found: Any = get_class_from_dynamic_module(decoder, hf_config._name_or_path)
        return _made(cast(Hashable, kind), found, None)
    return _class_of(cast(Hashable, kind))


def architecture(hf_config: PretrainedConfig, model_class: type[PreTrainedModel]) -> str:
    """The name of the class for config.json, by which vLLM finds the decoder: it replaces the ending by ForCausalLM.

    It is the class's own name, except where transformers gives text models of families with towers another one:
    Gemma3TextForSequenceClassification is written as Gemma3ForSequenceClassification, after Gemma3ForCausalLM.
    PhimoeForSequenceClassification is written as PhiMoE..., as in the family's checkpoints, which vLLM follows.
    """
    if is_custom_code(model_class) or not issubclass(model_class.config_class or PretrainedConfig, type(hf_config)):
        return model_class.__name__
    stem = _stem(decoder_class(type(hf_config)), type(hf_config))
    return f"{_NAMES_IN_CHECKPOINTS.get(stem, stem)}ForSequenceClassification"


def is_custom_code(model_class: type[PreTrainedModel]) -> bool:
    """Whether the class is not one of transformers: from a model's repository, or a module of the user's.

    Newer versions of transformers have a method of this name; 5.3 does not.
    """
    return model_class.is_remote_code() or not model_class.__module__.startswith("transformers.")


def code_of_decoder(model_class: type[PreTrainedModel]) -> list[str]:
    """The files of the decoder's code, if the class was made of a decoder that came with a model."""
    decoder = getattr(model_class, "decoder", None)
    if decoder is None or not is_custom_code(decoder):
        return []
    file = str(sys.modules[decoder.__module__].__file__)
    return [file, *get_relative_import_files(file)]


def is_made(model_class: type[PreTrainedModel]) -> bool:
    """Whether the class was made here, so that plain transformers cannot load its exports."""
    return MadeClassifier in model_class.__mro__


def decoder_class(kind: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """The class with the language-model head, whose checkpoints a reward model starts from.

    Of a decoder with towers it is the class that holds all of them. Raises UserError if there is none.
    """
    found = [getattr(auto, mapping)[kind] for mapping in _DECODERS if kind in getattr(auto, mapping, ())]
    if not found and _is_code(kind):
        native = f": set model.trust_remote_code=false, because transformers has {kind.model_type} itself"
        raise UserError(
            f"the code that comes with the model has no decoder: auto_map of its config.json has no {_CLASSIFIER} or "
            f"{_CAUSAL}{native * (kind.model_type in CONFIG_MAPPING)}"
        )
    if not found:
        raise UserError(f"transformers has no decoder for the model type {kind.model_type}; {_ONLY_DECODERS}")
    return _one(found[-1])


@cache
def _class_of(kind: Any) -> type[PreTrainedModel]:
    decoder = decoder_class(kind)
    base = _one(auto.MODEL_MAPPING[kind]) if kind in auto.MODEL_MAPPING else None
    # Gemma 4's assistants read the states of another model next to the text, and ShieldGemma 2 classifies images.
    helps = [*getattr(kind, "sub_configs", ())] == ["text_config"]
    if base is None and (helps or kind in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING):
        raise UserError(f"transformers has no decoder for the model type {kind.model_type}; {_ONLY_DECODERS}")
    if kind in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        known = _one(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[kind])
        if _has_score(known):
            return known
    made: Any = _made  # mypy takes a class for a value that cannot be hashed
    return cast(type[PreTrainedModel], made(kind, decoder, base))


@cache
def _made(kind: Any, decoder: Any, base: Any) -> type[PreTrainedModel]:
    family: Any = next(
        c for c in decoder.__mro__ if c.__name__.endswith("PreTrainedModel") and c is not PreTrainedModel
    )
    from_decoder = base is None or not _same_text_model(decoder, base)
    attributes: dict[str, Any] = {
        "__doc__": f"{decoder.__name__} with a score head in place of its language-model head.",
        # Transformers then treats the class as its own: it renames and fuses weights, and exports no code with it.
        "__module__": decoder.__module__,
        "config_class": kind,
        "decoder": decoder,
        "from_decoder": from_decoder,
        "_keys_to_ignore_on_load_unexpected": _ignored(decoder) + _ignored(base),
    }
    if from_decoder:
        attributes["can_generate"] = classmethod(lambda _: False)
    else:
        attributes["base_model_prefix"] = family.base_model_prefix or "model"
    name = f"{_stem(decoder, kind)}ForSequenceClassification"
    # transformers knows some renamings by the name of the class with the language-model head.
    if (renamings := get_checkpoint_conversion_mapping(decoder.__name__)) is not None:
        register_checkpoint_conversion_mapping(name, renamings, overwrite=True)
    return cast(type[PreTrainedModel], type(name, (MadeClassifier, decoder if from_decoder else family), attributes))


def _same_text_model(decoder: type[PreTrainedModel], base: type[PreTrainedModel]) -> bool:
    """Whether the base model holds the text model as the decoder does. InstructBLIP's base model holds it without the
    head's class around it, so that no weight of it has the name that checkpoints use.
    """
    return "AutoModelForCausalLM" not in _names(decoder) or "AutoModelForCausalLM" in _names(base)


def _names(known: type[PreTrainedModel]) -> tuple[str, ...]:
    """The names that the constructor of a class uses."""
    return inspect.unwrap(known.__init__).__code__.co_names


def _take_heads_out(model: PreTrainedModel) -> None:
    """Remove the language-model head wherever it is in a decoder, and what ties its weight to the embedding.

    BLT's patcher is a model of its own within, whose head it needs.
    """
    for part, head in [(part, part.get_output_embeddings()) for part in _holders(model)]:
        if head is not None:
            for holder in [*part.modules()]:
                for name in [name for name, child in holder.named_children() if child is head]:
                    setattr(holder, name, None)
            part._tied_weights_keys = None  # type: ignore[assignment]
            part.all_tied_weights_keys = {}


def _holders(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The models in a model that hold its token embedding, from the outermost to the innermost."""
    embedding = model.get_input_embeddings()
    return [m for m in model.modules() if isinstance(m, PreTrainedModel) and embedding in set(m.modules())]


def _ignored(known: type[PreTrainedModel] | None) -> list[str]:
    """Patterns of the weights that transformers ignores in checkpoints of a class."""
    return list(getattr(known, "_keys_to_ignore_on_load_unexpected", None) or ())


def _is_code(kind: type[PretrainedConfig]) -> bool:
    """Whether a config's class came with a model, and is not known to transformers."""
    return not kind.__module__.startswith("transformers.") and kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING


def _has_score(known: type[PreTrainedModel]) -> bool:
    """Whether a class of transformers has a `score`, as most decoders have. CTRL and XLNet have other heads."""
    return "score" in _names(known)


def _stem(decoder: type[PreTrainedModel], kind: type[PretrainedConfig]) -> str:
    """What the names of a family's classes begin with; that of its config, where it has the class of another family."""
    if not issubclass(kind, decoder.config_class or PretrainedConfig):
        return kind.__name__.removesuffix("Config")
    return next((decoder.__name__.removesuffix(s) for s in _SUFFIXES if decoder.__name__.endswith(s)), decoder.__name__)


def _one(found: Any) -> type[PreTrainedModel]:
    """A mapping's entry: it may list several classes, of which the first is the plain one."""
    return found[0] if isinstance(found, (tuple, list)) else found


def new_classifier(
    hf_config: PretrainedConfig, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A classifier with weights as transformers draws them. `trust_remote_code`: its classes may come with it.

    Raises UserError for what is not a decoder or needs a package that is not installed, ValueError where the config's
    sizes do not fit each other.
    """
    try:
        if brings_code(hf_config, trust_remote_code=trust_remote_code):
            return AutoModelForSequenceClassification.from_config(hf_config, dtype=dtype, trust_remote_code=True)
        return classifier_class(hf_config)._from_config(hf_config, dtype=dtype)
    except ImportError as error:  # Gemma 3n's tower for images needs timm, also where only text is read
        raise UserError(f"{hf_config.model_type} needs a package: {' '.join(str(error).split())[:300]}") from None


def brings_code(hf_config: PretrainedConfig, *, trust_remote_code: bool) -> bool:
    """Whether the model's class is code of its repository that may run; rmcore then assumes nothing about it."""
    return trust_remote_code and _CLASSIFIER in (getattr(hf_config, "auto_map", None) or {})


def text_model(hf_model: PreTrainedModel) -> PreTrainedModel:
    """The part of a classifier that reads text, up to its final hidden states: its base model in most cases.

    Of a model with towers, and of a class that is made from the decoder's, it is the innermost model that holds the
    token embedding.
    """
    from_decoder = getattr(hf_model, "from_decoder", False)
    base = hf_model if from_decoder else cast(PreTrainedModel, hf_model.base_model)
    if not from_decoder and base.config.get_text_config() is base.config:
        return base
    without_head = [m for m in _holders(base) if m.get_output_embeddings() is None]
    return (without_head or [base])[-1]


def text_prefix(hf_model: PreTrainedModel) -> str:
    """What the names of the text model's weights begin with in the classifier, such as "model.language_model."."""
    text = text_model(hf_model)
    return next(f"{name}." for name, module in hf_model.named_modules() if cast(nn.Module, module) is text)


def towers(hf_model: PreTrainedModel) -> Mapping[str, Tensor]:
    """The weights that take no part in a reward, by their names in the classifier; none for most decoders.

    They are neither trained nor put on a GPU. Checkpoints do not hold them, and exports do.
    """
    trained = (text_prefix(hf_model), "score.")
    return {name: tensor for name, tensor in hf_model.state_dict().items() if not name.startswith(trained)}
