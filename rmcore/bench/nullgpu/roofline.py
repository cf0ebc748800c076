"""The time of a training step on a GPU by a roofline model: bytes at the rate of a copy, products at the matrix rate.

Input: the operators and Triton kernels of one step, as `Trace` sees them on the stand-in; the FLOPs of its products.
Output: milliseconds of the step's products, attention and other kernels, and the model FLOPs utilisation (MFU).
Example: 365 TFLOP of products at 620 TFLOP/s take 589 ms. An addition of two bf16 tensors [26000, 2048] moves 320 MB:
0.12 ms at 2.65 TB/s.

What the model assumes:
- A product takes its FLOPs at the rate that large products reach, whatever bytes it moves.
- Any other kernel takes its bytes at the rate of a copy, and at least LEAST. Its bytes are those of the tensors that it
  gets and returns, also where it reads a slice; a tensor that it changes counts twice. An operator of PyTorch counts as
  one kernel.
- Attention takes the FLOPs of the visible pairs at ATTENTION of the matrix rate.
- The host is always ahead, kernels do not overlap, and other ranks cost nothing.
So it is a bound: a real step takes longer. It compares ways to compute a step; it measures nothing.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LEAST = 2e-6  # seconds of the smallest kernel
ATTENTION = 0.4  # share of the matrix rate that attention over texts of some hundred tokens reaches: assumed
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_mm", "convolution")
ATTENDS = ("attn", "attention")  # parts of the names of attention's operators
UNREAD = ("copy_", "_foreach_copy_", "fill_", "zero_")  # what they change is not read
PEAK = 989e12  # FLOP/s by which MFU is defined: dense bf16 of H100 and H200


class Gpu(NamedTuple):
    """Rates that a GPU reaches, not those of its data sheet: bytes/s of a copy, FLOP/s of a large bf16 product."""

    copy: float
    matrix: float


GPUS = {"h100": Gpu(2.65e12, 620e12), "h200": Gpu(3.9e12, 680e12)}


class Trace(TorchDispatchMode):
    """Records the bytes of what runs within it, in eager mode and in compiled graphs, forward and backward.

    `moved`: by name of the kernel, the bytes of each launch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved: defaultdict[str, list[int]] = defaultdict(list)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled layers run as they are

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        if name not in PRODUCTS and not any(part in name for part in ATTENDS):
            moved = _bytes_of(func, args, kwargs or {}, out)
            if moved:
                self.moved[name].append(moved)
        return out

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within, everything is recorded."""
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        run = CachingAutotuner.run

        def recorded(kernel: Any, *args: Any, **keywords: Any) -> Any:
            changed = [name.startswith("in_out_ptr") for name in kernel.fn.arg_names]
            sizes = [_size(x) * (1 + twice) for x, twice in zip(args, changed, strict=False) if isinstance(x, Tensor)]
            self.moved[f"triton {kernel.fn.__name__}"].append(sum(sizes))
            return run(kernel, *args, **keywords)

        CachingAutotuner.run = recorded  # type: ignore[assignment, method-assign]
        try:
            with self:
                yield
        finally:
            CachingAutotuner.run = run  # type: ignore[method-assign]

    def seconds(self, gpu: Gpu) -> dict[str, float]:
        """By name, seconds of all launches."""
        return {name: sum(max(LEAST, size / gpu.copy) for size in sizes) for name, sizes in self.moved.items()}


def modelled(trace: Trace, *, products: float, attention: float, useful: float) -> dict[str, Any]:
    """For each GPU, milliseconds by kind of work, MFU in percent, and the kernels that take longest.

    Args:
        products, attention: FLOPs of one step, as computed.
        useful: the model's FLOPs of that step, without recompute.
    """
    found: dict[str, Any] = {"other_gb": sum(map(sum, trace.moved.values())) / 1e9}
    for name, gpu in GPUS.items():
        by_kernel = trace.seconds(gpu)
        times = {
            "products": products / gpu.matrix,
            "attention": attention / (ATTENTION * gpu.matrix),
            "other": sum(by_kernel.values()),
        }
        longest = sorted(by_kernel.items(), key=lambda item: -item[1])[:25]
        found[name] = {
            **{f"{kind}_ms": round(1e3 * value, 1) for kind, value in times.items()},
            "mfu_percent": round(100 * useful / sum(times.values()) / PEAK, 1),
            "longest_ms": {kernel: round(1e3 * value, 2) for kernel, value in longest},
        }
    return found


def _size(tensor: Tensor) -> int:
    """Bytes of the distinct elements: an expanded dimension is read once."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride else min(1, length)
    return elements * tensor.element_size()


def _bytes_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """What an operator reads and writes on the device; 0 for views and for memory that is only reserved."""
    name = func._schema.name.split("::")[-1]
    if func.is_view or name.startswith(("empty", "new_empty")):
        return 0
    read = written = 0
    inputs = set()
    # AdamW may change its gradients by its schema, and does if it scales them.
    unchanged = "grads" if name.startswith("_fused_adam") and kwargs.get("grad_scale") is None else None
    for place, argument in enumerate(func._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor) and x.device.type != "cpu"]
        inputs |= {x.untyped_storage()._cdata for x in tensors}
        size = sum(map(_size, tensors))
        changed = argument.alias_info is not None and argument.alias_info.is_write
        written += size if changed and argument.name != unchanged else 0
        read += 0 if changed and (name in UNREAD or argument.name == "out") else size
    new = [
        x
        for x in tree_leaves(out)
        if isinstance(x, Tensor) and x.device.type != "cpu" and x.untyped_storage()._cdata not in inputs
    ]
    if not new and not written:
        return 0  # a reshape without a copy
    if name.startswith(("zeros", "ones", "full", "new_zeros", "zeros_like", "ones_like", "full_like", "new_full")):
        read = 0
    return read + written + sum(map(_size, new))
