"""Converts directories as other trainers write them, and compares the rewards with each trainer's own formula.

The formulas are computed here from the causal model's hidden states, in fp64 from the last layer on, without rmcore.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rmcore.convert import main
from rmcore.data.synthetic import byte_tokenizer
from rmcore.data.tokens.templates import NAMED_TEMPLATES
from rmcore.scoring.scorer import Scorer
from tests.harness.exporting import classifier

ROWS = [{"prompt": "Hello", "answers": ["there", "you"]}, {"prompt": "A longer prompt?", "answers": ["x", "y z", "n"]}]


class Original(NamedTuple):
    """A directory of another trainer, and its reward of a text."""

    directory: Path
    reward: Callable[[torch.Tensor], float]


def base(directory: Path, template: str = NAMED_TEMPLATES["simple_chat"]) -> Any:
    """A tiny causal model with a tokenizer, written by transformers."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    config = classifier("llama", tokenizer).config
    config.max_position_embeddings = 128  # the built-in texts of the check are cut to it
    model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model.eval()


def drawn(model: Any, outputs: int = 1) -> torch.Tensor:
    torch.manual_seed(4)
    return torch.randn(outputs, model.config.hidden_size)


def formula(
    model: Any, weight: torch.Tensor, bias: float = 0.0, mean: float = 0.0, deviation: float = 1.0
) -> Callable[[torch.Tensor], float]:
    """(w h + b - mean) / deviation at the last token of a text, from transformers' own hidden states."""

    def reward(ids: torch.Tensor) -> float:
        with torch.no_grad():
            hidden = model(ids[None], output_hidden_states=True).hidden_states[-1][0, -1].double()
        return float((weight[0].double() @ hidden + bias - mean) / deviation)

    return reward


def rewritten(directory: Path, heads: dict[str, torch.Tensor], **config: Any) -> None:
    """The decoder's weights and `heads` in one file, without the language-model head; `config` added to config.json."""
    weights = {name: tensor for name, tensor in load_file(directory / "model.safetensors").items()
               if not name.startswith("lm_head")}  # fmt: skip
    save_file({**weights, **heads}, directory / "model.safetensors", {"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def llama_factory(directory: Path) -> Original:
    """The model by save_pretrained, TRL's value head in a file of its own (fix_valuehead_checkpoint)."""
    model = base(directory)
    weight, bias = drawn(model), torch.tensor([0.75])
    save_file({"v_head.summary.weight": weight, "v_head.summary.bias": bias}, directory / "value_head.safetensors")
    return Original(directory, formula(model, weight, 0.75))


def llama_factory_bin(directory: Path) -> Original:
    original = llama_factory(directory)
    for name, written in (("value_head", "value_head"), ("model", "pytorch_model")):
        torch.save(load_file(directory / f"{name}.safetensors"), directory / f"{written}.bin")
        (directory / f"{name}.safetensors").unlink()
    return original


def trl_value_head(directory: Path) -> Original:
    """AutoModelForCausalLMWithValueHead.save_pretrained: all in one state dict."""
    model = base(directory)
    weight = drawn(model)
    heads = {"v_head.summary.weight": weight, "v_head.summary.bias": torch.tensor([-0.5])}
    save_file({**load_file(directory / "model.safetensors"), **heads}, directory / "model.safetensors")
    return Original(directory, formula(model, weight, -0.5))


def openrlhf(directory: Path, prefix: str = "value_head") -> Original:
    """Its RewardModel by save_pretrained; mean and std of the training rewards in config.json."""
    model = base(directory)
    weight = drawn(model)
    more = {"mean": 1.25, "std": 2.5, "normalize_reward": False, "architectures": ["RewardModel"]}
    rewritten(directory, {f"{prefix}.weight": weight}, value_head_prefix=prefix, **more)
    return Original(directory, formula(model, weight, mean=1.25, deviation=2.5))


def openrlhf_score(directory: Path) -> Original:
    return openrlhf(directory, "score")


def xtuner(directory: Path) -> Original:
    """The reward token ends each text; here it is EOS, which simple_chat writes at the end."""
    model = base(directory)
    weight = drawn(model)
    rewritten(directory, {"v_head.weight": weight}, reward_token_id=model.config.eos_token_id)
    return Original(directory, formula(model, weight))


def safe_rlhf(directory: Path) -> Original:
    model = base(directory)
    weight = drawn(model)
    normalizer = {"normalizer.mean": torch.tensor([0.5]), "normalizer.var": torch.tensor([4.0])}
    normalizer["normalizer.count"] = torch.tensor([9])
    config = {"mean": [0.5], "var": [4.0], "do_normalize": True, "score_type": "reward", "score_dim": 1}
    rewritten(directory, {"score_head.weight": weight, "score_head.bias": torch.tensor([0.25]), **normalizer}, **config)
    return Original(directory, formula(model, weight, 0.25, 0.5, 2.0 + 1e-8))


def ultra_rm(directory: Path) -> Original:
    model = base(directory)
    weight = drawn(model)
    rewritten(directory, {"regression_head.weight": weight}, architectures=["LlamaRewardModel"])
    return Original(directory, formula(model, weight))


def adapted(model: Any, **more: Any) -> Any:
    """An adapter whose B is not zero."""
    torch.manual_seed(5)
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], **more))
    for name, parameter in made.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return made


