"""python -m tests.harness.compile_kernels all|few SM...: compiles the Triton kernels for GPUs.

Input: `few` for two kinds of attention, in bf16 only, `all` for all of them; compute capabilities, e.g. 80 90 100. No
GPU is needed: Triton brings NVIDIA's assembler.
Output: one JSON line per kernel: its name, the capability, registers per thread, bytes that spill to memory, and bytes
of shared memory.
Example: {"kernel": "_score", "sm": 90, "registers": 64, "spilled": 0, "shared": 128}.

The variants are those that the ops launch: the wrappers run on CPU tensors, and each launch is recorded in place of
being made. Triton specialises a kernel for the dtype of each pointer, for integers that are 1 and for those that 16
divides; the same rule is applied here.
"""

import io
import json
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from rmcore.data.batches.batch import build_batch
from rmcore.ops import (
    biased_gelu_triton,
    gather_prefix_triton,
    pairwise_triton,
    rotate_gather_triton,
    tiled_attention_triton,
)
from rmcore.ops.gather_prefix import gather_plan
from rmcore.ops.tiled_attention import tile_plan
from tests.harness.oracle import odd_items

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}
POINTERS[torch.int32] = "*i32"
# Query heads, key heads, sizes of keys and values, window, soft cap, sinks, slopes: gpt-oss, Gemma 2, MPT, MiMo V2.
ATTENTION = (
    (64, 8, 64, 64, 128, 0.0, True, False),
    (8, 4, 256, 256, 4096, 50.0, False, False),
    (32, 32, 128, 128, 0, 0.0, False, True),
    (64, 8, 192, 128, 128, 0.0, True, False),
)


def launches(few: bool) -> Iterator[tuple[JITFunction, dict[str, Any]]]:
    """Each kernel that the ops launch, with its arguments: small and large models, key heads apart and side by side."""
    found: list[tuple[JITFunction, dict[str, Any]]] = []

    def record(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        found.append((kernel, dict(zip(kernel.arg_names, arguments, strict=False)) | named))

    real, JITFunction.run = JITFunction.run, record
    try:
        batch = build_batch(odd_items(), range(8))
        tokens, answers = batch.computed_tokens, batch.last_token_index_A.numel()
        for dtype in (torch.bfloat16, torch.float32):
            for size in (128, 2560, 16384):
                hidden, head = torch.zeros(tokens, size, dtype=dtype), torch.zeros(size)
                pairs = batch.winner_P, batch.loser_P, batch.margin_P, batch.weight_P
                pairwise_triton.forward(hidden, head, batch.last_token_index_A, *pairs, 0.1, 0.01)
                scored = hidden.new_zeros(answers, size)
                pairwise_triton.backward(torch.zeros(answers), scored, head, batch.last_token_index_A, tokens)
            plan = gather_plan(batch.layout.segments_S4)
            for heads, size in ((8, 128), (32, 80)):
                key = torch.zeros(heads, tokens, size, dtype=dtype).transpose(0, 1)  # as the rotation leaves it
                gather_prefix_triton.forward(key, key, *plan[:3])
                copies = key.new_zeros(plan.copies.numel(), heads, size)
                gather_prefix_triton.backward(copies, copies, plan.copy_offset, plan.copies)
                joined, angles = key.new_zeros(tokens, 3 * heads * size), key.new_zeros(tokens, size // 4)
                turns = angles, angles, plan.copy_offset, plan.copies
                rotate_gather_triton.forward(joined, None, *turns, heads)
                rows = key.new_zeros(tokens, heads, size)
                for sums in (True, False):
                    rotate_gather_triton.backward(rows, copies, copies, *turns, sums)
            biased_gelu_triton.backward(*torch.zeros(2, tokens, 8192, dtype=dtype))
            tiles = tile_plan(batch.layout.segments_S4)
            for heads, groups, size, size_v, window, softcap, sinks, slopes in ATTENTION[: 2 if few else None]:
                if dtype == torch.float32 and (few or size != size_v):
                    continue  # K = 192 and V = 128 spill 8 bytes on sm_80 in fp32
                shapes = (heads, size), (groups, size), (groups, size_v)
                q, k, v = (torch.zeros(h, tokens, d, dtype=dtype).transpose(0, 1) for h, d in shapes)
                sinks_H, slopes_H = (torch.zeros(heads) if some else None for some in (sinks, slopes))
                terms = 0.1, window, softcap
                out, log_sum = tiled_attention_triton.forward(q, k, v, *tiles, *terms, sinks_H, slopes_H)
                tiled_attention_triton.backward(out, q, k, v, out, log_sum, *tiles, *terms, slopes_H)
    finally:
        JITFunction.run = real
    yield from found


def source_of(kernel: JITFunction, arguments: dict[str, Any]) -> ASTSource:
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    aligned: dict[tuple[int], list[list[Any]]] = {}
    for place, parameter in enumerate(kernel.params):
        value, special = arguments[parameter.name], not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and special):
            signature[parameter.name], constants[(place,)] = "constexpr", value
            continue
        kinds = {Tensor: lambda x: POINTERS[x.dtype], float: lambda _: "fp32", int: lambda _: "i32"}
        signature[parameter.name] = next(name(value) for kind, name in kinds.items() if isinstance(value, kind))
        # Every tensor that the ops pass begins an allocation, or at a multiple of 16 bytes in one.
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and special):
            aligned[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)


def compiled(kernel: JITFunction, arguments: dict[str, Any], capability: int) -> dict[str, Any]:
    """Registers and spilled bytes of a kernel, as the assembler reports them, and its shared memory."""
    log = io.StringIO()
    with redirect_stdout(log), knobs.nvidia.scope(), knobs.compilation.scope():
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
        made = triton.compile(source_of(kernel, arguments), target=GPUTarget("cuda", capability, 32), options=options)
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
    assert registers is not None and len(spills) == 2, log.getvalue()
    spilled = sum(map(int, spills))
    return {
        "kernel": kernel.__name__,
        "sm": capability,
        "registers": int(registers[1]),
        "spilled": spilled,
        "shared": made.metadata.shared,
    }


if __name__ == "__main__":
    for capability in map(int, sys.argv[2:]):
        seen = set()
        for kernel, arguments in launches(few=sys.argv[1] == "few"):
            source = source_of(kernel, arguments)
            key = kernel.__name__, json.dumps([source.signature, str(source.constants), str(source.attrs)])
            if key not in seen:
                seen.add(key)
                print(json.dumps(compiled(kernel, arguments, capability)), flush=True)
