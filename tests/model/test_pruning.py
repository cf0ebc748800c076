"""The pruned last layer equals the padded oracle: rewards and every gradient, with recompute and autocast too."""

import pytest
import torch

from rmcore.data.batches.batch import build_batch
from rmcore.model.attention_terms import Terms
from rmcore.model.backbone import recompute_activations
from rmcore.model.pruning import scored_attention
from rmcore.model.reward_model import PACKED, PADDED, SHARED
from rmcore.model.selftest import choose_path
from tests.harness.oracle import (
    BOUND,
    EXACT_SHARED,
    Items,
    assert_close,
    item,
    odd_items,
    padded,
    reward_model,
    tiny_model,
)

CPU = torch.device("cpu")


def pruned_model(model, path=SHARED):
    ours = reward_model(model, path)
    ours.use(path, pruned=True)
    assert ours.pruned
    return ours


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("path", [SHARED, PACKED])
@pytest.mark.parametrize("family", EXACT_SHARED)
def test_pruned_equals_the_padded_oracle(family, path):
    """odd_items() has answers that are scored at the same row, and scored rows inside a prefix."""
    items = odd_items()
    model = tiny_model(family, torch.float64)
    loss, rewards = padded(model, items)
    loss.backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)

    out = pruned_model(model, path)(build_batch(items, range(len(items)), share=path == SHARED))
    out.loss_sum.backward()

    assert_close(out.rewards_A, torch.cat(rewards), BOUND[torch.float64], "rewards")
    for name, gradient in gradients(model).items():
        assert_close(gradient, expected[name], BOUND[torch.float64], name)


@pytest.mark.parametrize("how", ["full", "selective", "offload"])
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_recompute_changes_no_gradient(family, how):
    batch = build_batch(odd_items(), range(8))
    plain, recomputed = (pruned_model(tiny_model(family)) for _ in range(2))
    recompute_activations(recomputed.backbone, how)
    for model in (plain, recomputed):
        model.train()
        model(batch).loss_sum.backward()
    for (name, ours), theirs in zip(recomputed.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen3"])
def test_autocast_costs_no_more_than_without_pruning(family):
    """Both round to bf16 (2^-8) at every layer; they may differ by twice the error of bf16 itself."""
    batch = build_batch(odd_items(), range(8))
    model = reward_model(tiny_model(family), SHARED)
    exact = model(batch).rewards_A
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = model(batch).rewards_A
        model.use(SHARED, pruned=True)
        ours = model(batch).rewards_A
    assert (ours - exact).abs().max() <= 2 * (whole - exact).abs().max()


def test_the_last_layer_sees_only_the_scored_rows():
    rows = {}
    model = pruned_model(tiny_model("llama"))
    for place, layer in enumerate(model.backbone.layers):
        layer.mlp.register_forward_hook(
            lambda _, arguments, __, place=place: rows.update({place: arguments[0].shape[1]})
        )
    batch = build_batch(Items([item(12, 5, 9)]), [0])
    model(batch)
    assert rows == {0: 26, 1: 26, 2: 2}


def test_a_rank_without_work_has_zero_gradients():
    for family in ("gpt_neox", "llama", "mixtral"):
        model = pruned_model(tiny_model(family))
        model(build_batch(Items(), [])).loss_sum.backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_forward_that_fails_leaves_no_state_behind():
    """The next, unpruned forward is right even if a pruned one failed inside the layer."""
    items = odd_items()
    model = pruned_model(tiny_model("llama"))
    batch = build_batch(items, range(8))
    handle = model.backbone.layers[-1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(batch)
    handle.remove()
    model.use(SHARED)
    _, rewards = padded(tiny_model("llama"), items)
    assert_close(model(batch).rewards_A, torch.cat(rewards), BOUND[torch.float32], "rewards")


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3", "gpt2"])
def test_the_self_test_prunes_where_that_is_exact(family):
    model = reward_model(tiny_model(family), PADDED)
    path, line = choose_path(model, odd_items(), [0, 6], CPU, gradients=True)
    assert (path, model.pruned) == (SHARED, True)
    assert "last layer on scored tokens only" in line and "not " not in line


def test_the_self_test_does_not_prune_a_layer_that_computes_in_its_own_code_before_attention():
    """Then no module can be run again on all tokens; the line gives the reason."""
    model = reward_model(tiny_model("llama"), PADDED)
    model.backbone.layers[-1].register_forward_pre_hook(lambda _, arguments: (arguments[0] * 1, *arguments[1:]))
    path, line = choose_path(model, odd_items(), [0, 6], CPU, gradients=True)
    assert (path, model.pruned) == (SHARED, False)
    assert "not shared, last layer on scored tokens: ValueError: no module of the last layer" in line


def test_scored_attention_is_the_softmax_over_visible_rows():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 9, 2, 8, generator=generator, dtype=torch.float64)
    visible = torch.rand(3, 9, generator=generator) < 0.5
    visible[:, 0] = True
    ours = scored_attention(query, key, value, visible, torch.zeros(3, 9), Terms(0.3))
    for answer in range(3):
        for head in range(4):
            rows = visible[answer].nonzero()[:, 0]
            chance = (0.3 * key[rows, head // 2] @ query[answer, head]).softmax(0)
            assert_close(ours[answer, head], chance @ value[rows, head // 2], 1e-14, (answer, head))
