"""LoRA: rewards and gradients equal peft's own, the export is plain and merged, frozen weights are not stored."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from rmcore.checkpoint.manifest import read_manifest
from rmcore.checkpoint.resume import Start
from rmcore.config import UserError, load_config
from rmcore.config.lora import LoraConfig
from rmcore.data.batches.batch import build_batch
from rmcore.data.prepare import prepare_data
from rmcore.data.synthetic import byte_tokenizer
from rmcore.hf_export.from_checkpoint import export
from rmcore.hf_export.rehearsal import rehearse
from rmcore.model.backbone import load_model
from rmcore.model.lora import UNTRAINED_B, add_lora, frozen_fingerprint, merged, merged_shapes, visible_changes
from rmcore.model.reward_model import PADDED, PATHS, SHARED, RewardModel
from tests.harness.configs import NEEDED, mistakes
from tests.harness.oracle import PAD, odd_items, padded, tiny_model
from tests.harness.ranks import run_ranks, train_rank

RANK, ALPHA = 3, 12.0
# The targets for peft and for rmcore; GPT-2 stores its weights transposed.
TARGETS = {"llama": "all-linear", "gpt_neox": ["query_key_value", "dense_4h_to_h"], "gpt2": ["c_attn", "c_proj"]}


def settings(family: str) -> LoraConfig:
    return LoraConfig(rank=RANK, alpha=ALPHA, targets=TARGETS[family])


def theirs(family: str) -> Any:
    """peft's own classifier, with B drawn at random, as after some training."""
    model = tiny_model(family, torch.float64)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=RANK, lora_alpha=ALPHA, target_modules=TARGETS[family], lora_dropout=0.0
    )  # type: ignore[arg-type]
    wrapped: Any = peft.get_peft_model(model, config).double()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
    return wrapped


def adapters(named: Any) -> dict[str, Tensor]:
    """The adapters' weights, by the part of their names that is the same in rmcore and in peft."""
    return {
        name[name.index(".", name.index("layers") if "layers" in name else name.index("h.")) :]: p
        for name, p in named
        if ".lora_" in name
    }


def ours(family: str, like: Any, path: str = SHARED, pruned: bool = False) -> tuple[RewardModel, PreTrainedModel, list]:
    hf = tiny_model(family, torch.float64)
    adapted = add_lora(hf.base_model, settings(family), seed=1)
    hf.double()
    values = adapters(like.named_parameters())
    for name, parameter in adapters(hf.base_model.named_parameters()).items():
        parameter.data = values[name].data.clone()
    model = RewardModel(hf.base_model, hf.score, pad_token_id=PAD)
    model.use(path, pruned=pruned)
    return model, hf, adapted


@pytest.mark.parametrize("path, pruned", [*((path, False) for path in PATHS), (SHARED, True)])
@pytest.mark.parametrize("family", list(TARGETS))
def test_rewards_and_gradients_equal_pefts_padded_forward(family: str, path: str, pruned: bool) -> None:
    items, like = odd_items(), theirs(family)
    loss, rewards = padded(like, items)
    loss.backward()
    model, _, _ = ours(family, like, path, pruned)
    out = model(build_batch(items, range(len(items)), share=path == SHARED))
    out.loss_sum.backward()
    # fp64: as BOUND in tests/harness/oracle.py
    torch.testing.assert_close(out.rewards_A, torch.cat(rewards), rtol=1e-12, atol=1e-12)
    expected = {name: p.grad for name, p in adapters(like.named_parameters()).items()}
    found = {name: p.grad for name, p in adapters(model.backbone.named_parameters()).items()}
    assert expected.keys() == found.keys() and len(found) >= 12
    for name, grad in found.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(grad, expected[name], rtol=1e-11, atol=1e-11, msg=name)
    [head] = [p.grad for name, p in like.named_parameters() if "score" in name and p.requires_grad]
    torch.testing.assert_close(model.score.weight.grad, head, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("family", list(TARGETS))
def test_the_merged_state_is_pefts_and_the_plain_model_computes_the_same(family: str) -> None:
    like = theirs(family)
    model, _, adapted = ours(family, like)
    plain = tiny_model(family, torch.float64)
    state = {
        name.replace("backbone.", f"{plain.base_model_prefix}.", 1): tensor
        for name, tensor in merged(model.state_dict(), adapted).items()
    }
    plain.load_state_dict(state)  # strict: all names and shapes are the model's own
    _, expected = padded(like, odd_items())
    _, found = padded(plain, odd_items())
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=1e-12, atol=1e-12)
    for name, tensor in like.merge_and_unload().base_model.state_dict().items():
        torch.testing.assert_close(state[f"{plain.base_model_prefix}.{name}"], tensor, rtol=1e-13, atol=1e-13)


