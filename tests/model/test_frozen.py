"""The stored base of LoRA, DoRA and rank-stabilised LoRA: equal to dense layers and to peft; merged; resumed."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rmcore.config.lora import LoraConfig
from rmcore.data.batches.batch import build_batch
from rmcore.hf_export.from_checkpoint import export
from rmcore.model.frozen import FrozenLinear
from rmcore.model.lora import add_lora, count_weights, merged, store_base
from rmcore.model.reward_model import SHARED, RewardModel
from tests.harness.configs import NEEDED, mistakes
from tests.harness.oracle import PAD, odd_items, padded, tiny_model
from tests.model.test_lora import TARGETS, files, train

KINDS = ["bf16", "int8", "nf4"]


def needs(kind: str) -> None:
    if kind not in ("fp32", "bf16"):
        pytest.importorskip("bitsandbytes")


def layers() -> list[nn.Module]:
    """Linear layers, with and without a bias, one of a size that is no multiple of the blocks; GPT-2's, transposed."""
    torch.manual_seed(0)
    return [nn.Linear(96, 40), nn.Linear(33, 7, bias=False), Conv1D(24, 64)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_layer_computes_with_the_numbers_that_it_stores(kind: str) -> None:
    needs(kind)
    for layer in layers():
        stored = FrozenLinear(layer, kind)
        weight = stored.weight.T if stored.transposed else stored.weight
        x = torch.randn(5, weight.shape[1], requires_grad=True)
        expected = F.linear(x, weight, layer.bias)
        torch.testing.assert_close(stored(x), expected, rtol=1e-6, atol=1e-6)
        upstream = torch.randn_like(expected)
        (found,) = torch.autograd.grad(stored(x), x, upstream)
        torch.testing.assert_close(found, upstream @ weight, rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            half = stored(x)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05)  # bf16 products of some 100 numbers


@pytest.mark.parametrize(
    "kind, bits, share",
    [
        ("bf16", 16, 2.0**-8),  # of the number, which is at most the largest of its block
        ("int8", 8.2, 0.0071),  # the codes near 1 are 0.0141 apart
        ("nf4", 4.6, 0.152),  # the codes -1 and -0.696 are 0.304 apart
    ],
)
def test_a_stored_weight_is_close_and_small(kind: str, bits: float, share: float) -> None:
    needs(kind)
    block = {"bf16": 1, "int8": 256, "nf4": 64}[kind]
    for shape in ((512, 64), (37, 95)):  # the second one ends within a block
        layer = nn.Linear(*shape, bias=False)
        stored = FrozenLinear(layer, kind)
        for found, wanted in zip(
            *(w.detach().flatten().split(block) for w in (stored.weight, layer.weight)), strict=True
        ):
            assert float((found - wanted).abs().max()) <= 1.001 * share * float(wanted.abs().max())
        assert 8 * sum(buffer.nbytes for buffer in stored.buffers()) <= bits * layer.weight.numel() + 64


def test_the_graph_keeps_no_restored_weight() -> None:
    stored = FrozenLinear(nn.Linear(64, 64), "bf16")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        stored(torch.randn(3, 64, requires_grad=True))
    assert not any(tensor.shape == (64, 64) for tensor in kept)


def settings(family: str, **more: Any) -> LoraConfig:
    return LoraConfig(rank=3, alpha=12.0, targets=TARGETS[family], **more)


def trained(hf: Any, config: LoraConfig) -> tuple[RewardModel, list]:
    """A model after some training: B is not zero."""
    adapted = add_lora(hf.base_model, config, seed=1)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in hf.base_model.named_parameters():
        if ".lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2
    model = RewardModel(hf.base_model, hf.score, pad_token_id=PAD)
    model.use(SHARED)
    return model, adapted


@pytest.mark.parametrize("more", [{"dora": True}, {"rslora": True}, {"dora": True, "rslora": True}])
@pytest.mark.parametrize("family", list(TARGETS))
def test_dora_and_rank_stabilised_lora_are_pefts(family: str, more: dict[str, bool]) -> None:
    model, adapted = trained(tiny_model(family, torch.float64).double(), settings(family, **more))
    model.double()
    theirs: Any = peft.get_peft_model(
        tiny_model(family, torch.float64),
        peft.LoraConfig(
            task_type="SEQ_CLS", r=3, lora_alpha=12.0, target_modules=TARGETS[family], lora_dropout=0.0,
            use_dora=more.get("dora", False), use_rslora=more.get("rslora", False),
        ),
    ).double()  # fmt: skip
    values = {name.partition("backbone.")[2]: p for name, p in model.named_parameters() if ".lora_" in name}
    taken = 0
    for name, parameter in theirs.named_parameters():
        for ours, value in values.items():
            if name.endswith(f".{ours}"):
                parameter.data = value.data.clone()
                taken += 1
    assert taken == len(values)
    items = odd_items()
    _, expected = padded(theirs, items)
    out = model(build_batch(items, range(len(items))))
    torch.testing.assert_close(out.rewards_A, torch.cat(expected), rtol=1e-10, atol=1e-10)
    plain = theirs.merge_and_unload().base_model.state_dict()
    ours_merged = merged(model.state_dict(), adapted)
    for name, tensor in plain.items():
        torch.testing.assert_close(ours_merged[f"backbone.{name}"], tensor, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", list(TARGETS))
def test_the_merged_model_computes_what_was_trained(family: str, kind: str) -> None:
    """fp32: rewards of 3 layers differ by some roundings of 1e-7; the quantisation itself moves them by far more."""
    needs(kind)
    hf = tiny_model(family)
    weights = count_weights(hf.base_model)
    config = settings(family, base=kind, dora=True)
    model, adapted = trained(hf, config)
    before = model(build_batch(odd_items(), range(len(odd_items())))).rewards_A
    store_base(hf.base_model, config)
    assert count_weights(hf.base_model) > weights, "the adapters, and every stored weight"
    rewards = model(build_batch(odd_items(), range(len(odd_items())))).rewards_A
    assert float((rewards - before).detach().abs().max()) > 1e-4
    plain = tiny_model(family)
    prefix = plain.base_model_prefix
    plain.load_state_dict(
        {n.replace("backbone.", f"{prefix}.", 1): t for n, t in merged(model.state_dict(), adapted).items()}
    )
    _, expected = padded(plain, odd_items())
    torch.testing.assert_close(rewards, torch.cat(expected), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "more, shown",
    [
        (["model.lora.base=nf4"], "model.lora.base needs model.lora.rank"),
        (["model.lora.dora=true"], "model.lora.dora needs model.lora.rank"),
        (["model.weights=bf16", "model.lora.rank=4"], "set model.lora.base=bf16 instead"),
        (
            ["model.lora.rank=4", "model.lora.base=int8", "parallel.strategy=zero3", "parallel.offload=true"],
            "model.lora.base and parallel.offload exclude each other",
        ),
        (["model.lora.rank=4", "model.lora.base=bf16", "parallel.compile=true"], "exclude each other"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, more: list[str], shown: str) -> None:
    assert shown in "\n".join(mistakes(tmp_path, None, [*NEEDED, *more]))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["zero2", "hsdp", "zero3"])
@pytest.mark.parametrize("base", ["int8", "bf16", "nf4"])
def test_a_sharded_base_computes_resumes_and_exports(tmp_path: Path, base: str, strategy: str) -> None:
    """Every rank keeps its part of the codes. fp32 sums of two ranks differ in their last bits."""
    needs(base)
    more = [f"model.lora.base={base}", "model.lora.dora=true", "optim.schedule=constant"]
    split = [*more, f"parallel.strategy={strategy}"]
    one = train(tmp_path, "one", 1, *more, "run.max_steps=5")
    whole = train(tmp_path, "whole", 2, *split, "run.max_steps=5")
    for key in ("train/rm/loss", "grad_norm", "eval/rm/loss"):
        a, b = ([line[key] for line in lines if key in line] for lines in (one, whole))
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5, err_msg=key)  # as in test_lora.py
    train(tmp_path, "again", 2, *split, "run.max_steps=3")
    train(tmp_path, "again", 2, *split, "run.max_steps=5", "run.keep=3")
    resumed, published = files(tmp_path / "again" / "model"), files(tmp_path / "whole" / "model")
    assert published and all(torch.equal(resumed[name], published[name]) for name in published)
    export(str(tmp_path / "whole"), str(tmp_path / "out"))
    exported = files(tmp_path / "out")
    assert all(torch.equal(exported[name], published[name]) for name in published)


@pytest.mark.distributed
@pytest.mark.parametrize("base", [pytest.param("bf16", marks=pytest.mark.slow), "nf4"])
def test_a_run_resumes_bitwise_and_its_checkpoint_exports_what_it_published(tmp_path: Path, base: str) -> None:
    needs(base)
    more = [f"model.lora.base={base}", "model.lora.dora=true", "optim.schedule=constant", "parallel.strategy=zero1"]
    train(tmp_path, "again", 2, *more, "run.max_steps=3")
    train(tmp_path, "again", 2, *more)
    train(tmp_path, "whole", 2, *more)
    resumed, whole = files(tmp_path / "again" / "model"), files(tmp_path / "whole" / "model")
    assert whole and all(torch.equal(resumed[name], whole[name]) for name in whole)
    said = export(str(tmp_path / "whole"), str(tmp_path / "out"))[-1]
    assert "rewards reloaded by transformers differ by" in said
    exported = files(tmp_path / "out")
    assert all(torch.equal(exported[name], whole[name]) for name in whole)
