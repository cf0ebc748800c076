"""Puts the CPU ops of `rmcore.ops.layers` into the layers of a decoder that transformers wrote.

Input: a backbone. Output: how many modules compute by these ops; its weights and their names stay as they were.
Example: GPT-NeoX's layers get `linear`, `gelu` and `rotate`, Llama's `linear`, `swiglu`, `rms_norm` and `rotate`.

A module changes its class to one derived from its own. It is recognised by the code of its forward, so the many models
whose norm or MLP is a copy of Llama's are covered, and one that computes something else is left alone. Tensors that the
ops do not take (another device or dtype, compiled code, DTensors, fake tensors) pass through the module's own forward.
"""

import functools
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

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
    if not (ops.fused() and layers.available()):
        return 0
    found = 0
    for module in list(backbone.modules()):
        if (derived := _derived(module)) is not None:
            module.__class__ = derived
            found += 1
    for namespace in {sys.modules[type(module).__module__] for module in backbone.modules()}:
        original, half = getattr(namespace, ROTATION, None), getattr(namespace, HALF, None)
        known = any(_same(original, one) for one in ROTATIONS)
        if original is not None and known and _same(half, llama.rotate_half):
            setattr(namespace, ROTATION, _rotation(original))
    return found


def _derived(module: nn.Module) -> type[nn.Module] | None:
    kind = type(module)
    if kind is nn.Linear:
        return CpuLinear
    if kind is nn.GELU and module.approximate == "none":
        return _class(kind, CpuGelu)
    if kind is GELUActivation and module.act is F.gelu:
        return _class(kind, CpuGelu)
    if _same(kind.forward, llama.LlamaRMSNorm.forward):
        return _class(kind, CpuRmsNorm)
    if _same(kind.forward, llama.LlamaMLP.forward) and isinstance(module.act_fn, SILU):
        return _class(kind, CpuSwiglu)
    return None


def _class(kind: type[nn.Module], mixin: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})


def _same(one: Any, other: Any) -> bool:
    """Whether two functions have the same code, apart from their docstrings and the names of local variables."""
    a, b = (getattr(x, "__code__", None) for x in (one, other))
    if not (isinstance(a, CodeType) and isinstance(b, CodeType)):
        return False
    return (a.co_code, a.co_names, a.co_consts[1:]) == (b.co_code, b.co_names, b.co_consts[1:])


def _takes(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether the ops take a tensor: a plain one on the CPU, outside compiled code."""
    return type(x) is Tensor and x.is_cpu and x.dtype in dtypes and not torch.compiler.is_compiling()


class CpuLinear(nn.Linear):
    """nn.Linear in fp32 by oneDNN. In bf16 PyTorch's own is oneDNN's."""

    def forward(self, input: Tensor) -> Tensor:
        plain = type(self.weight) in (nn.Parameter, Tensor) and self.weight.dtype == torch.float32
        if plain and _takes(input, torch.float32) and not torch.is_autocast_enabled("cpu"):
            return torch.ops.rmcore.linear(input, self.weight, self.bias)
        return super().forward(input)


class CpuGelu(nn.Module):
    """The exact GELU in one pass."""

    def forward(self, input: Tensor) -> Tensor:
        if _takes(input, torch.float32, torch.bfloat16):
            return torch.ops.rmcore.gelu(input)
        return super().forward(input)


class CpuRmsNorm(nn.Module):
    """Llama's RMSNorm in one pass."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        plain = type(self.weight) in (nn.Parameter, Tensor) and self.weight.dtype == torch.float32
        if plain and _takes(hidden_states, torch.float32):
            return torch.ops.rmcore.rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


class CpuSwiglu(nn.Module):
    """Llama's MLP with its activation and product in one pass."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if not _takes(x, torch.float32, torch.bfloat16):
            return super().forward(x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        if _takes(gate, torch.float32, torch.bfloat16) and gate.dtype == up.dtype:
            return self.down_proj(torch.ops.rmcore.swiglu(gate, up))
        return self.down_proj(F.silu(gate) * up)


def _rotation(original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' function, and within a packed forward the op where it takes the tensors."""

    @functools.wraps(original)
    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        plain = not (rest or named) and _takes(cos, torch.float32) and _takes(sin, torch.float32)
        kinds = torch.float32, torch.bfloat16
        if plain and current_layout() is not None and _takes(q, *kinds) and _takes(k, *kinds) and q.shape[0] == 1:
            return torch.ops.rmcore.rotate(q, cos, sin), torch.ops.rmcore.rotate(k, cos, sin)
        return original(q, k, cos, sin, *rest, **named)

    return rotation
