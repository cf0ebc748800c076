"""The packed and shared paths equal the padded oracle: rewards and every gradient, for each family and odd case."""

import numpy as np
import pytest
import torch

import rmcore.model.reward_model as module
from rmcore.config import UserError, load_config
from rmcore.data.batches.batch import build_batch
from rmcore.model.attention import composed_attention
from rmcore.model.objectives import Objective, objective_of
from rmcore.model.reward_model import PACKED, PADDED, PATHS, SHARED
from rmcore.model.selftest import choose_path, trial_comparisons
from rmcore.ops.ragged_attention import ragged_attention
from tests.harness.configs import NEEDED
from tests.harness.oracle import (
    BOUND,
    EXACT_SHARED,
    FAMILIES,
    Items,
    assert_close,
    item,
    odd_items,
    padded,
    reward_model,
    tiny_model,
)
from tests.model.test_attention_kinds import tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", EXACT_SHARED)
def test_packed_and_shared_equals_the_padded_oracle(family, path, dtype):
    items = odd_items()
    model = tiny_model(family, dtype)
    loss, rewards = padded(model, items)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    out = reward_model(model, path)(build_batch(items, range(len(items)), share=path == SHARED))
    out.loss_sum.backward()

    assert_close(out.rewards_A, torch.cat(rewards), BOUND[dtype], "rewards")
    assert_close(out.loss_sum, loss, BOUND[dtype], "loss")
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], BOUND[dtype], name)


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_each_odd_case_by_itself_equals_the_oracle(family):
    plain, ours = tiny_model(family, torch.float64), reward_model(tiny_model(family, torch.float64), SHARED)
    for number, one in enumerate(odd_items()):
        _, rewards = padded(plain, [one])
        out = ours(build_batch(Items([one]), [0]))
        assert_close(out.rewards_A, rewards[0], BOUND[torch.float64], number)


def test_an_answer_does_not_see_its_siblings():
    """Other tokens in the first answer do not change the reward of the second one, bit for bit."""
    model = reward_model(tiny_model("llama"), SHARED)
    first, second = item(9, 6, 5, seed=1), item(9, 6, 5, seed=1)
    second.tails[0] = second.tails[0][::-1].copy()
    rewards = [model(build_batch(Items([one]), [0])).rewards_A for one in (first, second)]
    assert rewards[0][1] == rewards[1][1]
    assert rewards[0][0] != rewards[1][0]


def test_a_rank_without_work_has_zero_loss_and_zero_gradients():
    model = reward_model(tiny_model("gpt_neox"), SHARED)
    out = model(build_batch(Items(), []))
    out.loss_sum.backward()
    assert out.loss_sum.item() == 0.0 and out.rewards_A.numel() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("family", EXACT_SHARED)
def test_filling_up_a_row_changes_no_result(family, pruned, monkeypatch):
    batch, found = build_batch(odd_items(), range(len(odd_items()))), []
    for rows in (0, 13):
        model = reward_model(tiny_model(family, torch.float64), SHARED)
        model.use(SHARED, pruned=pruned)
        monkeypatch.setattr(model, "_filling", lambda _, rows=rows: rows)
        out = model(batch)
        out.loss_sum.backward()
        found.append([out.rewards_A, out.loss_sum, *(p.grad for p in model.parameters())])
    assert model.pruned == pruned
    for plain, filled in zip(*found, strict=True):
        assert_close(filled, plain, BOUND[torch.float64], "filled")


@pytest.mark.parametrize("way", ["fp32", "autocast", "weights"])
def test_rows_are_filled_up_where_products_are_compiled_for_each_number_of_rows(way):
    model, seen = reward_model(tiny_model("llama"), SHARED), []
    if way == "weights":
        model = model.bfloat16()
    model.backbone.register_forward_pre_hook(lambda _, __, named: seen.append(named["input_ids"]), with_kwargs=True)
    for prompt in (6, 20, 40, 80, 200, 1100):
        batch = build_batch(Items([item(prompt, 3, 4)]), [0])
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            hidden = model.packed_hidden(batch)
        assert len(hidden) == batch.computed_tokens
    rows = [one.numel() for one in seen]
    assert rows == ([13, 27, 47, 87, 207, 1107] if way == "fp32" else [13, 27, 48, 88, 208, 1152])


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_self_test_finds_an_exact_path(family):
    items = odd_items()
    model = tiny_model(family)
    _, rewards = padded(model, items)
    ours = reward_model(model, PADDED)
    path, line = choose_path(
        ours, items, trial_comparisons(np.array([one.tokens for one in items])), CPU, gradients=True
    )
    assert path == SHARED and not ours.masked
    assert line.startswith(f"attention {path}: ") and "\n" not in line
    out = ours(build_batch(items, range(len(items)), share=path == SHARED))
    assert_close(out.rewards_A, torch.cat(rewards), BOUND[torch.float32], family)


def test_a_chosen_path_that_is_not_exact_is_an_error():
    with pytest.raises(UserError, match=r"model\.attention=packed"):
        choose_path(reward_model(tiny("ALiBi of MPT"), PADDED), odd_items(), [0, 1], CPU, wanted=PACKED)


def test_a_model_that_draws_something_at_random_is_an_error():
    """Its rewards would differ from themselves by more than those of a wrong path from the right ones."""
    model = reward_model(tiny_model("llama"), PADDED)
    model.backbone.norm.register_forward_hook(lambda _, __, states: states * (1 + 0.01 * torch.randn(())))
    with pytest.raises(UserError, match=r"two forwards of one text give rewards that differ .* drawn at random"):
        choose_path(model, odd_items(), [*range(8)], CPU)


