"""The CPU ops in the layers of a decoder: as exact as transformers' own code in fp32, compared with it in fp64.

The oracle is the same module in fp64, which the ops do not take. A result may be off by some roundings of the numbers
that are added up: the bounds are multiples of the unit roundoff, 2^-24 in fp32 and 2^-8 in bf16.
"""

import copy
import pickle
from functools import partial
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN, GELUActivation
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.llama import modeling_llama as llama

from rmcore import ops
from rmcore.data.batches.batch import AttentionLayout, build_batch
from rmcore.model.backbone import decoder_layers, recompute_activations
from rmcore.model.cpu_layers import use_cpu_ops
from rmcore.model.layout_context import packed_layout
from rmcore.model.reward_model import SHARED
from rmcore.ops import layers
from tests.harness.oracle import odd_items, reward_model, rms_norm_in_its_own_dtype, tiny_model

pytestmark = pytest.mark.skipif(not layers.available(), reason="the C++ kernels are not in use")

ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
LAYOUT = AttentionLayout(torch.tensor([[0, 70, 0, 0]], dtype=torch.int32))


def results(module: nn.Module, x: Tensor, up: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The output and all gradients of a module for the same input and weights, in `dtype`."""
    module, x = copy.deepcopy(module).to(dtype), x.to(dtype, copy=True).requires_grad_()
    if dtype == torch.float64 and isinstance(module, llama.LlamaRMSNorm):  # transformers' own rounds to fp32
        module.forward = MethodType(rms_norm_in_its_own_dtype, module)
    out = module(x)
    grads = torch.autograd.grad(out, [x, *module.parameters()], up.to(out.dtype))
    return [one.detach().double() for one in (out, *grads)]


def assert_exact(module: nn.Module, x: Tensor, up: Tensor, dtype: torch.dtype, roundings: float) -> None:
    wanted, found = (results(module, x, up, kind) for kind in (torch.float64, dtype))
    for place, (a, b) in enumerate(zip(found, wanted, strict=True)):
        bound = roundings * ROUNDOFF[dtype] * float(b.abs().max().clamp(min=1.0))
        assert (a - b).abs().max() <= bound, place


def given(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(scale).bfloat16().float()


def prepared(module: nn.Module) -> nn.Module:
    parent = nn.ModuleList([module])
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(given(*parameter.shape, seed=seed + 10))
    assert use_cpu_ops(parent) > 0
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("module", [GELUActivation(), nn.GELU()])
def test_gelu(module, dtype):
    x = torch.cat([given(1, 70, 33, scale=2.0), torch.tensor([0.0, -0.0, 30.0, -30.0, 5e-3]).expand(1, 70, 5)], -1)
    assert_exact(prepared(copy.deepcopy(module)), x, given(*x.shape, seed=1), dtype, roundings=4)


@pytest.mark.parametrize("size", [16, 50, 256])
@pytest.mark.parametrize("norm", [partial(llama.LlamaRMSNorm, eps=1e-5), nn.LayerNorm])
def test_norms(norm, size):
    module = prepared(norm(size))
    assert_exact(module, given(1, 150, size), given(1, 150, size, seed=1), torch.float32, roundings=150**0.5)


@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 70**0.5), (torch.bfloat16, 8)])
def test_swiglu(dtype, roundings):
    module = prepared(llama.LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=70)))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.125)
    assert_exact(module, given(1, 70, 32), given(1, 70, 32, seed=1), dtype, roundings)


class Rotated(nn.Module):
    """q and k of one tensor, as GPT-NeoX's attention has them, rotated by the function of a modeling module."""

    def __init__(self, namespace, turned: int) -> None:
        super().__init__()
        self.namespace, angle = namespace, given(1, 70, turned // 2, seed=5)
        self.angle = torch.cat([angle, angle], -1)

    def __deepcopy__(self, memory):
        return self

    def forward(self, x: Tensor) -> Tensor:
        q, k, _ = x.view(1, 70, 4, 96).transpose(1, 2).chunk(3, -1)
        wide = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
        cos, sin = (one.to(wide) for one in (self.angle.double().cos(), self.angle.double().sin()))
        return torch.cat(self.namespace.apply_rotary_pos_emb(q, k, cos, sin), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("namespace", "turned"), [(neox, 8), (neox, 32), (llama, 32)])
def test_rotation(namespace, turned, dtype):
    use_cpu_ops(tiny_model("gpt_neox" if namespace is neox else "llama"))
    x, up = given(1, 70, 384), given(1, 4, 70, 64, seed=1)
    module = Rotated(namespace, turned)
    with packed_layout(LAYOUT):
        assert_exact(module, x, up, dtype, roundings=4)
        packed = results(module, x, up, torch.float32)
    outside = results(module, x, up, torch.float32)  # there transformers' own function runs
    assert all((a - b).abs().max() <= 4 * ROUNDOFF[torch.float32] * 8 for a, b in zip(packed, outside, strict=True))


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_a_norm_that_only_products_read_rounds_as_they_do(family):
    model = tiny_model(family)
    norm = decoder_layers(model)[0].input_layernorm
    with torch.no_grad():
        for seed, parameter in enumerate(norm.parameters()):
            parameter.copy_(given(*parameter.shape, seed=seed + 10))
    x, weight = given(1, 150, norm.weight.shape[0]).requires_grad_(), given(24, norm.weight.shape[0], seed=3)
    up = given(1, 150, 24, seed=4).bfloat16()
    assert use_cpu_ops(model) > 0
    found = []
    for before_products in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            out = F.linear(hidden := norm.forward(x, before_products=before_products), weight)
        assert hidden.dtype == (torch.bfloat16 if before_products else torch.float32)
        found.append([out, *torch.autograd.grad(out, [x, *norm.parameters()], up)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        last = model.base_model.norm if family == "llama" else model.base_model.final_layer_norm
        assert norm(x).dtype == torch.bfloat16 and last(x).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [8, 32])
def test_the_joined_projection_of_gpt_neox(turned, dtype):
    """Against transformers' split and rotation in fp64; the bias, part of the input, gets the sum over the rows."""
    rows, heads, size = 150, 3, 32
    qkv, angle = given(rows, 3 * heads * size), given(rows, turned // 2, seed=5)
    cos, sin = (torch.cat([one, one], -1) for one in (angle.cos(), angle.sin()))
    ups = [given(rows, heads, size, seed=6 + n) for n in range(3)]

    x = qkv.double().requires_grad_()
    q, k, v = x.view(1, rows, heads, 3 * size).transpose(1, 2).chunk(3, -1)
    q, k = neox.apply_rotary_pos_emb(q, k, cos[None].double(), sin[None].double())
    wanted = [one[0].transpose(0, 1) for one in (q, k, v)]
    (grad,) = torch.autograd.grad(wanted, x, [up.double() for up in ups])

    y, bias = qkv.to(dtype).requires_grad_(), torch.zeros(3 * heads * size, requires_grad=True)
    found = layers.rotate_qkv(y, bias, cos, sin, heads)
    grads = torch.autograd.grad(found, [y, bias], [up.to(dtype) for up in ups])
    for a, b in zip((*found, grads[0]), (*wanted, grad), strict=True):
        assert (a.double() - b).abs().max() <= 4 * ROUNDOFF[dtype] * float(b.detach().abs().max())
    assert (grads[1].double() - grad.sum(0)).abs().max() <= rows * ROUNDOFF[torch.float32] * float(grad.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_sums_the_gradient_of_the_bias(dtype):
    x, up = given(150, 70, scale=2.0), given(150, 70, seed=1)
    y = x.double().requires_grad_()
    (wanted,) = torch.autograd.grad(F.gelu(y), y, up.double())
    z, bias = x.to(dtype).requires_grad_(), torch.zeros(70, requires_grad=True)
    of_x, of_bias = torch.autograd.grad(layers.gelu(z, bias), [z, bias], up.to(dtype))
    assert (of_x.double() - wanted).abs().max() <= 4 * ROUNDOFF[dtype] * float(wanted.abs().max())
    bound = 150 * ROUNDOFF[torch.float32] * float(wanted.abs().max())
    assert of_bias.dtype == torch.float32 and (of_bias.double() - wanted.sum(0)).abs().max() <= bound


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_a_model_is_as_exact_as_with_its_own_layers(family, monkeypatch):
    batch = build_batch(odd_items(), range(8), share=True)

    def gradients(dtype: torch.dtype, fused: bool) -> list[Tensor]:
        monkeypatch.setattr(ops, "fused", lambda: fused)
        whole = tiny_model(family, dtype)
        whole.load_state_dict(tiny_model(family).state_dict())  # random numbers differ between precisions
        model = reward_model(whole, SHARED)
        out = model(batch)
        return [
            out.rewards_A.detach().double(),
            *(g.double() for g in torch.autograd.grad(out.loss_sum, list(model.parameters()))),
        ]

    wanted = gradients(torch.float64, False)
    own, ours = (
        max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in zip(found, wanted, strict=True))
        for found in map(partial(gradients, torch.float32), (False, True))
    )
    assert 0.0 < ours <= max(3 * own, 1e-5) and ours != own


def test_no_result_depends_on_the_number_of_threads():
    module, threads = prepared(llama.LlamaRMSNorm(64)), torch.get_num_threads()
    x, up = given(1, 500, 64), given(1, 500, 64, seed=1)
    try:
        found = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(results(module, x, up, torch.float32))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_what_computes_something_else_keeps_its_code():
    replaced = nn.GELU()
    replaced.forward = torch.relu
    plain = nn.LayerNorm(16, bias=False), nn.LayerNorm(16, elementwise_affine=False), nn.LayerNorm((2, 16))
    model = nn.ModuleList([GemmaRMSNorm(16), nn.GELU("tanh"), ACT2FN["gelu_new"], *plain, replaced])
    assert use_cpu_ops(model) == 0
    assert not any("forward" in vars(module) for module in model[:-1]) and replaced.forward is torch.relu


@pytest.mark.parametrize("namespace, family", [(neox, "gpt_neox"), (llama, "llama")])
def test_a_second_model_leaves_the_rotation_as_the_first_made_it(namespace, family):
    use_cpu_ops(tiny_model(family))
    rotation = namespace.apply_rotary_pos_emb
    assert hasattr(rotation, "__wrapped__") and not hasattr(rotation.__wrapped__, "__wrapped__")
    use_cpu_ops(tiny_model(family))
    assert namespace.apply_rotary_pos_emb is rotation


def test_a_model_with_the_ops_can_be_copied_and_pickled():
    x, norm = given(1, 70, 16), prepared(llama.LlamaRMSNorm(16))
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        with torch.no_grad():
            other.weight.mul_(2.0)
        assert torch.equal(other(x), 2.0 * norm(x))


def test_a_second_derivative_is_refused():
    x = given(1, 70, 16).requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(prepared(nn.GELU())(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_neither_recompute_nor_evaluation_changes_a_bit(family, half, how):
    batch, found = build_batch(odd_items(), range(8)), []
    for recompute in ("none", how):
        model = reward_model(tiny_model(family), SHARED).train()
        recompute_activations(model.backbone, recompute)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = model(batch)
        out.loss_sum.backward()
        found.append([out.rewards_A.detach(), *(p.grad for p in model.parameters())])
    loaded = reward_model(tiny_model(family).eval(), SHARED).eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        assert torch.equal(loaded(batch).rewards_A, found[0][0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
