"""AdamW for bf16 weights and for averages in bf16 or in 8 bits: it computes in fp32, some rows of a tensor at a time.

Input: parameters with fp32 gradients.
Output: updated weights and averages, each rounded to the format in which it is stored.
Example: `q_proj.weight` [4096, 4096] in bf16 with int8 averages takes 34 MB + 34 MB; in fp32 67 MB + 134 MB.

The formats, for weights (`model.weights`) and averages (`optim.states`):
- fp32: as torch's AdamW has them.
- bf16: rounded at random, without bias (rmcore.parallel.stochastic).
- int8, for averages: a code of 8 bits for each element and an fp32 scale for each block of BLOCK elements, as
  bitsandbytes quantises them (Dettmers et al., arXiv 2110.02861). Small tensors and narrow matrices keep fp32.

The blocks are parts of a row, and no strategy divides a row. So weights, averages and draws depend neither on the world
size nor on the strategy, and a checkpoint of codes and scales fits all of them.

Temporary memory is some fp32 copies of CHUNK elements. Nothing waits for the device: a step whose gradient is not
finite is skipped by `found_inf`, which stays there.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rmcore.ops.blockwise import functional
from rmcore.parallel.placement import held
from rmcore.parallel.stochastic import key_of, round_to_bf16, update_key

AVERAGES = ("exp_avg", "exp_avg_sq")
BLOCK = 256  # elements with one scale
SMALLEST = 4096  # elements of the smallest tensor whose averages are quantised, as in bitsandbytes
NARROWEST = 64  # elements of the shortest row; it has a block of its own
CHUNK = {"cpu": 1 << 16, "cuda": 1 << 23}  # elements of a piece: on a CPU its temporaries stay in the cache


class AdamW(torch.optim.Optimizer):
    """Loshchilov and Hutter, arXiv 1711.05101, as torch's AdamW computes it.

    Args:
        groups: parameter groups of torch's form; a parameter may be a DTensor of FSDP2.
        names: the name of each parameter: the draws of its rounding depend on it.
        states: the format of the averages: fp32, bf16 or int8.
        seed: of the draws.

    `found_inf`: 0-dim; unless it is 0, `step` changes nothing. `grad_scale`: 0-dim; `step` divides the gradients by it,
    which clips them. Both as in torch's fused AdamW. `updates`: 0-dim, how many steps changed something; all
    parameters share it, as the `step` of their states.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        names: Mapping[nn.Parameter, str],
        states: str,
        seed: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        **_: Any,  # ZeroRedundancyOptimizer hands over torch's other defaults
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._names, self.states, self._seed = names, states, seed
        self._tables: dict[tuple[torch.device, str], Tensor] = {}
        self.updates: Tensor | None = None

    def make_state(self, parameter: nn.Parameter, updates: float = 0.0) -> None:
        """Give a parameter averages of zero, after `updates` updates."""
        local = _local(parameter)
        if self.updates is None:
            self.updates = torch.full((), updates, device=local.device)
        state = self.state[parameter]
        state["step"] = self.updates
        for average in AVERAGES:
            if self.states == "int8" and is_quantised(parameter):
                rows, columns = _rows(local).shape
                state[average] = torch.full_like(local, self._zero(average), dtype=torch.uint8)
                state[f"{average}_scale"] = torch.zeros(rows, _blocks(columns), device=local.device)
            else:
                dtype = torch.bfloat16 if self.states == "bf16" else torch.float32
                state[average] = torch.zeros_like(local, dtype=dtype)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the loop computes the gradients"
        trained = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for _, parameter in trained:
            if not self.state.get(parameter):
                self.make_state(parameter)
        if not trained or self.updates is None:
            return
        skipped = self.found_inf.to(self.updates.device).bool() if self.found_inf is not None else None
        if skipped is not None and skipped.device.type == "cpu":  # to look costs nothing there
            if skipped:
                return
            skipped = None
        self.updates += 1.0 if skipped is None else (~skipped).float()
        key = update_key(self.updates)
        for group, parameter in trained:
            self._update(parameter, group, key, skipped)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any], key: Tensor, skipped: Tensor | None) -> None:
        assert parameter.grad is not None and self.updates is not None
        name, state, (beta1, beta2) = self._names[parameter], self.state[parameter], group["betas"]
        weight, gradient = _rows(_local(parameter)), _rows(_local(parameter.grad))
        rows, columns = weight.shape
        if not rows * columns:
            return
        first = _first_element(parameter)
        updates = self.updates.double()
        step_size = (group["lr"] / (1.0 - beta1**updates)).float()
        root_of_correction = (1.0 - beta2**updates).sqrt().float()

        def stored(part: str, target: Tensor, value: Tensor, at: int) -> None:
            if skipped is not None:
                value = torch.where(skipped, target.float(), value)
            if target.dtype == torch.bfloat16:
                value = round_to_bf16(value, key_of(self._seed, name, part), key, first + at * columns)
            target.copy_(value)

        at_once = max(1, CHUNK.get(weight.device.type, CHUNK["cuda"]) // columns)
        for at in range(0, rows, at_once):
            here = slice(at, min(rows, at + at_once))
            grad = gradient[here].float()
            if self.grad_scale is not None:
                grad = grad / self.grad_scale
            averages = []
            for average in AVERAGES:
                value = self._read(state, average, here, columns)
                if average == "exp_avg":
                    value = value.lerp_(grad, 1.0 - beta1)
                else:
                    value = value.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
                averages.append(value)
            step = averages[1].sqrt().div_(root_of_correction).add_(group["eps"]).reciprocal_()
            step.mul_(averages[0]).mul_(step_size)
            updated = weight[here].float()
            updated = (updated * (1.0 - group["lr"] * group["weight_decay"])).sub_(step)
            stored("weight", weight[here], updated, at)
            for average, value in zip(AVERAGES, averages, strict=True):
                if f"{average}_scale" in state:
                    self._write_codes(state, average, here, value, skipped)
                else:
                    stored(average, _rows(state[average])[here], value, at)

    def _read(self, state: dict[str, Tensor], average: str, rows: slice, columns: int) -> Tensor:
        """Some rows of an average as a new fp32 tensor."""
        stored = _rows(state[average])[rows]
        if f"{average}_scale" not in state:
            return stored.to(torch.float32, copy=True)
        scale = state[f"{average}_scale"][rows].flatten()
        codes = _padded(stored, self._zero(average)).flatten()
        table = self._table(average, codes.device)
        values = torch.ops.bitsandbytes.dequantize_blockwise(codes, scale, table, BLOCK, torch.float32)
        return values.view(stored.shape[0], -1)[:, :columns]

    def _write_codes(
        self, state: dict[str, Tensor], average: str, rows: slice, value: Tensor, skipped: Tensor | None
    ) -> None:
        codes, scale = _rows(state[average])[rows], state[f"{average}_scale"][rows]
        table = self._table(average, codes.device)
        flat = _padded(value, 0.0).contiguous().flatten()
        new_codes, new_scale = torch.ops.bitsandbytes.quantize_blockwise(flat, table, BLOCK)
        new_codes = new_codes.view(codes.shape[0], -1)[:, : codes.shape[1]]
        new_scale = new_scale.view(scale.shape)
        codes.copy_(new_codes if skipped is None else torch.where(skipped, codes, new_codes))
        scale.copy_(new_scale if skipped is None else torch.where(skipped, scale, new_scale))

    def _table(self, average: str, device: torch.device) -> Tensor:
        """The values of the 256 codes, relative to the scale of their block; the second average is never negative."""
        if (device, average) not in self._tables:
            table = functional().create_dynamic_map(signed=average == "exp_avg")
            self._tables[device, average] = table.to(device)
        return self._tables[device, average]

    def _zero(self, average: str) -> int:
        """The code of zero."""
        return int(self._table(average, torch.device("cpu")).abs().argmin())


def is_quantised(parameter: Tensor) -> bool:
    """Whether 8 bits are for this parameter's averages; the shape of the whole parameter decides."""
    return parameter.ndim > 1 and parameter.numel() >= SMALLEST and parameter.shape[-1] >= NARROWEST


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _rows(tensor: Tensor) -> Tensor:
    """A view with two dimensions: the last one, and all others in one."""
    return tensor.view(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.view(1, -1)


def _blocks(columns: int) -> int:
    return -(-columns // BLOCK)


def _padded(rows: Tensor, value: float) -> Tensor:
    """Rows of whole blocks."""
    missing = -rows.shape[-1] % BLOCK
    return F.pad(rows, (0, missing), value=value) if missing else rows


def _first_element(parameter: Tensor) -> int:
    """The place of this rank's first element in the flattened whole parameter."""
    if not isinstance(parameter, DTensor):
        return 0
    return held(parameter).row * (parameter.numel() // max(1, parameter.shape[0]))
