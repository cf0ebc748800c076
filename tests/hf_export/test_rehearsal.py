"""What would fail in the export after the training fails before it, in a run and in `rmcore validate`."""

import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers.processors import ByteLevel, RobertaProcessing, Sequence, TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    pipeline,
)

import rmcore.hf_export.rehearsal as rehearsal
from rmcore.bench.models import tiny_config
from rmcore.config import Config, UserError, load_config
from rmcore.config.schema import ModelConfig
from rmcore.cost.dry_run import DryRun
from rmcore.data.prepare import prepare_data
from rmcore.data.synthetic import byte_tokenizer
from rmcore.data.tokens.encoder import TextEncoder
from rmcore.data.tokens.templates import NAMED_TEMPLATES, load_template
from rmcore.data.tokens.tokenizer import load_tokenizer
from rmcore.evaluation.trained import evaluation_config
from rmcore.hf_export.directory import Package, exported_tokenizer, write_model
from rmcore.hf_export.parity import ExportError, check_tokenizer, depth
from rmcore.model.backbone import load_model, load_model_config, position_limit
from rmcore.model.classifier import decoder_class
from rmcore.model.fp32_parts import kept_in_fp32
from rmcore.model.lazy_model import open_lazy_model
from rmcore.model.meta_model import set_padding
from rmcore.parallel.world import running_world
from rmcore.scoring.scorer import Scorer
from rmcore.training import publish
from rmcore.training import rehearsal as of_run
from rmcore.training.assembly import assemble
from rmcore.training.run_directory import check_disk
from rmcore.validate import main as validate
from tests.harness.crash import run
from tests.harness.exporting import export
from tests.harness.small_run import arguments

CHAT = NAMED_TEMPLATES["zephyr"]
TURNS = [{"role": "user", "content": "Once"}, {"role": "assistant", "content": "upon a time"}]
TEXT = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def model_directory(folder: Path, config: transformers.PretrainedConfig, template: str | None = CHAT) -> Path:
    """A base model without weights, with the byte tokenizer and a chat template."""
    config.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def llama(**more: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**{**TEXT, **IDS, **more})


def command(folder: Path, model: Path, *more: str) -> list[str]:
    """A run of two steps on chat rows; the last value of a key counts."""
    rows = folder / "rows.jsonl"
    answers = [("yes", "no"), ("certainly not", "I do not know")] * 6
    turns = [[{"role": "user", "content": f"Question {number}?"}] for number in range(len(answers))]
    rows.write_text(
        "".join(
            json.dumps({"prompt": prompt, "chosen": [_said(good)], "rejected": [_said(bad)]}) + "\n"
            for prompt, (good, bad) in zip(turns, answers, strict=True)
        )
    )
    needed = [f"model.name={model}", "model.init=random", f"data.train.path={rows}", "batch.pairs=6"]
    quiet = ["log.report=none", "log.tensorboard=false", "run.evals=0", "run.save_minutes=null"]
    places = [f"data.cache={folder / 'cache'}", f"run.dir={folder / 'run'}"]
    return [*needed, "data.max_tokens=256", "parallel.precision=fp32", *quiet, *places, *more]


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def rehearsed(words: list[str]) -> tuple[rehearsal.Sizes, str]:
    config = load_config(None, words)
    tokenizer = load_tokenizer(config)
    data = prepare_data(config, tokenizer, None)
    return rehearsal.rehearse(config, tokenizer, data.template, data.train)


# ---- in a run and in validate


CHANCE = "{{ range(90000) | random }}" * 3  # two renderings are equal once in 10^15 times


def test_a_template_that_draws_at_random_ends_a_run_before_its_first_step(tmp_path: Path, capsys: Any) -> None:
    template = CHANCE + CHAT
    words = command(tmp_path, model_directory(tmp_path / "model", llama(), template))
    outcome = run(tmp_path / "run", words, publish=True)
    assert outcome.codes == [2], outcome.text
    line = outcome.text.strip().splitlines()[-1]
    assert line.startswith("rmcore.train: the trained model could not be exported, so no training starts: ")
    assert "the exported chat template renders" in line and "draws at random" in line
    assert outcome.status["status"] == "failed"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not list((tmp_path / "run").glob("*model*")), "nothing of the rehearsal stays"
    assert validate(words) == 2
    assert "export: the trained model could not be exported, so no training starts: " in capsys.readouterr().err


