"""Counts the operations for which the host waits for a value of the device; on a GPU each one would stall the step.

The CPU stands for the device. `with DeviceReads() as reads:` fills `reads.seen` with the operations, as text.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# What the dispatcher sees: `item()`, `int()`, `if tensor:`, a mask as an index, a comparison that gives a bool.
WAITS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
)
# What reads the memory of a CPU tensor without the dispatcher, and copies that would wait for a GPU.
METHODS = (Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__)


class DeviceReads:
    """`seen`: the operations; `label` is called for each one, and its result is kept next to it in `labels`."""

    def __init__(self, label: Any = lambda: None) -> None:
        self.seen: list[str] = []
        self.labels: list[Any] = []
        self._label = label
        self._modes = (_Dispatched(self.note), _Called(self.note))

    def note(self, name: str) -> None:
        self.seen.append(name)
        self.labels.append(self._label())

    def __enter__(self) -> "DeviceReads":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Dispatched(TorchDispatchMode):
    def __init__(self, note: Any) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            self._note(str(func))
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    def __init__(self, note: Any) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        to_host = func is Tensor.to and any(
            isinstance(given, str) and given == "cpu" for given in (*args, *(kwargs or {}).values())
        )
        if func in METHODS or to_host:
            self._note(func.__name__)
        return func(*args, **(kwargs or {}))
