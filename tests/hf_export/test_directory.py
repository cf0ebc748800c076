"""The exported model is the trained one: tiny models of each family, reloaded by plain transformers."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors import safe_open
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from rmcore.bench.models import tiny_config
from rmcore.config import UserError, load_config
from rmcore.data.synthetic import byte_tokenizer
from rmcore.data.tokens.templates import load_template
from rmcore.hf_export.parity import ExportError, Probe, check_export, check_tokenizer, reloaded
from rmcore.model.classifier import architecture, classifier_class
from rmcore.model.reward_model import SHARED
from tests.harness.exporting import classifier, engine, export, texts
from tests.harness.paths import ROOT

NAMES = ["gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gpt2", "bloom"]


@pytest.mark.parametrize("family", NAMES)
def test_plain_transformers_gives_the_engines_rewards(family: str, tmp_path: Path) -> None:
    probe = export(tmp_path / "model", family)
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    alone = [model(input_ids=torch.tensor([ids])).logits[0, 0].item() for ids in probe.token_ids]
    together = model(**tokenizer.pad({"input_ids": list(probe.token_ids)}, return_tensors="pt")).logits[:, 0].tolist()
    # fp32: rewards of size 1, three layers.
    assert alone == pytest.approx(list(probe.rewards), abs=1e-5)
    assert together == pytest.approx(list(probe.rewards), abs=1e-5)
    assert np.std(probe.rewards) > 1e-2, (
        "the rewards differ by more than the tolerance, so the comparison is not trivial"
    )


def test_the_directory_holds_what_other_programs_read(tmp_path: Path) -> None:
    old_mask = os.umask(0o022)
    try:
        export(tmp_path / "runs" / "model")
    finally:
        os.umask(old_mask)
    directory = tmp_path / "runs" / "model"
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "reward"} and config["label2id"] == {"reward": 0}
    assert config["problem_type"] == "regression" and config["dtype"] == "float32"
    assert config["pad_token_id"] == byte_tokenizer().pad_token_id != config["eos_token_id"]
    assert "rmcore" not in json.dumps(config), "the engine's attention is not part of the model"
    with safe_open(directory / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert (
        "score.weight" in names
        and "score.bias" not in names
        and all(name.startswith(("model.", "score.")) for name in names)
    )
    assert (directory / "README.md").read_text() == "a card\n"
    saved = load_config(str(directory / "rmcore_config.yaml"), ["run.dir=elsewhere"])
    assert saved.data.template == "simple_chat"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.padding_side == "right"
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == f"User: Q\n\nAssistant: A{tokenizer.eos_token}"
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in directory.iterdir()}
    assert set(modes.values()) == {"0o644"}, modes
    assert [path.name for path in directory.parent.iterdir()] == ["model"], "no temporary directory is left"


def test_the_pipeline_gives_the_reward_itself(tmp_path: Path) -> None:
    """Without a sigmoid, which would change rewards outside of 0..1."""
    export(tmp_path / "model")
    scorer = pipeline("text-classification", str(tmp_path / "model"), device="cpu")
    ids = scorer.tokenizer("Hello there", return_tensors="pt").input_ids
    reward = scorer.model(input_ids=ids).logits[0, 0].item()
    assert scorer("Hello there")[0] == {"label": "reward", "score": pytest.approx(reward, abs=1e-6)}


@pytest.mark.parametrize(
    "family, written",
    [
        ("gemma3_text", "Gemma3ForSequenceClassification"),  # after Gemma3ForCausalLM; transformers: Gemma3Text...
        ("olmoe", "OlmoeForSequenceClassification"),  # made here
        ("gpt2", "GPT2ForSequenceClassification"),  # GPT2LMHeadModel
    ],
)
def test_servers_find_the_decoder_by_the_name_of_the_class(family: str, written: str) -> None:
    config = tiny_config(family)
    assert architecture(config, classifier_class(config)) == written


def test_large_models_are_written_in_shards(tmp_path: Path) -> None:
    export(tmp_path / "model", max_shard_size="50KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    assert len(list((tmp_path / "model").glob("model-*-of-*.safetensors"))) > 1


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_servers_find_what_they_read(family: str, tmp_path: Path) -> None:
    """What vLLM and SGLang read of the directory, according to their sources in 2026; tests/peers/vllm.py runs vLLM.

    vLLM: an architecture that ends in ForSequenceClassification makes a pooling model with task classify
    (vllm/config/model.py); `score.weight` is read into a linear layer without bias of `num_labels` outputs and applied
    to the last token (model_executor/models/adapters.py); problem_type regression means no activation in the classify
    task, and sentence_transformers.activation_fn, which must begin with torch.nn.modules., none in the score task
    (model_executor/layers/pooler/activations.py). SGLang: LlamaForSequenceClassification reads config.num_labels and
    `score.weight`, and applies it to the last token, without activation (srt/models/llama_reward.py).
    """
    export(tmp_path / "model", family)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    [name] = config["architectures"]
    assert name.endswith("ForSequenceClassification")
    assert AutoConfig.from_pretrained(tmp_path / "model").num_labels == 1
    assert config["problem_type"] == "regression"
    path, _, name = config["sentence_transformers"]["activation_fn"].rpartition(".")
    assert path.startswith("torch.nn.modules.") and getattr(importlib.import_module(path), name) is torch.nn.Identity
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as weights:
        assert weights.get_slice("score.weight").get_shape()[0] == 1 and "score.bias" not in weights.keys()  # noqa: SIM118
    assert "pooler_config" not in config, "normalisation is off by default"


def test_bf16_weights_pass_within_their_rounding_and_a_wrong_reward_does_not(tmp_path: Path) -> None:
    probe = export(tmp_path / "model", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    parity = check_export(reloaded(tmp_path / "model"), probe, torch.bfloat16)
    assert 1e-5 < parity.difference <= parity.allowed, "rounded weights move rewards by more than fp32 would"
    # The reward of another text, as a loader that reads a wrong token would give it.
    swapped = [probe.rewards[1], probe.rewards[0], *probe.rewards[2:]]
    assert abs(swapped[0] - swapped[1]) > parity.allowed
    with pytest.raises(ExportError, match=r"text [01] has"):
        check_export(reloaded(tmp_path / "model"), Probe(probe.token_ids, swapped), torch.bfloat16)


def test_a_wrong_reward_keeps_the_former_export(tmp_path: Path) -> None:
    probe = export(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    wrong = Probe(probe.token_ids, [*probe.rewards[:-1], probe.rewards[-1] + 1e-4])
    with pytest.raises(ExportError, match=r"text 5 has .*left in .*model\.unverified"):
        export(tmp_path / "model", probe=wrong)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert (tmp_path / "model.unverified" / "config.json").is_file()
    export(tmp_path / "model", "gpt_neox")  # and a right one replaces it
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "gpt_neox"


def test_a_nan_reward_is_wrong(tmp_path: Path) -> None:
    probe = export(tmp_path / "model")
    with pytest.raises(ExportError, match="nan"):
        check_export(
            reloaded(tmp_path / "model"), Probe(probe.token_ids, [float("nan"), *probe.rewards[1:]]), torch.float32
        )


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    state, _ = engine(classifier("llama", tokenizer), texts(tokenizer), SHARED)
    wrapped = {name.replace("backbone.", "backbone._orig_mod."): tensor for name, tensor in state.items()}
    with pytest.raises(ExportError, match=r"weights do not fit LlamaForSequenceClassification: model\."):
        export(tmp_path / "model", state=wrapped)
    state["score.weight"] = torch.zeros(2, 32)
    with pytest.raises(ExportError, match=r"1 weights do not fit .* score.weight: \(2, 32\), expected \(1, 32\)"):
        export(tmp_path / "model", state=state)
    assert list(tmp_path.iterdir()) == []


def test_padding_that_equals_eos_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(UserError, match="equals EOS"):
        export(tmp_path / "model", tokenizer=tokenizer)


def test_a_directory_that_is_not_a_model_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not an exported model"):
        export(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="no directory in which nobody can write")
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "model", Path("/proc/self/model")):
        with pytest.raises(UserError, match=f"{place} cannot be written: .*: export elsewhere"):
            export(place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_an_altered_tokenizer_is_noticed(tmp_path: Path) -> None:
    probe = export(tmp_path / "model")
    tokenizer = byte_tokenizer()
    template = load_template("simple_chat", tokenizer)
    check_tokenizer(tmp_path / "model", tokenizer, template, probe.token_ids)
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(ExportError, match="chat template"):
        check_tokenizer(tmp_path / "model", tokenizer, template, probe.token_ids)


@pytest.mark.parametrize("template", ["simple_chat", "none"])
def test_a_tokenizer_that_adds_bos_by_itself(template: str, tmp_path: Path) -> None:
    """Training texts begin with one BOS, and so do the texts of the exported chat template; no text has two."""
    tokenizer = byte_tokenizer()
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]} $B", special_tokens=[bos]
    )
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    export(tmp_path / "model", template=template, tokenizer=tokenizer)
    exported = AutoTokenizer.from_pretrained(tmp_path / "model")
    # vLLM's score task tokenises a prompt and an answer as a pair.
    assert exported("on", "ce").input_ids == exported("once").input_ids
    turns = [{"role": "user", "content": "Once"}, {"role": "assistant", "content": "upon"}]
    if template == "none":
        assert exported.chat_template is None
        return
    ids = exported.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert ids.count(exported.bos_token_id) == 1 and ids[0] == exported.bos_token_id
    assert ids == exported(f"{exported.bos_token}User: Once\n\nAssistant: upon{exported.eos_token}").input_ids


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_tokenizer_that_fills_the_embedding_and_pads_with_eos(tmp_path: Path, strategy: str) -> None:
    """As SmolLM2: the padding token that rmcore adds has no row until the embedding grows."""
    tokenizer = byte_tokenizer()
    full = re.sub(r"<pad>", "<other>", tokenizer.backend_tokenizer.to_str())
    stored = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(full), pad_token="<eos>", eos_token="<eos>", bos_token="<bos>"
    )
    stored.save_pretrained(tmp_path / "model")
    config = transformers.LlamaConfig(
        vocab_size=len(stored),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=stored.eos_token_id,
        eos_token_id=stored.eos_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    words = [
        *(f"model.name={tmp_path / 'model'}", "data.train.path=synthetic", "data.limit=8", "data.template=none"),
        *("batch.pairs=4", "parallel.precision=fp32", f"parallel.strategy={strategy}", "run.max_steps=1"),
        *(f"data.cache={tmp_path}", f"run.dir={tmp_path / 'run'}", "log.report=none"),
    ]
    done = subprocess.run([sys.executable, "-m", "rmcore.train", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    rows = exported.get_input_embeddings().weight.shape[0]
    assert rows == 264 > exported.config.pad_token_id == len(stored), "259 tokens and <pad>, to a multiple of 8"