@pytest.mark.distributed
def test_two_ranks_rehearse_and_train_as_without_a_rehearsal(tmp_path: Path) -> None:
    """Bit-identical weights, and a directory that a killed process left is removed."""
    given = arguments(tmp_path, "run.max_steps=2", "parallel.strategy=zero3")
    plain = run(tmp_path / "plain", given, 2)
    left = tmp_path / "run" / ".tmp-model-1"
    left.mkdir(parents=True)
    outcome = run(tmp_path / "run", given, 2, publish=True)
    assert plain.codes == outcome.codes == [0, 0], outcome.text
    assert outcome.text.count("export rehearsed in") == 1 and not left.exists()
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert len(exported) == len(plain.weights)
    for name, tensor in plain.weights.items():
        assert np.array_equal(exported[name.replace("backbone.", "model.")].numpy(), tensor), name


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", [pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_files_that_are_no_model_in_the_place_of_the_export_are_refused(tmp_path: Path, strategy: str) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "thesis.tex").write_text("years of work")
    given = arguments(tmp_path, f"parallel.strategy={strategy}")
    outcome = run(tmp_path / "run", given, 2, publish=True)
    assert outcome.codes == [2, 2], outcome.text
    assert outcome.text.count("exists and is not an exported model") == 1 and "Traceback" not in outcome.text
    assert (tmp_path / "run" / "model" / "thesis.tex").read_text() == "years of work"


def test_a_large_model_is_checked_without_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "WHOLE", 0)
    written: list[Any] = []
    monkeypatch.setattr(rehearsal, "write_model", lambda *_: written.append(1))
    words = command(tmp_path, model_directory(tmp_path / "model", llama()))
    sizes, line = rehearsed(words)
    assert "without its weights" in line and not written and sizes.exported == 4 * sizes.weights
    adapted, line = rehearsed([*words, "model.lora.rank=4"])
    assert "without its weights" in line and adapted.weights == sizes.weights
    widths = (32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64)  # in and out of q, k, v, o and the three of the MLP
    assert adapted.trained == 32 + 2 * 4 * widths, "the score head, and in two layers A and B of rank 4"
    (tmp_path / "model" / "chat_template.jinja").write_text(CHANCE + CHAT)
    with pytest.raises(UserError, match=r"could not be exported.*draws at random"):
        rehearsed(words)


def test_a_large_model_gathers_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = command(tmp_path, model_directory(tmp_path / "model", llama()))
    (tmp_path / "run").mkdir()
    with running_world() as world:
        state = assemble(load_config(None, words), world)
        sizes = of_run.sizes_of(state)
        monkeypatch.setattr(state.strategy, "whole_tensors", None)
        assert "without its weights" in of_run.rehearse(state, sizes._replace(exported=10**12))
        with pytest.raises(UserError, match="NoneType"):
            of_run.rehearse(state, sizes)
    assert not list((tmp_path / "run").iterdir())


def test_the_room_for_checkpoints_and_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """16 bytes per trained weight and checkpoint; of three checkpoints the last makes room before the export."""
    config = load_config(None, command(tmp_path, tmp_path, "run.save_minutes=5", "run.keep=2"))
    sizes = rehearsal.Sizes(weights=10**9, trained=10**9, exported=4 * 10**9)
    usage = shutil.disk_usage(tmp_path)
    one = 12 * 10**9
    for free, fits in ((3 * one, True), (3 * one - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if fits:
            check_disk(config, sizes)
            continue
        with pytest.raises(UserError) as error:
            check_disk(config, sizes)
        assert "3 checkpoints of 12 GB and the exported model of 4 GB need 36 GB, 36 GB are free" in str(error.value)
    few = sizes._replace(trained=10**6)  # LoRA: small checkpoints, and a whole model in the end
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 * 10**9))
    with pytest.raises(UserError, match=r"the exported model of 4 GB need 4.02 GB"):
        check_disk(config, few)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**5))
    assert validate(command(tmp_path, model_directory(tmp_path / "model", llama()))) == 2
    assert "failed   run.dir" in capsys.readouterr().out


# ---- kinds of models


