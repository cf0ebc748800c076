"""Keeps the inputs of checkpointed layers in host memory, for `parallel.recompute=offload`.

Input: a backbone whose layers are checkpointed (rmcore.model.backbone).
Output: None; from then on a layer's saved input waits in pinned host memory for the backward.
Example: 32 layers of width 4096 in bf16 and a row of 32,768 tokens: 31 inputs of 268 MB, 8.3 GB, leave the GPU. There
remain the last layer's activations, and at most two inputs: one that is being copied, and one that is computed with.

The copies run on a stream of their own, next to the compute. In the forward, the input of a layer leaves while the
layer computes. In the backward, when a layer's input is read, that of the layer before it is already on its way back.
On a CPU the inputs are in host memory in any case, and nothing is copied.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def offload_inputs(backbone: nn.Module) -> None:
    """Let the checkpoint functions of `backbone`, which transformers has set, keep what they save in host memory."""
    copies = HostCopies()

    def offloading(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            with copies:  # inside the layer the hooks of the checkpoint itself apply, so only inputs come here
                return checkpoint(*arguments, **keywords)

        return run

    for module in backbone.modules():
        if checkpoint := vars(module).get("_gradient_checkpointing_func"):
            setattr(module, "_gradient_checkpointing_func", offloading(checkpoint))  # noqa: B010 (not a module)


class HostCopies(saved_tensors_hooks):
    """Within, floating tensors that autograd saves are copied to the host, and return in the backward."""

    def __init__(self) -> None:
        super().__init__(self._pack, _unpack)
        self._stream: torch.cuda.Stream | None = None
        self._newest: Callable[[], _Copy | None] = lambda: None

    def _pack(self, tensor: Tensor) -> "Tensor | _Copy":
        if not tensor.is_cuda or not tensor.is_floating_point():
            return tensor
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        copy = _Copy(tensor, self._stream, self._newest)
        self._newest = weakref.ref(copy)  # the graph alone keeps a copy alive
        return copy


def _unpack(packed: "Tensor | _Copy") -> Tensor:
    return packed if isinstance(packed, Tensor) else packed.back()


class _Copy:
    """One tensor in pinned host memory. `before`: the copy that was made before it, which the backward reads next."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream, before: "Callable[[], _Copy | None]") -> None:
        self._stream, self._before, self._device = stream, before, tensor.device
        self._returning: Tensor | None = None
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))  # which computes the tensor
        with torch.cuda.stream(stream):
            self._host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not given away before the copy is done

    def back(self) -> Tensor:
        """The tensor on its device. The copy before this one starts to return, too."""
        self._start()
        here, tensor = torch.cuda.current_stream(self._device), self._returning
        assert tensor is not None
        here.wait_stream(self._stream)
        tensor.record_stream(here)
        self._returning = None
        if before := self._before():
            before._start()
        return tensor

    def _start(self) -> None:
        """Begin to copy the tensor to its device, if that has not begun."""
        if self._returning is None:
            with torch.cuda.stream(self._stream):
                self._returning = self._host.to(self._device, non_blocking=True)
