"""Recurrent layers share prompts exactly: rewards and every gradient equal the padded oracle, for each family."""

import functools
import sys
import threading

import numpy as np
import pytest
import torch

from rmcore.config import UserError
from rmcore.data.batches.batch import AttentionLayout, build_batch
from rmcore.hf_export.parity import reloaded
from rmcore.model.backbone import recompute_activations
from rmcore.model.cpu_layers import use_cpu_ops
from rmcore.model.recurrent import scans
from rmcore.model.recurrent.pieces import Piece, pieces, scan_of
from rmcore.model.reward_model import PACKED, PADDED, SHARED
from rmcore.model.selftest import choose_path
from tests.harness.oracle import BOUND, Items, assert_close, item, odd_items, padded, reward_model
from tests.harness.recurrent_models import KINDS, RECURRENT, precision, recurrent_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("family", RECURRENT)
def test_packed_and_shared_equals_the_padded_oracle(family, dtype):
    items = odd_items()
    with precision(dtype):
        model = recurrent_model(family, dtype)
        loss, rewards = padded(model, items)
        loss.backward()
        expected = {name: p.grad for name, p in model.named_parameters()}
        for path in (SHARED, PACKED):
            model.zero_grad(set_to_none=True)
            out = reward_model(model, path)(build_batch(items, range(len(items)), share=path == SHARED))
            out.loss_sum.backward()
            assert_close(out.rewards_A, torch.cat(rewards), BOUND[dtype], "rewards")
            for name, parameter in model.named_parameters():
                if expected[name] is not None:
                    assert_close(parameter.grad, expected[name], BOUND[dtype], name)


@pytest.mark.parametrize("family", KINDS)
def test_each_odd_case_by_itself_equals_the_oracle(family):
    """Also texts of several chunks, and a rank that has no work."""
    items = Items([*odd_items(), item(70, 40, 3, seed=9), item(3, 80, 0, 66, seed=10, pairs=[(0, 1), (1, 2)])])
    with precision(torch.float64), torch.no_grad():
        model = recurrent_model(family, torch.float64)
        ours = reward_model(model, SHARED)
        found = [ours(build_batch(items, [number])).rewards_A for number in range(len(items))]
        ours.use(PADDED)
        for number, one in enumerate(items):
            assert_close(found[number], padded(model, [one])[1][0], BOUND[torch.float64], number)
    ours = reward_model(recurrent_model(family), SHARED)
    ours(build_batch(Items(), [])).loss_sum.backward()
    assert all(p.grad is None or not p.grad.any() for p in ours.parameters())


