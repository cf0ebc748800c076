"""export.adapter: peft and rmcore load the adapter with the rewards of the merged model, and trainings continue it."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification, OlmoeConfig

import rmcore
from rmcore.config import UserError, load_config
from rmcore.config.lora import LoraConfig
from rmcore.config.schema import ModelConfig
from rmcore.data.synthetic import byte_tokenizer
from rmcore.hf_export.adapter import AdapterParts, adapter_parts
from rmcore.hf_export.from_checkpoint import export
from rmcore.hf_export.other_trainers import convert
from rmcore.hf_export.parity import check_export
from rmcore.model.adapter import BaseWeights, check_adapter
from rmcore.model.backbone import load_model
from rmcore.model.classifier import classifier_class, text_model
from rmcore.model.lora import add_lora
from rmcore.train import fit
from tests.harness import exporting
from tests.harness.base_model import save_base
from tests.harness.configs import NEEDED, mistakes

TEXTS = ["Anna has a red lamp. What colour is it? It is red.", "Ben was.", "Who? Carl has it, and so has Dora."]


def settings(base: Path | str, directory: Path, *more: str) -> list[str]:
    return [
        *(f"model.name={base}", "data.train.path=synthetic", "data.template=none", "data.max_tokens=200"),
        *("data.limit=32", "optim.lr=1e-2", "optim.schedule=constant", "parallel.precision=fp32", "run.evals=0"),
        *("log.every=1", "log.tensorboard=false", "log.report=none", "batch.pairs=8", "run.save_every=2"),
        *("model.lora.rank=4", "model.lora.alpha=12", "export.adapter=true", f"run.dir={directory}", *more),
    ]


def train(base: Path | str, directory: Path, *more: str) -> Path:
    fit({}, settings(base, directory, *more))
    return directory / "model"


def by_peft(directory: Path) -> list[float]:
    """Rewards as peft alone computes them."""
    model: Any = peft.AutoPeftModelForSequenceClassification.from_pretrained(directory, num_labels=1).eval()
    return forward(model)


def forward(model: Any) -> list[float]:
    tokenizer = byte_tokenizer()
    ids = [tokenizer(text + tokenizer.eos_token, return_tensors="pt").input_ids for text in TEXTS]
    with torch.no_grad():
        return [float(model(input_ids=one).logits[0, 0]) for one in ids]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("adapter")
    base = save_base(folder / "base")
    train(base, folder / "run", "model.lora.dora=true", "model.lora.rslora=true")
    return base, folder / "run"


def test_peft_and_rmcore_compute_the_rewards_of_the_merged_model(trained: Any, tmp_path: Path) -> None:
    base, run = trained
    assert not list((run / "model").glob("model*.safetensors"))
    said = export(str(run), str(tmp_path / "merged"), ["export.adapter=false"])[-1]
    assert "rewards reloaded by transformers differ by" in said
    expected = forward(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval())
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    on_plain: Any = peft.PeftModel.from_pretrained(plain, run / "model").eval()
    # fp32: some roundings of 1e-7 of numbers near 1, and two layers
    for found in (by_peft(run / "model"), forward(on_plain), rmcore.load(run / "model").score_texts(TEXTS)):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert len({round(value, 3) for value in expected}) == len(TEXTS)
    stored = json.loads((run / "model" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(base) and stored["modules_to_save"] == ["score"]
    assert stored["target_modules"] and all("." not in name for name in stored["target_modules"])


def test_a_training_continues_the_adapter_as_it_is(trained: Any, tmp_path: Path) -> None:
    """With a rate of almost zero the export is the same adapter, to the last bit."""
    base, run = trained
    own = ["model.lora.dora=true", "model.lora.rslora=true", "model.head=stored", "optim.lr=1e-30"]
    before = (run / "model" / "adapter_model.safetensors").read_bytes()
    assert (train(run / "model", tmp_path / "more", *own) / "adapter_model.safetensors").read_bytes() == before
    assert json.loads((tmp_path / "more/model/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    first, after = (
        [json.loads(line)["train/rm/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, tmp_path / "more")
    )
    assert len(first) == len(after) == 4
    assert after[0] < first[0] - 0.01  # the same pairs, after they were trained on


@pytest.mark.parametrize(
    "more, shown",
    [
        ([], "set model.lora.dora=true model.lora.rslora=true model.head=stored; to train all weights, merge it first"),
        (
            ["model.lora.dora=true", "model.lora.rslora=true", "model.head=stored", "model.lora.rank=8"],
            "set model.lora.rank=4;",
        ),
    ],
)
def test_settings_that_would_change_the_adapter(trained: Any, more: list[str], shown: str) -> None:
    with pytest.raises(UserError, match=r"is a LoRA adapter of .*base") as error:
        check_adapter(load_config(None, settings(trained[1] / "model", trained[1], *more)).model)
    assert shown in str(error.value) and "\n" not in str(error.value)


def altered(trained: Any, folder: Path, **changes: Any) -> Path:
    """A copy of the adapter with other values in adapter_config.json."""
    shutil.copytree(trained[1] / "model", folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def without_fingerprint(adapter: Path) -> None:
    """Make it an adapter of an earlier version."""
    path = adapter / "config.json"
    values = json.loads(path.read_text())
    del values["rmcore"]["base_weights"]
    path.write_text(json.dumps(values))


def test_adapters_that_cannot_be_loaded(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"base model is missing: .*no such directory.*adapter_config.json"):
        rmcore.load(altered(trained, tmp_path / "moved", base_model_name_or_path=str(tmp_path / "nowhere")))
    other = save_base(tmp_path / "other", hidden_size=48)
    wrong = altered(trained, tmp_path / "wrong", base_model_name_or_path=str(other))
    with pytest.raises(UserError, match=r"the weights of .*other are not those on which the adapter .*wrong was"):
        rmcore.load(wrong)
    without_fingerprint(wrong)
    with pytest.raises(UserError, match=r"does not fit .*other.* of another shape: .*lora_A.weight \[4, 32\]"):
        rmcore.load(wrong)
    with pytest.raises(UserError, match=r"is an adapter that rmcore exported: `rmcore export .* merges it"):
        convert(str(trained[1] / "model"), str(tmp_path / "out"))
    foreign = altered(trained, tmp_path / "foreign")
    (foreign / "config.json").unlink()
    with pytest.raises(UserError, match=r"is an adapter of .*base, not a model; .*rmcore convert DIR"):
        rmcore.load(foreign)
    whole = altered(trained, tmp_path / "both")
    shutil.copy(trained[0] / "model.safetensors", whole)
    with pytest.raises(UserError, match="transformers would add the adapter"):
        rmcore.load(whole)


def changed_base(base: Path, folder: Path) -> Path:
    """A copy of the base model in which one number is another one."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] += 0.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_an_adapter_belongs_to_the_weights_of_its_base(trained: Any, tmp_path: Path) -> None:
    own = ["model.lora.dora=true", "model.lora.rslora=true", "model.head=stored"]
    other = str(changed_base(trained[0], tmp_path / "changed"))
    moved = altered(trained, tmp_path / "moved", base_model_name_or_path=other)
    of_another = r"the weights of .*changed are not those on which the adapter .*moved was trained"
    with pytest.raises(UserError, match=of_another):
        rmcore.load(moved)
    with pytest.raises(UserError, match=of_another):
        train(moved, tmp_path / "more", *own)
    exported = export(str(trained[1]), str(tmp_path / "again"), [])
    assert "rewards reloaded by transformers" in exported[-1]
    mine, again = (json.loads((one / "config.json").read_text()) for one in (trained[1] / "model", tmp_path / "again"))
    assert mine["rmcore"] == again["rmcore"] and mine["rmcore"]["base_weights"]["rows"] == 259

    without_fingerprint(moved)
    found, expected = (rmcore.load(one).score_texts(TEXTS) for one in (moved, trained[1] / "model"))
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) > 1e-3