def test_a_composite_config_keeps_its_sizes_and_tokens_in_its_text_part(tmp_path: Path) -> None:
    text = {**TEXT, **IDS, "sliding_window": 16}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 16, "patch_size": 8})
    for name in ("num_hidden_layers", "max_position_embeddings", "eos_token_id"):
        assert not hasattr(config, name)
    words = command(tmp_path, model_directory(tmp_path / "model", config))
    whole, line = rehearsed(words)
    text, text_line = rehearsed([*words, "export.towers=false"])
    assert all("rewards reloaded by transformers differ by" in one for one in (line, text_line))
    assert text.trained == text.weights < whole.weights and text.exported == 4 * text.weights
    stored = load_model_config(load_config(None, words).model)
    assert position_limit(stored) == 512
    assert DryRun(stored).sizes.layers == 2 and DryRun(stored).token_bytes("fp32", "none").total > 0
    with pytest.raises(UserError, match=r"data.max_tokens"):
        prepare_data(load_config(None, [*words, "data.max_tokens=1000"]), byte_tokenizer(), position_limit(stored))


def test_the_depth_of_a_model_whose_config_does_not_state_it() -> None:
    """As in configs that come with code of their own, where the number may have another name."""
    with torch.device("meta"):
        model: Any = transformers.LlamaForSequenceClassification(llama(num_hidden_layers=5))
    assert depth(model) == 5
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_layers=5))
    assert depth(model) == 5


def test_an_auto_map_without_its_code_is_dropped(tmp_path: Path) -> None:
    """As in models whose code has become part of transformers."""
    folder = model_directory(tmp_path / "model", llama())
    for name, classes in (("config.json", "configuration_x.X"), ("tokenizer_config.json", ["tokenization_x.X", None])):
        values = json.loads((folder / name).read_text())
        values["auto_map"] = {"AutoConfig" if name == "config.json" else "AutoTokenizer": classes}
        (folder / name).write_text(json.dumps(values))
    config = load_config(None, command(tmp_path, folder))
    model = load_model(config.model, seed=0, vocabulary=264, pad_token_id=0)
    assert model.config.auto_map == {"AutoConfig": "configuration_x.X"}
    place = written(model, tmp_path / "out", config)
    assert "auto_map" not in (place / "config.json").read_text() + (place / "tokenizer_config.json").read_text()
    AutoModelForSequenceClassification.from_pretrained(place, trust_remote_code=True)
    AutoTokenizer.from_pretrained(place, trust_remote_code=True)


LOADING: dict[str, Any] = {"seed": 0, "vocabulary": 264, "pad_token_id": 0}
CODE = {
    "configuration_toy.py": "from transformers import LlamaConfig\n\n\nclass ToyConfig(LlamaConfig):\n"
    "    model_type = 'toy'\n",
    "part_toy.py": "def double(x):\n    return 2 * x\n",
    "modeling_toy.py": """
from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

from .configuration_toy import ToyConfig
from .part_toy import double


class ToyForSequenceClassification(LlamaPreTrainedModel):
    config_class = ToyConfig
    forward = GenericForSequenceClassification.forward

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
""",
}


def test_code_that_comes_with_the_model_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = model_directory(tmp_path / "model", llama())
    for name, code in CODE.items():
        (folder / name).write_text(code)
    values = json.loads((folder / "config.json").read_text()) | {"model_type": "toy"}
    values["auto_map"] = {
        "AutoConfig": "configuration_toy.ToyConfig",
        "AutoModelForSequenceClassification": "modeling_toy.ToyForSequenceClassification",
        "AutoModelForCausalLM": "elsewhere_toy.ToyForCausalLM",  # its file is missing in the base model, too
    }
    (folder / "config.json").write_text(json.dumps(values))
    words = command(tmp_path, folder, "model.trust_remote_code=true")
    assert "rewards reloaded by transformers" in rehearsed(words)[1]
    config = load_config(None, words)
    place = written(load_model(config.model, seed=0, vocabulary=264, pad_token_id=0), tmp_path / "out", config)
    assert set(CODE) <= {path.name for path in place.iterdir()}
    kept = json.loads((place / "config.json").read_text())["auto_map"]
    assert set(kept) == {"AutoConfig", "AutoModelForSequenceClassification"}


DECODER = """
from transformers import LlamaForCausalLM

from .configuration_toy import ToyConfig
from .part_toy import double


class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig
"""


