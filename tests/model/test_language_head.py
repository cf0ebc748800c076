"""The language-modelling loss of chosen answers against the padded AutoModelForCausalLM in fp64, and in whole runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import rmcore
from rmcore.config import UserError, load_config
from rmcore.config.schema import ModelConfig
from rmcore.data.batches.answers import chosen_tokens_N
from rmcore.data.batches.batch import build_batch
from rmcore.data.batches.step_plan import Plan
from rmcore.data.synthetic import byte_tokenizer
from rmcore.data.tokens.comparisons import EncodedRow, TokenizedComparisons
from rmcore.hf_export.from_checkpoint import export
from rmcore.hf_export.parity import ExportError
from rmcore.hf_export.weights import write_weights
from rmcore.model.language_head import language_head, language_loss
from rmcore.model.reward_model import PATHS, SHARED, RewardModel
from tests.harness.configs import NEEDED, mistakes
from tests.harness.crash import Fault, Outcome, run
from tests.harness.oracle import FAMILIES, PAD, Wide, assert_close
from tests.harness.small_run import ROUNDING, arguments, metrics, same, stored_weights

FP64 = 1e-11  # a few hundred terms of size 1, each rounded at 1.1e-16, through three layers


@pytest.mark.parametrize("block", [7, 100, 2**25])
def test_value_and_gradients_of_the_loss_in_blocks(block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (11, 23))
    target = torch.randint(23, (11,), generator=generator)
    ours, theirs = ([x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
    loss = language_loss(*ours, target, block)
    expected = F.cross_entropy(theirs[0] @ theirs[1].T, target, reduction="sum")
    assert_close(loss, expected, FP64, "value")
    (3.0 * loss).backward()
    (3.0 * expected).backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None and b.grad is not None
        assert_close(a.grad, b.grad, FP64, "gradient")


def test_without_tokens_the_head_gets_zeros() -> None:
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(23, 8, requires_grad=True)
    language_loss(hidden[:0], weight, torch.zeros(0, dtype=torch.int64)).backward()
    assert weight.grad is not None and not weight.grad.any() and hidden.grad is not None and not hidden.grad.any()


def data() -> TokenizedComparisons:
    """Prompts and answers that begin alike, rankings, soft labels, an empty answer and no prompt."""
    generator = np.random.Generator(np.random.PCG64(0))

    def row(prompt: int, alike: int, tails: tuple[int, ...], pairs: list[tuple[int, int]]) -> EncodedRow:
        front = generator.integers(20, 61, size=prompt + alike)
        answers = [
            np.concatenate([front, [2 + k][:length], generator.integers(20, 61, size=max(0, length - 1))])
            for k, length in enumerate(tails)
        ]
        return EncodedRow(
            front[:prompt], [a.astype(np.int32) for a in answers], pairs, [0.0] * len(pairs), [1.0] * len(pairs)
        )

    return TokenizedComparisons.of(
        [
            row(12, 3, (5, 9), [(0, 1)]),  # three tokens of both answers are in the shared prefix
            row(8, 2, (0, 6), [(0, 1)]),  # the chosen answer is a prefix of the other
            row(0, 0, (4, 7), [(1, 0)]),  # no prompt: its first token is not predicted
            row(6, 0, (3, 4, 5), [(0, 1), (0, 2), (1, 2)]),  # the best of three
            row(6, 0, (3, 4), [(0, 1), (1, 0)]),  # a soft label chooses none
        ]
    )


def expected_loss(model: torch.nn.Module, rows: TokenizedComparisons) -> tuple[Tensor, int]:
    """By transformers' own causal language model, with each text as a row of a padded rectangle and labels of -100."""
    best = [0, 0, 1, 0, None]
    texts, firsts = [], []
    for number, answer in enumerate(best):
        if answer is not None:
            texts.append(rows.comparison(number).text(answer))
            firsts.append(max(1, int(rows.prompt_length[number])))
    longest = max(map(len, texts))
    ids, labels = torch.full((len(texts), longest), PAD), torch.full((len(texts), longest), -100)
    mask = torch.zeros_like(ids)
    for place, (text, first) in enumerate(zip(texts, firsts, strict=True)):
        ids[place, : len(text)], mask[place, : len(text)] = torch.from_numpy(text.astype(np.int64)), 1
        labels[place, first : len(text)] = ids[place, first : len(text)]
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    return loss, int((labels != -100).sum())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox", pytest.param("qwen3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_value_and_gradients_against_the_padded_language_model(
    family: str, path: str, tied: bool, tmp_path: Path
) -> None:
    """The head is read from the files of the language model, as a training does."""
    class_name, keys = FAMILIES[family]
    config = getattr(transformers, class_name)(**keys, tie_word_embeddings=tied)
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in causal.parameters():
        parameter.data.mul_(3.0 if parameter.ndim > 1 else 1.0)
    causal.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, dtype=torch.float32)
    head = language_head(ModelConfig(name=str(tmp_path)), classifier, 0)
    assert (head is None) == tied
    model = RewardModel(
        classifier.base_model,
        classifier.score,
        pad_token_id=PAD,
        sft=True,
        lm_head=head,  # type: ignore[arg-type]
    ).double()
    model.use(path, pruned=True)
    assert not model.pruned, "the last layer computes the rows of the answers, too"
    rows, causal = data(), causal.double()
    with Wide():
        output = model(build_batch(rows, range(5), share=path == SHARED, language=True))
        expected, count = expected_loss(causal, rows)
        output.language_sum.backward()
        expected.backward()
    assert_close(output.language_sum, expected, FP64, "value")
    assert count == chosen_tokens_N(rows).sum()
    ours = {name: p.grad for name, p in model.named_parameters() if not name.startswith("score")}
    for name, parameter in causal.named_parameters():
        of_head = parameter is causal.get_output_embeddings().weight and not tied
        ours_name = "lm_head.weight" if of_head else f"backbone.{name.split('.', 1)[1]}"
        assert_close(ours.pop(ours_name), parameter.grad, FP64, name)
    assert not ours