def test_the_base_of_an_adapter_may_need_rows_for_the_padding_token(tmp_path: Path) -> None:
    """They are drawn under run.seed, which an evaluation does not know, and no reward depends on them."""
    base, tokenizer = save_base(tmp_path / "base"), byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    tokenizer.save_pretrained(base)
    model = train(base, tmp_path / "run", "run.seed=5", "run.max_steps=1", "run.save_every=null")
    assert json.loads((model / "config.json").read_text())["vocab_size"] == 264
    assert len(rmcore.load(model).score_texts(TEXTS)) == len(TEXTS)


@pytest.mark.parametrize("kind", [pytest.param("bf16", marks=pytest.mark.slow), "nf4"])
def test_an_adapter_of_a_stored_base(trained: Any, tmp_path: Path, kind: str, capfd: Any) -> None:
    """rmcore's rewards are those of the stored base: of the merged export, and of the merged adapter."""
    if kind != "bf16":
        pytest.importorskip("bitsandbytes")
    model = train(trained[0], tmp_path / "run", f"model.lora.base={kind}", "run.max_steps=2")
    assert f"belongs to its {kind} base" in capfd.readouterr().out
    export(str(tmp_path / "run"), str(tmp_path / "merged"), ["export.adapter=false"])
    assert "the adapter" in export(str(model), str(tmp_path / "again"))[-1]
    merged, again = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "again"))
    assert merged.keys() == again.keys() and all(torch.equal(merged[name], again[name]) for name in merged)
    expected = forward(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval())
    torch.testing.assert_close(rmcore.load(model).score_texts(TEXTS), expected, rtol=1e-5, atol=1e-5)
    assert max(abs(a - b) for a, b in zip(by_peft(model), expected, strict=True)) > 1e-4
    card = (model / "README.md").read_text()
    assert "library_name: peft" in card and f"weights in {kind}, which rmcore makes again" in card