def trl_adapter(directory: Path) -> Original:
    """TRL's RewardTrainer with peft: the score head is among modules_to_save; no tokenizer next to it."""
    base(directory / "base")
    found = AutoModelForSequenceClassification.from_pretrained(directory / "base", num_labels=1)
    made = adapted(found, task_type="SEQ_CLS", modules_to_save=["score"]).eval()
    torch.nn.init.normal_(made.base_model.model.score.modules_to_save["default"].weight)
    made.save_pretrained(directory / "adapter")

    def reward(ids: torch.Tensor) -> float:
        with torch.no_grad():
            return float(made(input_ids=ids[None]).logits[0, 0])

    return Original(directory / "adapter", reward)


def llama_factory_adapter(directory: Path) -> Original:
    """An adapter of the causal model, its value head in a file next to it, and the tokenizer."""
    base(directory / "base")
    model = AutoModelForCausalLM.from_pretrained(directory / "base")
    weight = drawn(model)
    made = adapted(model, task_type="CAUSAL_LM", lora_dropout=0.1).eval()
    made.save_pretrained(directory / "adapter")
    heads = {"v_head.summary.weight": weight, "v_head.summary.bias": torch.tensor([0.0])}
    save_file(heads, directory / "adapter" / "value_head.safetensors")
    AutoTokenizer.from_pretrained(directory / "base").save_pretrained(directory / "adapter")
    return Original(directory / "adapter", formula(made, weight))


WRITERS = (llama_factory, llama_factory_bin, trl_value_head, openrlhf, openrlhf_score, xtuner, safe_rlhf, ultra_rm,
           trl_adapter, llama_factory_adapter)  # fmt: skip


@pytest.mark.parametrize("write", WRITERS, ids=[write.__name__ for write in WRITERS])
def test_rewards_are_those_of_the_original_formula(
    tmp_path: Path, write: Callable[[Path], Original], capsys: pytest.CaptureFixture[str]
) -> None:
    original = write(tmp_path / "theirs")
    assert main([str(original.directory), "-o", str(tmp_path / "ours")]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "is its score head; rewards reloaded by transformers differ by" in said
    normalised = "original reward = " in said
    assert normalised == (write not in (xtuner, ultra_rm, trl_adapter, llama_factory_adapter))

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = NAMED_TEMPLATES["simple_chat"]
    scorer = Scorer(str(tmp_path / "ours"), ["parallel.precision=fp32"], normalise=normalised)
    for row, scored in zip(ROWS, scorer.rewards([(row, "here") for row in ROWS]), strict=True):
        for answer, reward in zip(row["answers"], scored.rewards, strict=True):
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
            ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)[0]
            # fp32 through three layers; the rewards are of size 1 to 10, those of another token differ by as much.
            assert reward == pytest.approx(original.reward(ids), abs=2e-5)