@pytest.mark.parametrize("half", [None, torch.autocast("cpu", torch.bfloat16)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", [kind for kind in KINDS if kind != "kimi_linear"])  # bf16 changes its experts
def test_the_self_test_accepts_shared_prompts(family, half):
    """No reward depends on a token of another text, and in half precision the paths differ by its rounding only."""
    model = reward_model(recurrent_model(family), PADDED)
    path, line = choose_path(model, odd_items(), [*range(8)], CPU, half=half, gradients=True)
    assert path == SHARED, line


@pytest.mark.parametrize("family", KINDS)
def test_nan_in_one_text_stays_there(family):
    """An answer with a NaN changes nothing in its siblings and neighbours, and neither does padding."""
    items = Items([item(9, 6, 5, seed=1), item(40, 1, 7, seed=2)])
    model = reward_model(recurrent_model(family), SHARED)
    batch = build_batch(items, [0, 1])
    healthy = model(batch).rewards_A
    items[0].tails[1][-1] = 15  # a token that no other text has
    with torch.no_grad():
        model.backbone.get_input_embeddings().weight[15] = torch.nan
    rewards = model(build_batch(items, [0, 1])).rewards_A
    assert torch.isnan(rewards[1]) and torch.equal(rewards[[0, 2, 3]], healthy[[0, 2, 3]])


@pytest.mark.parametrize("how", ["full", "selective"])
@pytest.mark.parametrize("family", ["qwen3_5", "mamba", "recurrent_gemma"])
def test_recompute_in_the_backward_sees_the_layout(family, how):
    gradients = []
    for recompute in ("none", how):
        model = reward_model(recurrent_model(family).train(), SHARED)
        recompute_activations(model.backbone, recompute)
        model(build_batch(odd_items(), range(8))).loss_sum.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_two_threads_compute_two_batches_with_one_model():
    model = reward_model(recurrent_model("qwen3_5"), SHARED)
    batches = [build_batch(odd_items(), numbers) for numbers in ([0, 1, 2, 6], [3, 4, 5, 7])]
    with torch.no_grad():
        expected = [model(batch).rewards_A for batch in batches]
    found: list[list[torch.Tensor]] = [[], []]
    together = threading.Barrier(2)

    def compute(thread: int) -> None:
        for _ in range(3):
            together.wait()
            with torch.no_grad():
                found[thread].append(model(batches[thread]).rewards_A)

    threads = [threading.Thread(target=compute, args=(thread,)) for thread in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for thread in (0, 1):
        assert len(found[thread]) == 3
        assert all(torch.equal(rewards, expected[thread]) for rewards in found[thread])


@pytest.mark.parametrize("family", KINDS)
def test_transformers_own_forward_is_unchanged(family):
    model = recurrent_model(family)
    use_cpu_ops(model.base_model)  # a reward model has them everywhere, and they round in another way
    texts = torch.tensor(np.random.default_rng(0).integers(20, 61, size=(2, 40)))
    with torch.no_grad():
        before = model(input_ids=texts, use_cache=False).logits
        reward_model(model, SHARED)(build_batch(odd_items(), range(8)))
        model.base_model.set_attn_implementation(recurrent_model(family).config._attn_implementation)
        assert torch.equal(model(input_ids=texts, use_cache=False).logits, before)


def test_the_pieces_of_a_row():
    """The row of three texts: the example of pieces.py, and a text that shares nothing."""
    layout = AttentionLayout(torch.tensor([[0, 5, 0, 0], [5, 6, 0, 3], [6, 10, 6, 6]], dtype=torch.int32))
    prompt = Piece(0, 3)
    assert pieces(layout) == [prompt, Piece(3, 5, prompt), Piece(5, 6, prompt), Piece(6, 10)]
    unequal = AttentionLayout(torch.tensor([[0, 5, 0, 0], [5, 6, 0, 3], [6, 7, 0, 2]], dtype=torch.int32))
    with pytest.raises(ValueError, match="one point where it ends"):
        pieces(unequal)


def test_a_kernel_for_pieces_of_any_length_gets_their_bounds(monkeypatch):
    """With flash-linear-attention the pieces follow each other in one row. Here PyTorch computes them one by one."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule as rule

    original = getattr(rule, "rmcore_original", rule)

    def kernel(*inputs, g, beta, initial_state, output_final_state, cu_seqlens, **options):
        outputs, states = [], []
        for n, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
            state = None if initial_state is None else initial_state[n : n + 1]
            part = [x[:, start:end] for x in (*inputs, g, beta)]
            output, final = original(
                *part[:3], g=part[3], beta=part[4], initial_state=state, output_final_state=True, **options
            )
            outputs.append(output)
            states.append(final)
        return torch.cat(outputs, 1), torch.cat(states) if output_final_state else None

    layout = build_batch(odd_items(), range(8)).layout
    rows = int(layout.segments_S4[:, 1].max())
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, rows, 2, 8, generator=generator)
    decay, beta = -torch.rand(1, rows, 2, generator=generator), torch.rand(1, rows, 2, generator=generator)
    inputs = {"g": decay, "beta": beta, "use_qk_l2norm_in_kernel": True}
    expected, _ = scans.delta_rule(original, layout, query, key, value, **inputs)
    monkeypatch.setattr(scans, "takes_bounds", lambda rows: True)
    found, _ = scans.delta_rule(kernel, layout, query, key, value, **inputs)
    assert_close(found, expected, 1e-5, "delta rule")
    assert all(batch.bounds is not None for batch in scan_of(layout, 0, CPU).batches)


# ---- the packages that transformers calls on a GPU


def with_kernels(monkeypatch, function):
    """Qwen3.5's functions as with the packages installed: transformers then calls them wherever the tensors are."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as namespace

    for name in ("torch_chunk_gated_delta_rule", "causal_conv1d_fn"):
        present = getattr(namespace, name)
        in_pytorch = scans.reference(getattr(present, "rmcore_original", present))
        monkeypatch.setattr(namespace, name, functools.wraps(in_pytorch)(functools.partial(function, in_pytorch)))


def test_on_the_cpu_their_kernels_do_not_run(monkeypatch, tmp_path):
    """Neither in a packed row, nor in the padded path, nor where an export is reloaded."""

    def kernel(in_pytorch, *arguments, **options):
        raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")

    items = Items([item(4, 2, 3)])
    batches = {path: build_batch(items, [0], share=path == SHARED) for path in (SHARED, PADDED)}
    expected = {p: reward_model(recurrent_model("qwen3_5"), p)(batch).rewards_A for p, batch in batches.items()}
    recurrent_model("qwen3_5").save_pretrained(tmp_path)
    with_kernels(monkeypatch, kernel)
    texts = torch.tensor([[25, 30, 41]])
    assert torch.isfinite(reloaded(tmp_path)(input_ids=texts, use_cache=False).logits).all()
    with_kernels(monkeypatch, kernel)
    for path, batch in batches.items():
        assert_close(reward_model(recurrent_model("qwen3_5"), path)(batch).rewards_A, expected[path], 1e-5, path)


@pytest.mark.parametrize("when", ["fp32", "half precision", "gradient"])
def test_what_a_kernel_refuses_is_one_message_before_the_training(monkeypatch, when):
    def kernel(in_pytorch, *arguments, **options):
        if when == "gradient" and torch.is_grad_enabled():
            raise AssertionError("head sizes above 256 have no backward")
        if when == "fp32" or (when == "half precision" and torch.is_autocast_enabled("cpu")):
            raise AssertionError("only head sizes up to 256")
        return in_pytorch(*arguments, **options)

    with_kernels(monkeypatch, kernel)
    monkeypatch.setattr(scans, "runs_kernels", lambda rows: True)
    model = reward_model(recurrent_model("qwen3_5"), PADDED)
    what = {"fp32": "the reward of a text", "half precision": "the reward of a text in half precision"}
    message = f"Qwen3_5TextModel cannot compute {what.get(when, 'the gradient of a reward')}: AssertionError: "
    with pytest.raises(UserError, match=f"^{message}"):
        choose_path(model, Items([item(4, 2, 3)]), [0], CPU, half=torch.autocast("cpu", torch.bfloat16), gradients=True)


def test_a_package_that_cannot_be_imported_is_not_used(monkeypatch, tmp_path):
    """As flash-linear-attention without Triton: it is installed, and transformers computes without it."""
    monkeypatch.setattr(scans, "runs_kernels", lambda rows: True)
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla" / "__init__.py").write_text("raise RuntimeError('no Triton')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, name)
    scans.has_delta_rules.cache_clear()
    assert not scans.takes_bounds(torch.zeros(1))
    scans.has_delta_rules.cache_clear()
