"""`rmcore average`: the mean of every weight, the reloaded rewards, and the models that it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from rmcore.average import main
from rmcore.config import UserError
from rmcore.hf_export import average as engine
from rmcore.hf_export.average import average
from rmcore.hf_export.parity import ExportError
from tests.harness.exporting import export


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def models(folder: Path, count: int = 3, **changes: Any) -> list[str]:
    """Exports of one architecture with other weights."""
    export(folder / "0", **changes)
    generator = torch.Generator().manual_seed(0)
    for number in range(1, count):
        copy = folder / str(number)
        shutil.copytree(folder / "0", copy)
        for file in copy.glob("*.safetensors"):
            noisy = {
                name: (tensor + 0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
                for name, tensor in load_file(file).items()
            }
            save_file(noisy, file, {"format": "pt"})
    return [str(folder / str(number)) for number in range(count)]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.bfloat16), pytest.param("gpt_neox", torch.float32, marks=pytest.mark.slow)],
    ids=["llama-bf16", "gpt_neox-fp32"],
)
def test_every_weight_is_the_mean(tmp_path: Path, monkeypatch: Any, family: str, dtype: torch.dtype) -> None:
    monkeypatch.setattr(engine, "CHUNK", 4096)  # so that most weights come in several blocks
    given = models(tmp_path, family=family, dtype=dtype, max_shard_size="50KB")
    lines = average(given, str(tmp_path / "out"))
    assert lines[-1].startswith(f"{tmp_path / 'out'}: the average of 3 models; rewards reloaded by transformers differ")
    names = sorted(path.name for path in Path(given[0]).iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names and len(names) > 8, "several files"
    found, each = weights(tmp_path / "out"), [weights(Path(model)) for model in given]
    assert found.keys() == each[0].keys()
    for name, tensor in found.items():
        mean = torch.stack([one[name].double() for one in each]).mean(0)
        assert torch.equal(tensor, mean.to(dtype)), name


def test_plain_transformers_gives_the_rewards_of_the_mean(tmp_path: Path, capsys: Any) -> None:
    """And the mean and deviation of the first model's rewards are left out."""
    given = models(tmp_path)
    changed(Path(given[0]), "config.json", pooler_config={"logit_mean": 1.0, "logit_sigma": 2.0})
    assert main([*given, "-o", str(tmp_path / "out")]) == 0
    assert "those of the first model are left out" in capsys.readouterr().out
    assert "pooler_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    each = [AutoModelForSequenceClassification.from_pretrained(model) for model in given]
    with torch.no_grad():
        for parameters in zip(*(model.double().parameters() for model in each), strict=True):
            parameters[0].copy_(sum(parameters) / len(each))  # type: ignore[arg-type]
        text = torch.arange(20)[None]
        expected = each[0](input_ids=text).logits.item()
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").double()
        assert model(input_ids=text).logits.item() == pytest.approx(expected, abs=1e-5)
        single = AutoModelForSequenceClassification.from_pretrained(given[1]).double()
        assert abs(single(input_ids=text).logits.item() - expected) > 1e-3, "not trivially"


def test_a_wrong_average_is_not_put_in_place(tmp_path: Path, monkeypatch: Any) -> None:
    """The check has a way of its own to the average: here the written one forgets the last model."""
    given = models(tmp_path)
    blocks = engine._mean_blocks
    monkeypatch.setattr(engine, "_mean_blocks", lambda places, *rest: blocks(places[:-1], *rest))
    with pytest.raises(ExportError, match=r"rewards are wrong.*left in .*unverified"):
        average(given, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def changed(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


def _other_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _other_tokens(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def _not_finite(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


DIFFERENT = [
    (lambda folder: changed(folder, "config.json", rms_norm_eps=0.1), r"1 and .*0 cannot be averaged: rms_norm_eps of"),
    (lambda folder: changed(folder, "config.json", id2label={"0": "harm"}), r"cannot be averaged: id2label of config"),
    (_other_template, "cannot be averaged: their chat templates differ"),
    (_other_tokens, "cannot be averaged: their tokenizers differ"),
    (_other_head, r"cannot be averaged: score.weight is missing and F32 \[1, "),
    (_not_finite, r"score.weight holds NaN or Inf in one of the models"),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    models(folder, 2)
    return folder


@pytest.mark.parametrize(("change", "message"), DIFFERENT, ids=[text.split(":")[-1] for _, text in DIFFERENT])
def test_models_that_differ_are_refused(pair: Path, tmp_path: Path, change: Any, message: str) -> None:
    given = [str(shutil.copytree(pair / name, tmp_path / name)) for name in ("0", "1")]
    change(Path(given[1]))
    with pytest.raises(UserError, match=message):
        average(given, str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"], "nothing is left"


def test_one_model_and_no_directory(pair: Path, tmp_path: Path, capsys: Any) -> None:
    given = [str(pair / "0")]
    assert main([*given, "-o", str(tmp_path / "out")]) == 2
    assert "an average needs two models or more, not 1" in capsys.readouterr().err
    assert main([*given, str(tmp_path / "none"), "-o", str(tmp_path / "out")]) == 2
    assert "is not the directory of a model" in capsys.readouterr().err
