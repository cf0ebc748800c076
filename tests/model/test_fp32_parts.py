"""Weights that transformers keeps in fp32: their names, the arithmetic of their modules."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

import rmcore
from rmcore.bench.models import texts, tiny_config
from rmcore.config import UserError, load_config
from rmcore.config.schema import ModelConfig
from rmcore.data.batches.batch import RaggedBatch, build_batch
from rmcore.data.synthetic import byte_tokenizer
from rmcore.model.backbone import load_model
from rmcore.model.classifier import decoder_class, text_model
from rmcore.model.fp32_parts import fp32_modules, kept_in_fp32
from rmcore.model.meta_model import set_padding
from rmcore.model.reward_model import PACKED, PADDED, RewardModel
from rmcore.parallel.fsdp import shard
from rmcore.parallel.half_copies import HalfCopies
from rmcore.parallel.world import device_mesh, running_world
from tests.harness.small_run import arguments

TOKENIZER = byte_tokenizer()
ROUTED = "ernie4_5_moe"
OTHERS = ("beam", "inkling2_text", "muse_spark", "mistral_large4", "hy_v4", "deepseek_v4", "axk1", "kimi_linear")


def stored(family: str, directory: Path) -> Path:
    if family not in CONFIG_MAPPING:
        pytest.skip("this version of transformers does not have it")
    config = tiny_config(family)
    set_padding(config, 0)
    torch.manual_seed(3)
    decoder_class(type(config))._from_config(config).save_pretrained(directory)
    return directory


def loaded(directory: Path) -> PreTrainedModel:
    return load_model(ModelConfig(name=str(directory)), seed=1, vocabulary=len(TOKENIZER), pad_token_id=0)


def engine(directory: Path, path: str = PACKED) -> RewardModel:
    model = loaded(directory)
    return RewardModel(text_model(model), model.score, pad_token_id=0, path=path)  # type: ignore[arg-type]


def batch() -> RaggedBatch:
    data = texts(TOKENIZER)
    return build_batch(data, range(len(data)), share=False)


@pytest.mark.parametrize("family", [ROUTED, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_the_names_are_those_that_transformers_loads_in_fp32(family: str, tmp_path: Path) -> None:
    base = stored(family, tmp_path)
    theirs = decoder_class(type(tiny_config(family))).from_pretrained(base, dtype=torch.bfloat16)
    expected = {name for name, p in text_model(theirs).named_parameters() if p.dtype == torch.float32}
    assert kept_in_fp32(text_model(loaded(base))) == expected and (expected or family != ROUTED)


@pytest.mark.parametrize("family", [ROUTED, pytest.param("inkling2_text", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["autocast", "copies", "fsdp"])
def test_routers_compute_with_fp32_weights_in_bf16_training(kind: str, family: str, tmp_path: Path) -> None:
    """Inkling 2 cannot compute at all if its routers are in bf16."""
    model, routed = engine(stored(family, tmp_path), PACKED if family == ROUTED else PADDED), []
    for module in (module for module in fp32_modules(model) if "Router" in type(module).__name__):
        exact = copy.deepcopy(module)

        def note(_: Any, inputs: Any, output: Any, exact: Any = exact) -> None:
            first = output[0] if isinstance(output, tuple) else output
            with torch.autocast("cpu", enabled=False):
                again = type(exact).forward(exact, *inputs)
            routed.append((first.detach(), (again[0] if isinstance(again, tuple) else again).detach()))

        module.register_forward_hook(note)
    with running_world(60.0, 1) as world:
        if kind == "copies":
            HalfCopies(model)
        if kind == "fsdp":
            shard(model, device_mesh(world), half=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
            out = model(batch())
        assert out.rewards_A.dtype == torch.float32
    assert routed and all(ours.dtype == torch.float32 and torch.equal(ours, again) for ours, again in routed)


def test_copies_and_fsdp_compute_the_same(tmp_path: Path) -> None:
    """On one rank to the last bit, gradients too."""
    base = stored(ROUTED, tmp_path)
    copies, sharded = engine(base), engine(base)
    weights = HalfCopies(copies).weights
    with running_world(60.0, 1) as world:
        shard(sharded, device_mesh(world), half=True)
        results = []
        for model in (copies, sharded):
            rewards = model(batch()).rewards_A
            rewards.square().sum().backward()
            results.append(rewards.detach())
        assert torch.equal(*results) and results[0].std() > 0
        theirs = {name: p.grad.to_local() for name, p in sharded.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in weights.items() if p.grad is not None}
    assert ours.keys() == theirs.keys() and kept_in_fp32(copies) & ours.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_that_cannot_compute_with_bf16_weights_is_refused_before_the_training(tmp_path: Path) -> None:
    """XGLM adds a table in fp32 to the embedding, and hands the sum to a norm with bf16 weights."""
    base = stored("xglm", tmp_path / "base")
    TOKENIZER.save_pretrained(base)
    given = [f"model.name={base}", "model.init=pretrained", "data.max_tokens=256", "parallel.precision=bf16"]
    command = arguments(tmp_path, *given, f"run.dir={tmp_path / 'run'}", "parallel.strategy=zero2")
    with pytest.raises(UserError, match=r"cannot compute in bf16 under .*=zero2 .*set parallel\.precision=fp32"):
        rmcore.fit(load_config(None, command))
