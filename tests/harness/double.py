"""Lets models that round to fp32 within compute in fp64, so that a test sees errors below 1e-7."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class InDouble(TorchFunctionMode):
    """Within, a cast to fp32 is a cast to fp64, and what is made in fp32 is made in fp64."""

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        args, kwargs = ([_double(value) for value in args], {k: _double(v) for k, v in (kwargs or {}).items()})
        return function(*args, **kwargs)


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
