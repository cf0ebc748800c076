"""Lets the layers of a decoder that transformers wrote compute by the ops of `rmcore.ops.layers` on a CPU.

Input: a backbone. Output: the number of its modules that compute by these ops; weights and their names stay.
Example: Llama's layers get `swiglu`, `rms_norm` and `rotate`, GPT-NeoX's `layer_norm` and, with the fused classes of
fused_layers.py, `gelu` and `rotate_qkv`.

Every `RewardModel` has them, so a training, its evaluations, a recomputed layer, `rmcore evaluate`, `score` and `serve`
compute the same numbers.

A module is recognised by the code of its forward, so the many models whose norm or MLP is a copy of Llama's are
covered, and one that computes something else is left alone. Tensors that the ops do not take (another device or dtype,
DTensors, fake tensors that nothing counts) pass through the module's own forward.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN, GELUActivation
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.llama import modeling_llama as llama

from rmcore import ops
from rmcore.model.layout_context import current_layout
from rmcore.ops import layers

ROTATION = "apply_rotary_pos_emb"  # the name of the function in the module of each model, which calls HALF
HALF = "rotate_half"
ROTATIONS = neox.apply_rotary_pos_emb, llama.apply_rotary_pos_emb  # of the first columns of a head, and of all
SILU = nn.SiLU, type(ACT2FN["silu"])


def use_cpu_ops(backbone: nn.Module) -> int:
    """Let the modules of `backbone` compute by the CPU ops where they have one. Returns how many do."""
    if not layers.available():
        return 0
    found = 0
    feeding = {norm for module in backbone.modules() for norm in _norms_before_products(module)}
    for module in backbone.modules():
        # A forward in the module's own dictionary was put there by a caller: it stays.
        if "forward" not in vars(module) and (forward := _forward(module)) is not None:
            extra = {"before_products": module in feeding} if forward in (_layer_norm, _rms_norm) else {}
            module.forward = functools.partial(forward, module, **extra)
            found += 1
    for namespace in {sys.modules[type(module).__module__] for module in backbone.modules()}:
        original, half = getattr(namespace, ROTATION, None), getattr(namespace, HALF, None)
        known = any(_same(original, one) for one in ROTATIONS)
        if original is not None and known and _same(half, llama.rotate_half):
            setattr(namespace, ROTATION, _rotation(original))
    return found


def without_cpu_ops(layer: nn.Module) -> None:
    """Undo `use_cpu_ops` in a layer that will be compiled, because equal layers shall share one compilation."""
    for module in layer.modules():
        if getattr(vars(module).get("forward"), "func", None) in (_gelu, _layer_norm, _rms_norm, _swiglu):
            del module.forward


def _forward(module: nn.Module) -> Callable[..., Tensor] | None:
    """What computes the same as the forward of the module, by an op."""
    kind = type(module)
    exact_gelu = kind is nn.GELU and module.approximate == "none"
    if exact_gelu or (kind is GELUActivation and module.act is F.gelu):
        return _gelu
    if kind is nn.LayerNorm and isinstance(module.bias, Tensor) and module.bias.dim() == 1:
        return _layer_norm
    if _same(kind.forward, llama.LlamaRMSNorm.forward):
        return _rms_norm
    if _same(kind.forward, llama.LlamaMLP.forward) and isinstance(module.act_fn, SILU):
        return _swiglu
    return None


def _norms_before_products(layer: nn.Module) -> tuple[nn.Module, ...]:
    """The norms of a decoder layer whose results only linear layers read, which round them under autocast.

    Such a norm rounds its result itself, so that nothing writes and reads it in fp32 in between.
    """
    parts: Any = layer
    if _computes_as(layer, llama.LlamaDecoderLayer):
        if not (_computes_as(parts.self_attn, llama.LlamaAttention) and _computes_as(parts.mlp, llama.LlamaMLP)):
            return ()
    elif type(layer) is not neox.GPTNeoXLayer:
        return ()
    return cast(nn.Module, layer.input_layernorm), cast(nn.Module, layer.post_attention_layernorm)


def _computes_as(module: nn.Module, known: type[nn.Module]) -> bool:
    """Whether the forward of a module is that of a class, within the decorators that transformers puts around both."""
    return _same(inspect.unwrap(type(module).forward), inspect.unwrap(known.forward))


def _same(one: Any, other: Any) -> bool:
    """Whether two functions have the same code, apart from their docstrings and the names of local variables."""
    a, b = (getattr(x, "__code__", None) for x in (one, other))
    if not (isinstance(a, CodeType) and isinstance(b, CodeType)):
        return False
    return (a.co_code, a.co_names, a.co_consts[1:]) == (b.co_code, b.co_names, b.co_consts[1:])


def op_takes(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether the ops take a tensor here: outside compiled code, with compiled kernels in use."""
    return layers.takes(x, *dtypes) and not torch.compiler.is_compiling() and ops.fused()


def _gelu(module: nn.Module, input: Tensor) -> Tensor:
    if op_takes(input, torch.float32, torch.bfloat16):
        return layers.gelu(input)
    return type(module).forward(module, input)


def _layer_norm(module: Any, input: Tensor, before_products: bool) -> Tensor:
    if all(op_takes(x, torch.float32) for x in (input, module.weight, module.bias)):
        half = before_products and _rounds_products()
        return layers.layer_norm(input, module.weight, module.bias, module.eps, half)
    return type(module).forward(module, input)


def _rms_norm(module: Any, hidden_states: Tensor, before_products: bool) -> Tensor:
    if op_takes(module.weight, torch.float32) and op_takes(hidden_states, torch.float32):
        half = before_products and _rounds_products()
        return layers.rms_norm(hidden_states, module.weight, module.variance_epsilon, half)
    return type(module).forward(module, hidden_states)


def _rounds_products() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def _swiglu(module: Any, x: Tensor) -> Tensor:
    """Llama's MLP with its activation and product in one pass."""
    if not op_takes(x, torch.float32, torch.bfloat16):
        return type(module).forward(module, x)
    gate, up = module.gate_proj(x), module.up_proj(x)
    if op_takes(gate, torch.float32, torch.bfloat16) and gate.dtype == up.dtype:
        return module.down_proj(layers.swiglu(gate, up))
    return module.down_proj(F.silu(gate) * up)


def _rotation(original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' function, and within a packed forward the op where it takes the tensors."""

    @functools.wraps(original)
    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        plain = not (rest or named) and op_takes(cos, torch.float32) and op_takes(sin, torch.float32)
        kinds = torch.float32, torch.bfloat16
        if plain and current_layout() is not None and op_takes(q, *kinds) and op_takes(k, *kinds) and q.shape[0] == 1:
            return layers.rotate(q, cos, sin), layers.rotate(k, cos, sin)
        return original(q, k, cos, sin, *rest, **named)

    return rotation