def model_of_code(directory: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, **more: str) -> Path:
    """A model with code of its own, with `more` in auto_map."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(directory / "modules"))
    monkeypatch.syspath_prepend(str(directory / "modules"))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:  # of another test
        monkeypatch.delitem(sys.modules, name)
    folder = model_directory(directory / "model", llama())
    for name, code in {**CODE, "modeling_toy.py": DECODER}.items():
        (folder / name).write_text(code.replace("'toy'", repr(model_type)))
    values = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
    values["auto_map"] = {"AutoConfig": "configuration_toy.ToyConfig", **more}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_code_of_a_decoder_without_a_classifier_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most code on the hub has a class for the next token only: the classifier is made of it, and exported with it."""
    folder = model_of_code(tmp_path, monkeypatch, "toy", AutoModelForCausalLM="modeling_toy.ToyForCausalLM")
    words = command(tmp_path, folder, "model.trust_remote_code=true")
    assert "rewards reloaded by transformers" in rehearsed(words)[1]
    config = load_config(None, words)
    model = load_model(config.model, seed=0, vocabulary=264, pad_token_id=0)
    assert type(model).__name__ == "ToyForSequenceClassification" and "lm_head.weight" not in model.state_dict()
    place = written(model, tmp_path / "out", config)
    assert set(CODE) <= {path.name for path in place.iterdir()}
    again = load_model(ModelConfig(name=str(place), head="stored", trust_remote_code=True), **LOADING)
    lazy = open_lazy_model(ModelConfig(name=str(place), head="stored", trust_remote_code=True), **LOADING)
    assert type(lazy.build()) is type(again)
    assert all(torch.equal(t.bfloat16().float(), again.state_dict()[name]) for name, t in model.state_dict().items())
    with pytest.raises(UserError, match="contains custom code"):
        load_model(ModelConfig(name=str(place), head="stored"), **LOADING)


@pytest.mark.parametrize("model_type, more", [("toy", "$"), ("olmo", ": set model.trust_remote_code=false")])
def test_code_without_a_decoder_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, more: str
) -> None:
    folder = model_of_code(tmp_path, monkeypatch, model_type)
    with pytest.raises(UserError, match=f"has no AutoModelForSequenceClassification or AutoModelForCausalLM{more}"):
        rehearsed(command(tmp_path, folder, "model.trust_remote_code=true"))


def written(model: Any, place: Path, config: Config, tokenizer: Any = None, template: Any = None) -> Path:
    """The export of a model, not yet checked."""
    tokenizer = tokenizer or load_tokenizer(config)
    package = Package(
        model_class=type(model),
        hf_config=model.config,
        tokenizer=tokenizer,
        template=template or load_template("zephyr", tokenizer),
        dtype=torch.bfloat16,
        card="",
        config_yaml="",
        trust_remote_code=config.model.trust_remote_code,
    )
    prefix = f"{model.base_model_prefix}."
    state = {name.replace(prefix, "backbone.", 1): tensor for name, tensor in model.state_dict().items()}
    return write_model({n: tuple(t.shape) for n, t in state.items()}, state.items(), package, place)