def test_logits_that_are_more_than_a_product_are_refused(tmp_path: Path) -> None:
    class_name, keys = FAMILIES["gemma2"]
    model = AutoModelForSequenceClassification.from_config(getattr(transformers, class_name)(**keys))
    with pytest.raises(UserError, match=r"loss\.sft: the logits of Gemma2ForCausalLM are more than a product"):
        language_head(ModelConfig(name="m", init="random"), model, 0)


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    class_name, keys = FAMILIES["llama"]
    model = AutoModelForSequenceClassification.from_config(getattr(transformers, class_name)(**keys))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no safetensors file of the model holds lm_head\.weight"):
        language_head(ModelConfig(name=str(tmp_path)), model, 0)


def test_data_without_a_chosen_answer_are_refused() -> None:
    config = load_config(None, [*NEEDED, "loss.sft=0.1"])
    soft = data()
    one = TokenizedComparisons.of(
        [EncodedRow(soft.tokens[:4], [soft.tokens[:6], soft.tokens[:7]], [(0, 1), (1, 0)], [0.0] * 2, [0.5] * 2)]
    )
    with pytest.raises(UserError, match=r"loss\.sft: no answer of data\.train is chosen over another"):
        Plan.of(config, one, one.tokens_N, token_budget=99, world_size=1)


def test_lora_is_refused(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, None, [*NEEDED, "loss.sft=0.01", "model.lora.rank=4"])
    assert "loss.sft and model.lora exclude each other" in line


# ---- whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tiny untied Llama whose files hold its language-model head."""
    folder = tmp_path_factory.mktemp("sft")
    tokenizer = byte_tokenizer()
    class_name, keys = FAMILIES["llama"]
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "vocab_size": len(tokenizer)}
    config = getattr(transformers, class_name)(**{**keys, **ids, "max_position_embeddings": 256})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder


def given(folder: Path, *more: str) -> list[str]:
    return arguments(
        folder, f"model.name={folder / 'base'}", "model.init=pretrained", "loss.sft=0.5", "log.every=1", *more
    )


@pytest.fixture(scope="module")
def alone(folder: Path) -> Outcome:
    """One rank, one micro batch in each step."""
    outcome = run(folder / "alone", given(folder, "batch.tokens=100000"), 1, publish=True)
    assert outcome.codes == [0], outcome.text
    return outcome


def test_the_loss_falls_and_the_head_is_trained_and_not_exported(folder: Path, alone: Outcome) -> None:
    losses = [line["train/rm/sft_loss"] for line in metrics(alone)]
    assert len(losses) == 8 and 5.0 < losses[0] < 6.0, "log 264 = 5.58: the model knows nothing"
    assert losses[-1] < losses[0] - 0.05
    with safe_open(folder / "base" / "model.safetensors", "np") as file:
        before = file.get_tensor("lm_head.weight")
    stored = stored_weights(alone.directory / "checkpoints" / "step-8")["lm_head.weight"]
    assert np.abs(stored.reshape(before.shape) - before).max() > 1e-3
    with safe_open(alone.directory / "model" / "model.safetensors", "np") as file:
        assert not any("lm_head" in name for name in file.keys())  # noqa: SIM118
    export(str(alone.directory), str(folder / "again"))
    files = [place / "model.safetensors" for place in (folder / "again", alone.directory / "model")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_export_with_the_head_gives_the_logits_of_the_trained_language_model(folder: Path, alone: Outcome) -> None:
    """The language model that is made of the checkpoint's weights by hand; the reward model stays what it was."""
    lines = export(str(alone.directory), str(folder / "with-head"), ["export.lm_head=true"])
    assert any("logits reloaded by AutoModelForCausalLM differ by" in line for line in lines)
    found, info = AutoModelForCausalLM.from_pretrained(folder / "with-head", output_loading_info=True)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) == {"score.weight"}
    expected = by_hand(alone, folder / "base")
    ids = torch.randint(20, 200, (2, 31), generator=torch.Generator().manual_seed(0))
    assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)
    ours, theirs = (
        AutoModelForSequenceClassification.from_pretrained(place)(input_ids=ids).logits
        for place in (folder / "with-head", alone.directory / "model")
    )
    assert torch.equal(ours, theirs)
    model, tokenizer = rmcore.load(str(folder / "with-head")), byte_tokenizer()
    texts = [tokenizer.decode(row) for row in ids]
    assert model.score_texts(texts) == rmcore.load(str(alone.directory / "model")).score_texts(texts)


