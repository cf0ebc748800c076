"""Models with towers, exported as their text model alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from rmcore.bench.models import tiny_config
from rmcore.config import UserError
from rmcore.data.synthetic import byte_tokenizer
from rmcore.hf_export.card import model_card
from rmcore.hf_export.parts import Parts, exported_parts
from rmcore.model.backbone import turn_dropout_off
from rmcore.model.classifier import architecture, is_made, new_classifier, towers
from rmcore.model.meta_model import set_padding
from rmcore.model.outputs import Outputs
from tests.harness.exporting import export, run_config

OUTPUTS = Outputs(("reward", "polite"), (1.0, 0.5))


def composite(family: str, **changes: Any) -> PreTrainedModel:
    """A tiny random model with towers."""
    config = tiny_config(family)
    OUTPUTS.store(config)
    set_padding(config, byte_tokenizer().pad_token_id)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(1)
    model = new_classifier(config)
    turn_dropout_off(model)
    return model


def parts_of(model: PreTrainedModel, *overrides: str) -> Parts:
    return exported_parts(run_config(*overrides), type(model), model.config, towers(model))


@pytest.mark.parametrize(
    "family, text_class, name",
    [
        ("gemma3", "Gemma3TextForSequenceClassification", "Gemma3ForSequenceClassification"),
        ("mistral3", "MistralForSequenceClassification", "MistralForSequenceClassification"),  # Mistral3 has none
        ("llama4", "Llama4ForSequenceClassification", "Llama4ForSequenceClassification"),  # made here
    ],
)
def test_the_text_model_alone_is_a_plain_decoder(family: str, text_class: str, name: str, tmp_path: Path) -> None:
    """The export itself compares all rewards of the reloaded directory with the whole model's."""
    model = composite(family)
    parts = parts_of(model, "export.towers=false")
    assert parts.model_class.__name__ == text_class and not parts.towers
    export(tmp_path / "model", model=model, **parts._asdict())
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert values["architectures"] == [name] and "vision_config" not in values and "text_config" not in values
    assert Outputs.stored(AutoConfig.from_pretrained(tmp_path / "model")) == OUTPUTS
    if not is_made(parts.model_class):
        _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
        assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))


def test_what_the_whole_model_states_applies_to_its_text_model() -> None:
    """The two configs may differ: transformers ties the embeddings of a model with towers by the outer one."""
    model = composite("gemma3", tie_word_embeddings=False, eos_token_id=7)
    model.config.get_text_config().tie_word_embeddings = True
    text = parts_of(model, "export.towers=false").hf_config
    assert (text.tie_word_embeddings, text.eos_token_id) == (False, 7)
    assert model.config.get_text_config().tie_word_embeddings, "the trained model's config is untouched"


def test_the_whole_model_is_exported_by_default_and_where_there_are_no_towers() -> None:
    model = composite("gemma3")
    whole = parts_of(model)
    assert (whole.model_class, whole.hf_config) == (type(model), model.config)
    assert whole.towers.keys() == towers(model).keys() != set()
    plain = new_classifier(tiny_config("llama"))
    assert parts_of(plain, "export.towers=false") == Parts(type(plain), plain.config, {})


def test_a_text_model_that_is_no_decoder_by_itself_is_refused() -> None:
    with pytest.raises(UserError, match=r"export\.towers=false: .*qwen3_vl_text.*leave export\.towers out"):
        parts_of(composite("qwen3_vl"), "export.towers=false")


def test_an_adapter_keeps_the_towers_of_its_base_model() -> None:
    with pytest.raises(UserError, match=r"export\.towers.*adapter"):
        run_config("export.towers=false", "export.adapter=true", "model.lora.rank=2", "model.init=pretrained")


@pytest.mark.parametrize(
    "family, text", [("gemma3", "export.towers=false"), ("qwen3_vl", "limit_mm_per_prompt={"), ("llama", "vllm serve")]
)
def test_the_card_shows_how_vllm_loads_it(family: str, text: str) -> None:
    card = model_card(run_config(), wants_text=False, parts=parts_of(composite(family)))
    use, _, _ = card.partition("## Data")
    shown = [t for t in ("export.towers=false", "limit_mm_per_prompt={", "vllm serve") if t in use]
    assert shown == [text]


def test_phimoe_has_the_name_of_its_checkpoints() -> None:
    """vLLM knows PhiMoEForCausalLM; transformers' classes are spelled Phimoe."""
    config = tiny_config("phimoe")
    assert architecture(config, transformers.PhimoeForSequenceClassification) == "PhiMoEForSequenceClassification"
