"""The layers of GPT-NeoX whose elementwise work runs in one pass on GPUs, here on a CPU in fp64 that stands for one."""

import pytest
import torch
from torch import nn

from rmcore.data.batches.batch import build_batch
from rmcore.model import fused_layers, varlen
from rmcore.model.backbone import decoder_layers, recompute_activations
from rmcore.model.compiled import compile_layers
from rmcore.model.fused_layers import FusedAttention, FusedMLP
from rmcore.model.reward_model import PADDED, SHARED, RewardModel
from tests.harness.oracle import assert_close, odd_items, reward_model, tiny_model
from tests.harness.varlen import kernel


@pytest.fixture
def as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """fp64 counts as half precision, and variable-length attention runs. Returns which fused ops were called."""
    called: list[str] = []

    def record(name: str) -> None:
        real = getattr(fused_layers, name)
        monkeypatch.setattr(fused_layers, name, lambda *arguments: (called.append(name), real(*arguments))[1])

    for module in (fused_layers, varlen):
        monkeypatch.setattr(module, "HALF", (torch.float64,))
    monkeypatch.setattr(varlen, "_kernel", lambda: (kernel, False))
    record("rotate_gather")
    record("biased_gelu")
    return called


def computed(model: RewardModel, varlen: bool = True) -> list[torch.Tensor]:
    """Rewards, and the gradients of all parameters."""
    batch = build_batch(odd_items(), range(8), share=model.path == SHARED)
    out = model(batch.with_varlen() if varlen else batch)
    model.zero_grad()
    out.loss_sum.backward()
    return [out.rewards_A.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def model_in_fp64(**changes: object) -> RewardModel:
    hf_model = tiny_model("gpt_neox", torch.float64)
    for name, value in changes.items():
        setattr(hf_model.config, name, value)
    model = reward_model(hf_model, SHARED)
    model.use(SHARED, pruned=True)
    model.train()
    return model


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_rewards_and_gradients_are_those_of_the_padded_model(as_on_gpus: list[str], recompute: str) -> None:
    model = model_in_fp64()
    recompute_activations(model.backbone, recompute)
    ours = computed(model)
    layers = len(decoder_layers(model.backbone))
    again = 1 if recompute == "none" else 2
    assert sorted(as_on_gpus) == (layers - 1) * again * ["biased_gelu"] + (layers - 1) * again * ["rotate_gather"]
    as_on_gpus.clear()
    model.use(PADDED)
    theirs = computed(model, varlen=False)
    assert not as_on_gpus and len(ours) == len(theirs) == 1 + len(list(model.parameters()))
    for mine, exact in zip(ours, theirs, strict=True):
        assert_close(mine, exact, 1e-11, recompute)


def test_the_last_layer_and_other_projections_compute_as_transformers_wrote_them(as_on_gpus: list[str]) -> None:
    model = model_in_fp64()
    first, second, last = decoder_layers(model.backbone)
    assert type(first.attention) is FusedAttention and type(first.mlp) is FusedMLP
    assert type(last.attention) is FusedAttention.__mro__[1] and type(last.mlp) is FusedMLP.__mro__[1]
    expected = computed(model)

    class Replaced(nn.Linear):  # as LoRA or FP8 do
        pass

    for linear in (first.attention.query_key_value, second.mlp.dense_h_to_4h):
        linear.__class__ = Replaced
    as_on_gpus.clear()
    for mine, exact in zip(computed(model), expected, strict=True):
        assert_close(mine, exact, 1e-11, "replaced")
    assert sorted(as_on_gpus) == ["biased_gelu", "rotate_gather"]


def test_a_batch_for_the_cpu_computes_as_transformers_wrote_it(as_on_gpus: list[str]) -> None:
    computed(model_in_fp64(), varlen=False)
    assert not as_on_gpus


def test_frozen_biases_get_no_gradient(as_on_gpus: list[str]) -> None:
    model = model_in_fp64()
    first = decoder_layers(model.backbone)[0]
    frozen = [first.attention.query_key_value.bias, first.mlp.dense_h_to_4h.bias]
    for parameter in frozen:
        parameter.requires_grad_(False)
    computed(model)
    assert as_on_gpus and all(parameter.grad is None for parameter in frozen)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_compiled_layers_run_the_same_ops_in_one_graph(monkeypatch: pytest.MonkeyPatch, recompute: str) -> None:
    for module in (fused_layers, varlen):
        monkeypatch.setattr(module, "HALF", (torch.float64,))

    def attend(query, key, value, cu_q, cu_k, max_q, max_k, **named):  # type: ignore[no-untyped-def]
        return query * 2.0 + key[: len(query)] * 0.5 + value[: len(query)]  # lengths are no matter of the compiler

    monkeypatch.setattr(varlen, "_kernel", lambda: (attend, False))
    torch._dynamo.reset()
    plain, ours = model_in_fp64(), model_in_fp64()
    recompute_activations(plain.backbone, recompute)
    compile_layers(ours.backbone, recompute, backend="aot_eager", fullgraph=True)
    try:
        for mine, exact in zip(computed(ours), computed(plain), strict=True):
            assert torch.equal(mine, exact)
    finally:
        torch._dynamo.reset()