def test_the_self_test_sees_a_wrong_fast_path(monkeypatch):
    """With a layout that hides one token from an answer, the self-test takes the next path."""
    import rmcore.model.selftest as selftest

    def wrong(data, numbers, share, **more):
        batch = build_batch(data, numbers, share, **more)
        if share:
            segments = batch.layout.segments_S4
            segments[segments[:, 3] > segments[:, 2], 2] += 1
        return batch

    monkeypatch.setattr(selftest, "build_batch", wrong)
    path, line = choose_path(reward_model(tiny_model("llama"), PADDED), odd_items(), [0], CPU)
    assert path == PACKED and "shared: rewards differ" in line


class Spoiled(torch.autograd.Function):
    """The identity, whose backward returns 1.01 times the gradient."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.01 * gradient


@pytest.mark.parametrize(
    ("spoil", "reason", "masked_without_backward"),
    [
        (Spoiled.apply, "gradients differ from the plain backward's", False),
        (lambda out: out + 1e-9 * out.sum(0, keepdim=True), "a reward depends on tokens of another text", True),
    ],
    ids=["wrong backward", "leak below the rounding of the rewards"],
)
def test_the_self_test_sees_what_the_rewards_do_not_show(monkeypatch, spoil, reason, masked_without_backward):
    import rmcore.model.attention as attention

    right = attention.ragged_attention
    monkeypatch.setattr(attention, "ragged_attention", lambda *arguments: spoil(right(*arguments)))
    for numbers in ([0, 1], range(8)):
        model = reward_model(tiny_model("llama"), PADDED)
        path, line = choose_path(model, odd_items(), [*numbers], CPU, gradients=True)
        assert path == SHARED and model.masked, line  # the model's own attention
        assert line.count(reason) == 2, line  # pruned and whole
        assert all(parameter.grad is None for parameter in model.parameters())
        assert choose_path(model, odd_items(), [*numbers], CPU)[0] == SHARED
        assert model.masked == masked_without_backward


@pytest.mark.parametrize("family", EXACT_SHARED)
def test_half_precision_passes_the_self_test(family):
    """On a GPU the self-test runs in bf16, whose error in the plain forward and backward sets the bounds."""
    model = reward_model(tiny_model(family), PADDED)
    half = torch.autocast("cpu", torch.bfloat16)
    path, line = choose_path(model, odd_items(), [*range(8)], CPU, half=half, gradients=True)
    assert path == SHARED, line


def test_the_gradients_of_every_odd_case_pass():
    for number in range(8):
        model = reward_model(tiny_model("gpt_neox"), PADDED)
        path, line = choose_path(model, odd_items(), [number], CPU, gradients=True)
        assert (path, model.pruned) == (SHARED, True) and "not " not in line, line


def test_the_self_test_computes_on_the_device_that_it_is_given():
    """With `parallel.offload` the weights are not on the device that computes."""
    model = reward_model(tiny_model("llama"), PADDED)
    model.register_parameter("elsewhere", torch.nn.Parameter(torch.empty(1, device="meta")))
    assert next(model.parameters()).device.type == "meta"
    assert choose_path(model, odd_items(), [0], CPU, gradients=True)[0] == SHARED


@pytest.mark.parametrize("window", [0, 1, 5])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_composition_and_the_op_agree(window, groups):
    """The composition of PyTorch calls computes what the contract of the op specifies."""
    layout = build_batch(odd_items(), range(8)).layout
    rows = int(layout.segments_S4[:, 1].max())
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, 4, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, rows, 4 // groups, 8, generator=generator, dtype=torch.float64)
    ours = composed_attention(query, key, value, layout.segments_S4, 0.3, window)
    assert_close(ours, ragged_attention(query, key, value, layout.segments_S4, 0.3, window), 1e-12, "attention")


PLAIN = ["loss.label_smoothing=0.1", "loss.centering=0.01", "loss.margin=data", "loss.length_decorrelation=1.0"]


@pytest.mark.parametrize("key", ["loss.name=bradley_terry", *PLAIN])
def test_plain_bradley_terry_is_computed_by_the_fused_op(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op gets all pairs, and no function of rmcore.model.objectives runs."""
    objective = objective_of(load_config(None, [*NEEDED, key]))
    model = reward_model(tiny_model("llama"), SHARED)
    model.objective = objective
    given = []

    def recorded(*arguments, **named):
        given.append(arguments[3].numel())
        return fused(*arguments, **named)

    def unused(*_):
        raise AssertionError("computed by autograd")

    fused = module.pairwise_loss
    monkeypatch.setattr(module, "pairwise_loss", recorded)
    monkeypatch.setattr(Objective, "loss_sum", unused)
    batch = build_batch(odd_items(), range(8))
    model(batch).loss_sum.backward()
    assert given == [batch.winner_P.numel()] and given[0] > 8


def test_another_objective_is_not_computed_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Objective, "loss_sum", lambda *_: pytest.fail("reached"))
    model = reward_model(tiny_model("llama"), SHARED)
    model.objective = objective_of(load_config(None, [*NEEDED, "loss.log_barrier=0.1"]))
    with pytest.raises(pytest.fail.Exception, match="reached"):
        model(build_batch(odd_items(), range(8)))