def test_what_is_not_one_linear_layer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = base(tmp_path / "theirs")
    weight = drawn(model)
    hidden = {"v_head.summary.0.weight": drawn(model, 8), "v_head.summary.0.bias": torch.zeros(8),
              "v_head.summary.2.weight": torch.ones(1, 8), "v_head.summary.2.bias": torch.zeros(1)}  # fmt: skip
    kept = load_file(tmp_path / "theirs" / "model.safetensors")
    for heads, message in (
        (hidden, "is not one linear layer from the last hidden state to a reward"),  # GRM's usual form
        ({"regression_layer.weight": drawn(model, 19)}, "is not one linear layer"),  # ArmoRM
        ({"score.weight": weight, "v_head.weight": weight.clone()}, "is not one linear layer"),  # two heads
        ({"v_head.summary.weight": torch.ones(1, 8)}, "is not one linear layer [1, "),
        ({"v_head.summary.weight": weight * torch.nan}, "NaN or Inf in its head"),
        ({}, "holds no reward head: train one first"),
    ):
        save_file({**kept, **heads}, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
        assert main([str(tmp_path / "theirs"), "-o", str(tmp_path / "ours")]) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error and error.count("\n") == 1
        assert not (tmp_path / "ours").exists()


def test_a_score_that_is_read_at_a_token_of_its_own_needs_a_template_that_ends_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """XTuner's reward token; and a template whose texts do not end with EOS is reported."""
    model = base(tmp_path / "theirs")
    weight = drawn(model)
    rewritten(tmp_path / "theirs", {"v_head.weight": weight}, reward_token_id=65)
    assert main([str(tmp_path / "theirs"), "-o", str(tmp_path / "ours")]) == 2
    error = capsys.readouterr().err
    assert "(reward_token_id) behind the text, and a text of the template ends with" in error
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "reward_token_id": None}))
    template = NAMED_TEMPLATES["simple_chat"].replace("{{ eos_token }}", "").replace("eos_token", "''")
    (tmp_path / "open.jinja").write_text(template + "!")
    template_key = f"data.template={tmp_path / 'open.jinja'}"
    assert main([str(tmp_path / "theirs"), "-o", str(tmp_path / "ours"), template_key]) == 0, capsys.readouterr().err
    assert (
        "note: the score is read at the last token of a text, '!' as the template writes it" in capsys.readouterr().out
    )


def test_files_that_contradict_or_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, arguments = tmp_path / "theirs", [str(tmp_path / "theirs"), "-o", str(tmp_path / "ours")]
    llama_factory(theirs)
    head, model = load_file(theirs / "value_head.safetensors"), load_file(theirs / "model.safetensors")
    torch.save({name: tensor + 1 for name, tensor in head.items()}, theirs / "value_head.bin")  # of an earlier step
    assert main(arguments) == 0
    assert "original reward = (score - -0.75) / 1" in capsys.readouterr().out

    other = {"v_head.summary.weight": head["v_head.summary.weight"] + 1}
    for kept, message in (
        ({**model, **other}, "holds two different v_head.summary.weight, one of them in value_head.safetensors"),
        (
            {name: tensor for name, tensor in model.items() if "layers.0.mlp.up" not in name},
            "are missing from the checkpoint: model.layers.0.mlp.up_proj.weight; is it the right checkpoint?",
        ),
    ):
        save_file(kept, theirs / "model.safetensors", {"format": "pt"})
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_weights_in_shards_and_heads_in_half_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The head's numbers are those of its file, whatever its dtype; a lost shard is named."""
    theirs = tmp_path / "theirs"
    llama_factory(theirs)
    head, model = load_file(theirs / "value_head.safetensors"), AutoModelForCausalLM.from_pretrained(theirs)
    (theirs / "model.safetensors").unlink()
    model.save_pretrained(theirs, max_shard_size="20KB")
    shards = sorted(theirs.glob("model-*.safetensors"))
    assert len(shards) > 3
    for dtype in (torch.float16, torch.bfloat16):
        rounded = {name: tensor.to(dtype) for name, tensor in head.items()}
        save_file(rounded, theirs / "value_head.safetensors")
        assert main([str(theirs), "-o", str(tmp_path / f"{dtype}")]) == 0
        written = load_file(tmp_path / f"{dtype}" / "model.safetensors")["score.weight"]
        assert torch.equal(written, rounded["v_head.summary.weight"].float())
    shards[1].unlink()
    capsys.readouterr()
    assert main([str(theirs), "-o", str(tmp_path / "lost")]) == 2
    error = capsys.readouterr().err
    assert shards[1].name in error and error.count("\n") == 1


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_bin_file_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base(tmp_path / "theirs")
    torch.save({"v_head.summary.weight": Bomb(tmp_path / "ran")}, tmp_path / "theirs" / "value_head.bin")
    assert main([str(tmp_path / "theirs"), "-o", str(tmp_path / "ours")]) == 2
    assert "value_head.bin cannot be read" in capsys.readouterr().err and not (tmp_path / "ran").exists()


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = llama_factory_adapter(tmp_path)
    weights = load_file(original.directory / "adapter_model.safetensors")
    [name, *_] = weights
    weights[name.replace("layers.0", "layers.9")] = weights.pop(name)
    save_file(weights, original.directory / "adapter_model.safetensors")
    arguments = [str(original.directory), "-o", str(tmp_path / "ours")]
    assert main(arguments) == 2 and "has no place for" in capsys.readouterr().err
    assert main([*arguments, "--base", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert "is an adapter, and its base model is not there" in error and "give --base" in error
    assert main([str(tmp_path / "base"), "-o", str(tmp_path / "ours"), "--base", "x"]) == 2
    assert "--base is for adapters" in capsys.readouterr().err
