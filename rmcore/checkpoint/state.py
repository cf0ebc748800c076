"""Cuts the training state, weights and AdamW's averages, into pieces that any strategy and world size can read.

Input: a strategy, with its parameters by name and the AdamW of this rank.
Output: `Piece`s, each a flat range of a named tensor; and a copy of this rank's share of them in host memory.
Example: `score.weight` [1, 128] under ddp on 2 ranks: both ranks hold elements 0 to 128. Rank 0 writes elements 0 to 64
of `weight/score.weight`, `exp_avg/score.weight` and `exp_avg_sq/score.weight`, rank 1 writes the rest. Under zero3,
rank 0 holds rows 0 to 3 of `q_proj.weight` [5, 4], which are elements 0 to 12; rank 1 holds elements 12 to 20.

Ranks that hold the same piece divide it among them, so everything is written once, and all ranks write about the same
amount. A checkpoint fits any strategy and any world size, because it consists of names and ranges only.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rmcore.parallel.adamw import AdamW
from rmcore.parallel.placement import held
from rmcore.parallel.strategy import Strategy
from rmcore.parallel.world import World

AVERAGES = ("exp_avg", "exp_avg_sq")
SCALE = "_scale"  # added to the name of an average: the scales of its blocks, if it is stored in 8 bits
EMA = "ema"  # the moving average of the weights
BUFFER_BYTES = 64 << 20  # of a pinned buffer, a power of two


@dataclass(frozen=True)
class Piece:
    """This rank's part of one flattened tensor: elements `start` to `start + len(local)`.

    Attributes:
        key: weight/NAME, exp_avg/NAME, exp_avg_sq/NAME or ema/NAME; of averages in 8 bits, also exp_avg_scale/NAME and
            exp_avg_sq_scale/NAME.
        local: [n], a view of the live tensor, on its device.
        replica, replicas: `replicas` ranks hold this piece; this rank is number `replica` of them.
    """

    key: str
    local: Tensor
    start: int
    replica: int
    replicas: int

    @property
    def share(self) -> tuple[int, int]:
        """The range of `local` that this rank writes."""
        length = self.local.numel()
        return length * self.replica // self.replicas, length * (self.replica + 1) // self.replicas


def pieces(strategy: Strategy, world: World) -> Iterator[Piece]:
    """This rank's part of the state: of every trained parameter the weight, AdamW's averages if they are here, and the
    moving average of the weight if there is one.

    Weights that are not trained (LoRA) come from the base model again. Raises RuntimeError for a weight that is not the
    one of the optimizer, in its dtype: a checkpoint never contains a copy in another precision.
    """
    every_rank = (world.rank, world.size)
    optimized = {id(parameter) for group in strategy.optimizer.param_groups for parameter in group["params"]}
    for name, parameter in strategy.named_parameters().items():
        if not parameter.requires_grad:
            continue
        if id(parameter) not in optimized or parameter.dtype != strategy.dtype:
            raise RuntimeError(
                f"{name} ({parameter.dtype}) is a copy, not the {strategy.dtype} weight that the optimizer updates"
            )
        yield _piece(f"weight/{name}", parameter, parameter, every_rank)
        if state := strategy.adamw.state.get(parameter):
            holders = (0, 1) if strategy.adamw_is_split else every_rank
            for average in [part for each in AVERAGES for part in (each, each + SCALE) if part in state]:
                yield _piece(f"{average}/{name}", state[average], parameter, holders)
        if strategy.ema:
            yield _piece(f"{EMA}/{name}", strategy.ema.weights[name], parameter, every_rank)


def updates_made(adamw: torch.optim.Optimizer) -> int:
    """AdamW's own count of updates, without skipped steps; 0 before the first one. Waits for the device."""
    return next((int(state["step"]) for state in adamw.state.values()), 0)


def make_averages(strategy: Strategy, keys: set[str], updates: int) -> None:
    """Give AdamW the state that it would make at its first update, for its parameters that have averages in `keys`."""
    adamw = strategy.adamw
    mine = {parameter for group in adamw.param_groups for parameter in group["params"]}
    for name, parameter in strategy.named_parameters().items():
        if parameter not in mine or f"exp_avg/{name}" not in keys:
            continue
        if isinstance(adamw, AdamW):
            adamw.make_state(parameter, float(updates))
            continue
        state = adamw.state[parameter]
        state["step"] = torch.full((), float(updates), dtype=torch.float32, device=parameter.device)
        for average in AVERAGES:
            state[average] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _piece(key: str, tensor: Tensor, parameter: nn.Parameter, holders: tuple[int, int]) -> Piece:
    """`tensor`: the parameter, or a state of it with as many numbers in each of the parameter's rows."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().view(-1)
    if not isinstance(parameter, DTensor):
        return Piece(key, local, 0, *holders)
    place = held(parameter)
    return Piece(key, local, place.row * (local.numel() // max(1, place.rows)), place.replica, place.replicas)


class HostCopy:
    """A copy of this rank's share of the state in host memory, made by `take`.

    The memory (12 bytes per parameter, 16 with optim.ema, divided by the world size) is kept and used again for the
    next copy. It is not pinned, because PyTorch rounds pinned memory up to a power of two: a GPU copies through two
    small pinned buffers.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self.slices: list[tuple[str, int, Tensor]] = []  # key, first element in the whole tensor, host tensor [n]

    def take(self, pieces: Iterable[Piece]) -> None:
        """Copy the pieces; returns when the host memory has the values."""
        shares = []
        for piece in pieces:
            begin, end = piece.share
            if end > begin:
                shares.append((piece.key, piece.start + begin, piece.local[begin:end]))
        size = sum(_padded(share.nbytes) for _, _, share in shares)
        on_gpu = any(share.is_cuda for _, _, share in shares)
        if self._memory is None or self._memory.numel() < size:
            self._memory = None  # free the old memory before the new one is allocated
            self._memory = torch.empty(size, dtype=torch.uint8)
        self.slices, offset, copies = [], 0, []
        for key, start, share in shares:
            host = self._memory[offset : offset + share.nbytes].view(share.dtype)
            copies.append((host, share))
            self.slices.append((key, start, host))
            offset += _padded(share.nbytes)
        if on_gpu:
            buffers = [torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            through_buffers(copies, buffers, lambda: torch.cuda.current_stream().record_event())
        else:
            for host, share in copies:
                host.copy_(share)


def through_buffers(
    copies: Iterable[tuple[Tensor, Tensor]], buffers: Sequence[Tensor], copied: Callable[[], torch.cuda.Event]
) -> None:
    """Copy each (host, device) pair of flat tensors, in parts, through two pinned buffers in turn.

    While the host empties one buffer, the GPU fills the other.

    Args:
        buffers: two of uint8, equally large.
        copied: an event after the copies to buffers so far.
    """
    parts = (
        part
        for host, device in copies
        for part in zip(*(x.split(buffers[0].numel() // x.element_size()) for x in (host, device)), strict=True)
    )
    filled: list[tuple[Tensor, Tensor, torch.cuda.Event]] = []

    def empty_oldest() -> None:
        host, buffer, event = filled.pop(0)
        event.synchronize()
        host.copy_(buffer)

    for number, (host, device) in enumerate(parts):
        buffer = buffers[number % 2][: host.nbytes].view(host.dtype)
        buffer.copy_(device, non_blocking=True)
        filled.append((host, buffer, copied()))
        if len(filled) == 2:
            empty_oldest()
    while filled:
        empty_oldest()


def _padded(size: int) -> int:
    return -(-size // 64) * 64
