"""Counts what a compiled decoder layer keeps until its backward, without compiling it.

Input: a decoder on fake tensors, a recompute, and a function that runs the decoder forward.
Output: bytes, or None where the compiler does not take the layer as one graph.
Example: a Mistral layer of width D in bf16 keeps 48 D bytes per token when it runs eagerly, and 34 D when it is
compiled: the compiler computes the fp32 results of RMSNorm and the product within SwiGLU again.

torch.compile traces a layer together with its backward, and cuts the graph where the fewest bytes pass from forward to
backward; results of elementwise operations are cheap to compute again (min-cut; "Rematerialization" in PyTorch's
documentation of AOTAutograd). The count traces and cuts as the compiler does, and generates no kernels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

from rmcore.model.backbone import decoder_layers
from rmcore.model.compiled import compile_layers


def compiled_bytes(backbone: PreTrainedModel, layer: int, recompute: str, forward: Callable[[], object]) -> int | None:
    """Bytes that decoder layer number `layer` keeps in `forward`, its input among them, its weights not.

    What all layers share (rotary angles, the row's layout) does not count.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    kept: list[int] = []

    def cut(joint: fx.GraphModule, inputs: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        both = min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **options)
        weights = options.get("static_lifetime_input_indices") or []
        kept.append(_kept(both[0], options["num_fwd_outputs"], weights))
        return both

    def as_it_is(graph: fx.GraphModule, inputs: Any) -> Any:
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=as_it_is, bw_compiler=as_it_is, partition_fn=cut, decompositions=select_decomp_table
    )
    torch.compiler.reset()  # what is traced here must not count as a compilation of the run, nor the other way round
    try:
        compile_layers(backbone, recompute, backend=backend)
        for number, other in enumerate(decoder_layers(backbone)):
            if number != layer:
                vars(other).pop("forward", None)  # as it was: its class's own
        forward()
    finally:
        torch.compiler.reset()
    return kept[0] if len(kept) == 1 else None


def _kept(forward: fx.GraphModule, outputs: int, weights: Sequence[int]) -> int:
    """Bytes that a forward graph hands to its backward behind its `outputs`."""
    results = next(node for node in forward.graph.nodes if node.op == "output").args[0]
    inputs = [node for node in forward.graph.nodes if node.op == "placeholder"]
    states = [tensor for tensor in map(_tensor, results[:outputs]) if tensor is not None]
    # A view of a weight is in memory anyway. An output is the input of the next layer, where it counts.
    there = [tensor for tensor in (_tensor(inputs[number]) for number in weights) if tensor is not None]
    known = {_place(tensor) for tensor in (*there, *states)}
    like_states = {(_bytes(tensor), tensor.dtype) for tensor in states}
    total = 0
    for node in results[outputs:]:
        tensor = _tensor(node)
        if tensor is None or _place(tensor) in known:
            continue
        known.add(_place(tensor))
        if node.op != "placeholder" or (_bytes(tensor), tensor.dtype) in like_states:  # of the inputs the hidden state
            total += _bytes(tensor)
    return total


def _tensor(node: Any) -> Tensor | None:
    """The value of a node, as it was traced; None for a number."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _place(tensor: Tensor) -> int:
    """The same for all tensors that share their memory."""
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().nbytes())  # a symbol in the graph, which has the value of this batch