def test_only_adapters_and_head_are_trained_and_every_seed_gives_one_model() -> None:
    models = []
    for seed in (1, 1, 2):
        hf = tiny_model("llama")
        add_lora(hf.base_model, settings("llama"), seed)
        models.append(RewardModel(hf.base_model, hf.score, pad_token_id=PAD, path=PADDED))
    trained = [name for name, p in models[0].named_parameters() if p.requires_grad]
    assert "score.weight" in trained and all(".lora_" in name or name == "score.weight" for name in trained)
    first, again, other = ({n: p for n, p in m.named_parameters() if ".lora_A" in n} for m in models)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert frozen_fingerprint(models[0].backbone) == frozen_fingerprint(models[2].backbone)
    models[2].backbone.embed_tokens.weight.data[5, 3] += 1e-6
    assert frozen_fingerprint(models[0].backbone) != frozen_fingerprint(models[2].backbone)


def test_a_rank_without_work_has_zero_gradients() -> None:
    model, _, _ = ours("llama", theirs("llama"), SHARED, pruned=True)
    model(build_batch(odd_items(), [])).loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize("targets, shown", [(["q_proj", "quary"], "quary"), ([], "an empty list"), (["norm"], "norm")])
def test_targets_that_match_no_layer(targets: list[str], shown: str) -> None:
    with pytest.raises(
        UserError, match=f"model.lora.targets: {shown} is not a linear layer of LlamaModel.*q_proj"
    ) as error:
        add_lora(tiny_model("llama").base_model, LoraConfig(rank=2, targets=targets), 0)
    assert "\n" not in str(error.value)