@pytest.mark.parametrize(
    "more, shown",
    [
        ([], "export.adapter needs model.lora.rank"),
        (["model.lora.rank=4", "model.init=random"], "model.init=random has none"),
    ],
)
def test_what_has_no_adapter(tmp_path: Path, more: list[str], shown: str) -> None:
    assert shown in "\n".join(mistakes(tmp_path, None, [*NEEDED, "export.adapter=true", *more]))


def test_quantised_checkpoints_are_refused_in_one_sentence(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match=r"its weights are quantised \(gptq\).*model.lora.base=nf4") as error:
        rmcore.load(base, overrides=["data.template=none"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family, dora", [("gpt2", True), ("gpt_neox", False), ("mistral", True)])
def test_families_with_other_names_and_transposed_layers(tmp_path: Path, family: str, dora: bool) -> None:
    """The export checks peft's rewards; merged by rmcore, the model has them too."""
    tokenizer = byte_tokenizer()
    model = exporting.classifier(family, tokenizer)
    model.save_pretrained(tmp_path / "base")
    lora = LoraConfig(rank=3, alpha=12.0, dora=dora)
    adapted = add_lora(text_model(model), lora, seed=1)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name or name == "score.weight":
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    weights = BaseWeights.of(text_model(model), model.config.vocab_size)
    parts = AdapterParts(str(tmp_path / "base"), None, lora, tuple(adapted), weights)
    probe = exporting.export(tmp_path / "out", family, model=model, adapter=parts)
    pad = int(tokenizer.pad_token_id)
    stored = ModelConfig(name=str(tmp_path / "out"), head="stored")
    check_export(load_model(stored, seed=0, vocabulary=len(tokenizer), pad_token_id=pad), probe, torch.float32)


def test_what_peft_could_not_load_is_refused(tmp_path: Path) -> None:
    config, tokenizer = ModelConfig(name=str(save_base(tmp_path / "base"))), byte_tokenizer()
    tokenizer.add_tokens(["<turn>"])
    with pytest.raises(UserError, match=r"no embedding for 1 tokens of the tokenizer, '<turn>' among them"):
        adapter_parts(config, [], LlamaForSequenceClassification, tokenizer)
    with pytest.raises(UserError, match=r"transformers has no class OlmoeForSequenceClassification.*leave export"):
        adapter_parts(config, [], classifier_class(OlmoeConfig()), tokenizer)