def test_stored_buffers_keep_their_precision(tmp_path: Path) -> None:
    """DeepSeek V3 adds a stored bias to its router's scores: bf16 would change which experts are chosen."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    sizes = {**TEXT, **IDS, "num_key_value_heads": 4, "first_k_dense_replace": 1, "moe_intermediate_size": 32}
    sizes |= {**experts, **ranks}
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForSequenceClassification(transformers.DeepseekV3Config(**sizes, num_labels=1))
    name, bias = next((n, b) for n, b in model.named_buffers() if "correction_bias" in n)
    bias.copy_(torch.tensor([0.30001, 0.29999, 0.1, 0.2]))
    place = written(model, tmp_path / "out", load_config(None, command(tmp_path, Path("synthetic"))))
    stored = load_file(place / "model.safetensors")
    assert torch.equal(stored[name], bias) and stored["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_weights_that_transformers_loads_in_fp32_are_written_so(tmp_path: Path) -> None:
    """In bf16 a router can send tokens to other experts than the trained one does."""
    config = tiny_config("ernie4_5_moe")
    set_padding(config, 0)
    torch.manual_seed(0)
    decoder_class(type(config))._from_config(config).save_pretrained(tmp_path / "base")

    def loaded(place: Path) -> PreTrainedModel:
        return load_model(ModelConfig(name=str(place)), seed=1, vocabulary=264, pad_token_id=0)

    model = loaded(tmp_path / "base")
    place = written(model, tmp_path / "out", load_config(None, command(tmp_path, Path("synthetic"))))
    again, kept = loaded(place), kept_in_fp32(model)
    assert kept and all(torch.equal(again.get_parameter(name), model.get_parameter(name)) for name in kept)
    dtypes = [tensor.dtype for tensor in load_file(place / "model.safetensors").values()]
    assert dtypes.count(torch.float32) == len(kept) < dtypes.count(torch.bfloat16)


# ---- token ids


def adding(kind: str) -> PreTrainedTokenizerFast:
    """The byte tokenizer, which adds something to every text by itself, as tokenizers of base models do."""
    tokenizer = byte_tokenizer()
    bos, eos = ((token, tokenizer.convert_tokens_to_ids(token)) for token in (tokenizer.bos_token, tokenizer.eos_token))
    special = [bos, eos]
    front = TemplateProcessing(single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]}:1 $B:1", special_tokens=special)
    processors: dict[str, Any] = {
        "bos": front,
        "bytes and bos": Sequence([ByteLevel(trim_offsets=False), front]),
        "bos and eos": TemplateProcessing(single=f"{bos[0]} $A {eos[0]}", special_tokens=special),
        "eos": TemplateProcessing(single=f"$A {eos[0]}", special_tokens=special),
        "roberta": RobertaProcessing(eos, bos),
        "nothing": ByteLevel(trim_offsets=False),
    }
    tokenizer.backend_tokenizer.post_processor = processors[kind]
    return tokenizer


TEMPLATES = {"no bos": CHAT, "bos": "{{ bos_token }}" + CHAT, "plain": None}


@pytest.mark.parametrize("template", list(TEMPLATES))
@pytest.mark.parametrize("kind", ["bos", "bytes and bos", "bos and eos", "eos", "roberta", "nothing"])
def test_every_way_to_tokenise_gives_the_ids_of_the_training(kind: str, template: str, tmp_path: Path) -> None:
    """A rendered text with and without special tokens, and the template itself; never a second BOS or EOS."""
    tokenizer = adding(kind)
    tokenizer.chat_template = TEMPLATES[template]
    trained = load_template("tokenizer" if template != "plain" else "none", tokenizer)
    encoder = TextEncoder(tokenizer)
    exported_tokenizer(tokenizer, trained).save_pretrained(tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    check_tokenizer(tmp_path, tokenizer, trained, [encoder.encode([f"Once upon{tokenizer.eos_token}"])[0].tolist()])
    if template == "plain":
        text = f"Once upon a time{tokenizer.eos_token}"
        assert exported(text).input_ids == encoder.encode([text])[0].tolist()
        return
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    expected = encoder.encode([text])[0].tolist()
    assert expected.count(tokenizer.bos_token_id) == (
        1 if "bos" in kind or kind == "roberta" or template == "bos" else 0
    )
    rendered = exported.apply_chat_template(TURNS, tokenize=False)
    assert exported.apply_chat_template(TURNS, tokenize=True, return_dict=False) == expected
    assert exported(rendered).input_ids == exported(rendered, add_special_tokens=False).input_ids == expected
    assert exported.backend_tokenizer.encode(rendered).ids == expected, "programs that read tokenizer.json alone"


# A word of this tokenizer begins with the sign for a space, and so does the first one of a text.
WORDS = {"<unk>": 0, "</s>": 1, "<s>": 2, "\u2581": 3, "<": 4, "|": 5, ">": 6, "user": 7, "assistant": 8, "\n": 9}
WORDS |= {letter: 10 + place for place, letter in enumerate("Onceuptaimrsib?.e")} | {"\u2581<": 60}


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "CodeLlamaTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_tokenizers_with_classes_of_their_own(kind: str, template: str, tmp_path: Path) -> None:
    """Llama's marks the first word of a text, but not the word behind a BOS; CodeLlama's always adds BOS."""
    merges = [("\u2581", "<")]
    given: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    backend = transformers.LlamaTokenizer(vocab=WORDS, merges=merges, legacy=False, **given)
    backend.add_bos_token = True
    backend.chat_template = TEMPLATES[template]
    backend.save_pretrained(tmp_path / "base")
    values = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text()) | {"tokenizer_class": kind}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(values))
    config = load_config(None, command(tmp_path, tmp_path / "base"))
    tokenizer = load_tokenizer(config)
    encoder = TextEncoder(tokenizer)
    assert encoder.bos == 2
    if kind == "LlamaTokenizer":
        marked, unmarked = (encoder.encode([text])[0].tolist() for text in ("<|", "<s><|"))
        assert marked == [2, 60, 5] and unmarked == [2, 4, 5]
    trained = load_template("tokenizer" if template != "plain" else "none", tokenizer)
    config = load_config(None, command(tmp_path, Path("synthetic")))
    model = load_model(config.model, seed=0, vocabulary=264, pad_token_id=0)
    place = written(model, tmp_path / "out", config, tokenizer, trained)
    check_tokenizer(place, tokenizer, trained, [encoder.encode(["Once</s>"])[0].tolist()])


def test_a_tokenizer_that_adds_bos_to_rendered_texts_is_noticed(tmp_path: Path) -> None:
    tokenizer = adding("bos")
    trained = load_template("zephyr", tokenizer)
    export(tmp_path / "model", template="zephyr", tokenizer=tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + CHAT
    tokenizer.save_pretrained(tmp_path / "model")  # as exported before: the template and the tokenizer write BOS
    with pytest.raises(ExportError, match=r"add_special_tokens=True, gives other token ids .* from token 0 on \[2, 2"):
        check_tokenizer(tmp_path / "model", tokenizer, trained, [])


def test_the_chat_template_survives_byte_for_byte(tmp_path: Path) -> None:
    """White space at its ends, characters beyond ASCII and long lines."""
    source = "  {# \u00fc\u4e16\u754c #}\n" + CHAT + "{# " + "x" * 300 + " #}\n\n \t\n"
    (tmp_path / "own.jinja").write_text(source, encoding="utf-8")
    export(tmp_path / "model", template=str(tmp_path / "own.jinja"))
    assert (tmp_path / "model" / "chat_template.jinja").read_bytes() == source.encode()


def test_the_pipeline_and_rmcore_give_the_reward_of_the_template(tmp_path: Path) -> None:
    """A text that the exported template has rendered, in a pipeline, which tokenises with special tokens."""
    export(tmp_path / "model", template="zephyr", tokenizer=adding("bos"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    ids = tokenizer.apply_chat_template(TURNS, return_tensors="pt", return_dict=False)
    expected = model(input_ids=ids).logits[0, 0].item()
    piped = pipeline("text-classification", str(tmp_path / "model"), device="cpu")
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert piped(text)[0]["score"] == pytest.approx(expected, abs=1e-6)

    values = load_config(str(tmp_path / "model" / "rmcore_config.yaml"), ["data.template=zephyr"])
    (tmp_path / "model" / "rmcore_config.yaml").write_text(values.dump_yaml())
    assert evaluation_config(str(tmp_path / "model"), "x", []).data.template == "tokenizer", "zephyr writes no BOS"
    scorer = Scorer(str(tmp_path / "model"))
    for row in ({"messages": TURNS}, {"text": text}, {"text": text.removeprefix(tokenizer.bos_token)}):
        [[found]] = scorer.encode([scorer.render(row, "a row")])
        assert found.ids.tolist() == ids[0].tolist(), row


def test_bos_of_the_template_is_not_cut_either(tmp_path: Path) -> None:
    """A run on the base model cuts the oldest tokens behind BOS, which the tokenizer adds; so does the export."""
    found = []
    base = model_directory(tmp_path / "base", llama())
    tokenizer = adding("bos")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(base)
    again = shutil.copytree(base, tmp_path / "again")
    exported_tokenizer(tokenizer, load_template("zephyr", tokenizer)).save_pretrained(again)
    for folder in (base, again):
        words = command(tmp_path, folder, "data.max_tokens=40", "data.length_policy=truncate_left")
        config = load_config(None, [*words, "data.template=tokenizer"])
        data = prepare_data(config, load_tokenizer(config), None).train
        found.append([data.comparison(n).text(answer).tolist() for n in range(len(data)) for answer in (0, 1)])
        assert max(map(len, found[-1])) == 40 and all(text[0] == tokenizer.bos_token_id for text in found[-1])
    assert found[0] == found[1]


# ---- cost


SHAPES = {
    "7.6 million": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4},
    "124 million": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", list(SHAPES))
def test_what_a_rehearsal_costs(
    shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prints seconds of the processor, on one thread, because the clock depends on what else the machine does."""
    monkeypatch.setattr(publish, "WORTH_ALL_CORES", 10**12)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = transformers.GPTNeoXConfig(**SHAPES[shape], vocab_size=50304, max_position_embeddings=2048, **IDS)
        words = command(tmp_path, model_directory(tmp_path / "model", config))
        (tmp_path / "run").mkdir()
        with running_world() as world:
            state = assemble(load_config(None, words), world)
            began = time.process_time()
            line = of_run.rehearse(state, of_run.sizes_of(state))
            seconds = time.process_time() - began
    finally:
        torch.set_num_threads(threads)
    with capsys.disabled():
        print(f"\nGPT-NeoX of {shape} weights: {seconds:.1f} s of one core; {line}")
    assert "rewards reloaded by transformers" in line