MIXED = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 1}
MIXED |= {"vocab_size": 264, "num_key_value_heads": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MIXTURES = {
    "Qwen3MoeConfig": {"num_experts": 4, "head_dim": 8},
    "MixtralConfig": {"num_local_experts": 4},
    # One dense layer, and linear layers of shared experts with the names that the fused experts had in older versions.
    "DeepseekV3Config": {**LATENT, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "Llama4TextConfig": {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 64},
}


@pytest.mark.parametrize("targets", ["all-linear", "one"])
@pytest.mark.parametrize("name", list(MIXTURES))
def test_only_linear_layers_are_adapted_in_a_mixture_of_experts(name: str, targets: str) -> None:
    """Fused parameters of experts and routers cannot be merged as W + B A; everything else is, to the last name."""
    backbone = AutoModel.from_config(getattr(transformers, name)(**MIXED, **MIXTURES[name]))
    before = {f"backbone.{key}": tensor.clone() for key, tensor in backbone.state_dict().items()}
    linear = [key for key, module in backbone.named_modules() if type(module).forward is nn.Linear.forward]
    chosen = linear
    if targets == "one":
        targets = linear[-1].rpartition(".")[2]  # down_proj, where there are linear layers of that name
        chosen = [key for key in linear if key.endswith(f".{targets}")]
    adapted = add_lora(backbone, LoraConfig(rank=2, targets=[targets] if targets != "all-linear" else targets), 0)
    assert [layer.name for layer in adapted] == [f"backbone.{key}" for key in chosen]
    trained = [key for key, parameter in backbone.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(chosen) and all(".lora_" in key for key in trained)
    state = {f"backbone.{key}": tensor for key, tensor in backbone.state_dict().items()}
    after = merged(state, adapted)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    shapes = merged_shapes({key: tuple(tensor.shape) for key, tensor in state.items()}, adapted)
    assert shapes == {key: tuple(tensor.shape) for key, tensor in before.items()}


def test_layers_that_share_their_weight_are_not_adapted() -> None:
    backbone: Any = tiny_model("llama").base_model
    backbone.layers[1].self_attn.q_proj.weight = backbone.layers[0].self_attn.q_proj.weight
    adapted = [layer.name for layer in add_lora(backbone, LoraConfig(rank=2), 0)]
    assert "backbone.layers.2.self_attn.q_proj" in adapted and "backbone.layers.0.self_attn.k_proj" in adapted
    assert not {f"backbone.layers.{layer}.self_attn.q_proj" for layer in (0, 1)} & set(adapted)


def test_a_layer_that_computes_without_its_adapter_ends_the_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As fused kernels do, which read `layer.weight`. The untrained B is 0, so that nothing would differ without
    `visible_changes`."""
    config = load_config(None, [*RUN, "model.lora.targets=[down_proj]"])
    tokenizer = byte_tokenizer()
    data = prepare_data(config, tokenizer, None)
    line = rehearse(config, tokenizer, data.template, data.train)[1]
    assert "rewards reloaded by transformers differ by" in line
    monkeypatch.setattr(peft.tuners.lora.Linear, "forward", lambda self, x: self.base_layer(x))
    with pytest.raises(UserError, match=r"could not be exported.* the exported model's rewards are wrong"):
        rehearse(config, tokenizer, data.template, data.train)


def test_adapters_are_as_before_after_their_visible_change() -> None:
    """Those that continue an exported adapter are not zero."""
    model, _, adapted = ours("llama", theirs("llama"))
    ups = [p for name, p in model.named_parameters() if ".lora_B" in name]
    before = [up.detach().clone() for up in ups]
    with visible_changes(lambda: dict(model.named_parameters()), adapted):
        assert all(bool((up == UNTRAINED_B).all()) for up in ups)
    assert ups and all(torch.equal(up, values) and up.any() for up, values in zip(ups, before, strict=True))


def test_the_section(tmp_path: Path) -> None:
    assert load_config(None, [*NEEDED, "model.lora.rank=8"]).model.lora.scale_alpha == 16.0
    assert mistakes(tmp_path, None, [*NEEDED, "model.lora.rank=0"]) == [
        "override `model.lora.rank=0`: model.lora.rank: expected whole number >= 1 | null, got `0`"
    ]
    assert mistakes(tmp_path, None, [*NEEDED, "model.lora.targets=[q_proj]"]) == [
        "override `model.lora.targets=[q_proj]`: model.lora.targets needs model.lora.rank"
    ]


# ---- whole runs

RUN = [
    *("model.name=synthetic", "model.init=random", "data.train.path=synthetic", "data.template=none"),
    *("data.max_tokens=512", "data.limit=40", "data.eval_fraction=0.2", "optim.lr=1e-2", "parallel.precision=fp32"),
    *("log.every=1", "log.tensorboard=false", "batch.pairs=8", "batch.tokens=500", "run.epochs=2", "run.save_every=3"),
    *("model.lora.rank=4", "model.lora.targets=[q_proj, v_proj, down_proj]"),
]


def train(tmp_path: Path, name: str, size: int, *overrides: str) -> list[dict[str, Any]]:
    directory = tmp_path / name
    run_ranks(train_rank, size, tmp_path / f"ranks-{name}-{len(overrides)}", [*RUN, *overrides, f"run.dir={directory}"])
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("lora")
    return folder / "one", train(folder, "one", 1)


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_every_strategy_follows_one_rank(tmp_path: Path, one_rank: Any, strategy: str) -> None:
    two = train(tmp_path, strategy, 2, f"parallel.strategy={strategy}")
    for key in ("train/rm/loss", "grad_norm", "eval/rm/loss"):
        a, b = ([line[key] for line in lines if key in line] for lines in (one_rank[1], two))
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5, err_msg=key)  # lr 1e-2 amplifies the 1e-7 of fp32
    assert files(tmp_path / strategy / "model").keys() == files(one_rank[0] / "model").keys()


def test_the_export_is_plain_and_differs_from_the_base_where_it_was_adapted(one_rank: Any) -> None:
    directory = one_rank[0] / "model"
    _, info = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    exported = files(directory)
    pad = AutoConfig.from_pretrained(directory).pad_token_id
    base = load_model(load_config(None, RUN).model, seed=1, vocabulary=0, pad_token_id=pad).state_dict()
    assert exported.keys() == base.keys()
    adapted = ("q_proj.weight", "v_proj.weight", "down_proj.weight", "score.weight")
    assert all(torch.equal(tensor, base[name]) != name.endswith(adapted) for name, tensor in exported.items())


def test_a_checkpoint_exports_the_merged_model_that_the_run_published(tmp_path: Path, one_rank: Any) -> None:
    assert "step 8" in export(str(one_rank[0]), str(tmp_path / "out"))[-1]
    published, exported = files(one_rank[0] / "model"), files(tmp_path / "out")
    assert published.keys() == exported.keys()
    assert all(torch.equal(published[name], exported[name]) for name in published)


def test_a_checkpoint_holds_what_is_trained_and_the_run_resumes_bitwise(tmp_path: Path, one_rank: Any) -> None:
    held = files(one_rank[0] / "checkpoints" / "step-6")
    assert {name.split("/")[0] for name in held} == {"weight", "exp_avg", "exp_avg_sq"}
    names = {name.split("/")[1].split("@")[0] for name in held}
    assert "score.weight" in names and all(".lora_" in name or name == "score.weight" for name in names)
    train(tmp_path, "again", 1, "run.max_steps=3", "optim.schedule=constant")
    train(tmp_path, "again", 1, "optim.schedule=constant")
    train(tmp_path, "whole", 1, "optim.schedule=constant")
    resumed, whole = files(tmp_path / "again" / "model"), files(tmp_path / "whole" / "model")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_checkpoint_continues_only_from_its_own_base(one_rank: Any) -> None:
    path = one_rank[0] / "checkpoints" / "step-6"
    start = Start(path, read_manifest(path))
    start.check_base(read_manifest(path).base)
    with pytest.raises(UserError, match=r"the base model's weights have changed since .*step-6.*run.resume=never"):
        start.check_base("0" * 32)


def files(directory: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files of a directory."""
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found