def by_hand(outcome: Outcome, base: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base)
    weights = stored_weights(outcome.directory / "checkpoints" / "step-8")
    for name, parameter in model.named_parameters():
        ours = name if name == "lm_head.weight" else f"backbone.{name.split('.', 1)[1]}"
        parameter.data = torch.from_numpy(weights[ours]).reshape(parameter.shape)
    return model


def test_a_wrong_head_is_refused(folder: Path, alone: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are moved by one while it is written."""

    def moved(directory: Path, shapes: Any, dtype: Any, tensors: Any, *more: Any) -> None:
        both = ((n, t.roll(1, 0) if n == "lm_head.weight" else t) for n, t in tensors)
        write_weights(directory, shapes, dtype, both, *more)

    monkeypatch.setattr("rmcore.hf_export.directory.write_weights", moved)
    with pytest.raises(ExportError, match=r"the exported model's logits are wrong: text \d has"):
        export(str(alone.directory), str(folder / "wrong"), ["export.lm_head=true"])
    assert not (folder / "wrong").exists()


def test_the_head_is_refused_without_its_loss(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, None, [*NEEDED, "export.lm_head=true"])
    assert line.endswith("export.lm_head needs loss.sft, which trains the language-model head")


def test_the_first_loss_is_that_of_the_language_model(folder: Path, alone: Outcome) -> None:
    """A run of one step with every row, by transformers."""
    more = ["batch.pairs=48", "run.max_steps=1", "batch.tokens=2000"]
    outcome = run(folder / "first", given(folder, *more), 1)
    tokenizer, causal = byte_tokenizer(), AutoModelForCausalLM.from_pretrained(folder / "base").double()
    total, count = 0.0, 0
    for line in (folder / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
        ids = [*tokenizer(row["prompt"] + row["chosen"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        assert ids[: len(prompt)] == prompt
        with torch.no_grad():
            logits = causal(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        total += float(F.cross_entropy(logits, torch.tensor(ids[len(prompt) :]), reduction="sum"))
        count += len(ids) - len(prompt)
    assert metrics(outcome)[0]["train/rm/sft_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "size"),
    [
        ("zero3", 2),
        *(
            pytest.param(name, size, marks=pytest.mark.slow)
            for name in ("ddp", "zero1", "zero2", "zero3", "hsdp")
            for size in (2, 3)
            if (name, size) != ("zero3", 2)
        ),
    ],
)
def test_every_world_size_cut_and_strategy_trains_the_same(
    folder: Path, alone: Outcome, strategy: str, size: int
) -> None:
    more = [f"parallel.strategy={strategy}", "batch.tokens=400", "export.lm_head=true"]
    ours = run(folder / f"{strategy}-{size}", given(folder, *more), size, publish=True)
    assert ours.codes == [0] * size, ours.text
    for key in ("train/rm/loss", "train/rm/sft_loss", "grad_norm"):
        found, expected = ([line[key] for line in metrics(one)] for one in (ours, alone))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=key)
    found, expected = (stored_weights(one.directory / "checkpoints" / "step-8") for one in (ours, alone))
    assert max(np.abs(found[name] - expected[name]).max() for name in expected) < ROUNDING
    assert "logits reloaded by AutoModelForCausalLM differ by" in ours.text
    with safe_open(ours.directory / "model" / "model.safetensors", "np") as file:
        head = file.get_tensor("lm_head.weight")
    assert np.array_equal(head.reshape(-1), found["lm_head.weight"])


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_and_resumed(folder: Path) -> None:
    more = ["parallel.strategy=zero2", "batch.tokens=400", "log.every=2"]
    whole = run(folder / "whole", given(folder, *more), 2)
    assert run(folder / "killed", given(folder, *more), 2, [Fault("compute", "kill", rank=1, nth=6)]).codes != [0, 0]
    again = run(folder / "killed", given(folder, *more), 2)
    assert again.codes == [0, 0] and same(again, whole)
