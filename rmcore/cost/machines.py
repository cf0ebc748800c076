"""The machines that `rmcore plan` knows: memory, peak rates and links, from data sheets; and a CPU, measured.

Enters: the name of a GPU. Leaves: a `Machine`. Example: h100 -> 79 GiB, 989 TFLOP/s in bf16, 450 GB/s a direction over
NVLink, 50 GB/s over InfiniBand.

Sources: NVIDIA's data sheets of A100 (NVLink 600 GB/s both ways), H100 and H200 SXM (900 GB/s both ways; 67 TFLOP/s in
fp32 outside the tensor cores, which PyTorch uses by default); DGX A100 and H100 user guides: one 200 and one 400 Gb/s
port a GPU. The memory is what torch.cuda reports of such cards. Peaks in bf16: rmcore.training.metrics.PEAK_FLOPS.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

LINK_SHARE = 0.8  # of a link's rate that collectives reach: an assumption; NCCL's own tests show 0.75 to 0.9
GIB = 2.0**30


@dataclass(frozen=True)
class Machine:
    """One rank's device: bytes of memory (0: not known, as on a CPU), peak FLOP/s, and bytes/s a direction by link."""

    name: str
    memory: float
    bf16: float
    fp32: float
    memory_rate: float  # bytes/s of its memory, which the optimizer's step is bound by; 0: not known
    within: float  # bytes/s between ranks of a host; 0: not known
    between: float  # the same between hosts

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"

    def peak(self, precision: str) -> float:
        return self.bf16 if precision == "bf16" else self.fp32


def _gpu(name: str, like: str, gib: float, fp32: float, memory_rate: float, within: float, between: float) -> Machine:
    from rmcore.cost.flops import PEAK_FLOPS

    return Machine(name, gib * GIB, PEAK_FLOPS[like], fp32, memory_rate, within, between)


NAMES = ("a100", "a100-40gb", "h100", "h200", "cpu")


def machine(name: str, rate: float | None = None, memory_rate: float = 0.0) -> Machine:
    """The machine of a name in NAMES. `rate`: peak FLOP/s in place of the data sheet's; a cpu needs it, and the bytes/s
    of its memory (`memory_rate`).
    """
    table = {
        "a100": ("A100", 79.1, 19.5e12, 2.04e12, 300e9, 25e9),
        "a100-40gb": ("A100", 39.4, 19.5e12, 1.56e12, 300e9, 25e9),
        "h100": ("H100", 79.1, 67e12, 3.35e12, 450e9, 50e9),
        "h200": ("H200", 139.8, 67e12, 4.8e12, 450e9, 50e9),
    }
    if name == "cpu":
        assert rate is not None, "the caller measures it"
        return Machine("cpu", 0.0, rate, rate, memory_rate, 0.0, 0.0)
    found = _gpu(name, *table[name])
    return found if rate is None else replace(found, bf16=rate, fp32=rate)


def matrix_rate(precision: str, shape: tuple[int, int, int] = (1536, 1536, 1536), seconds: float = 1.0) -> float:
    """FLOP/s of a matrix product [m, k] x [k, n] on this process's threads: the best of many."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    m, k, n = shape
    a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
    return 2.0 * m * k * n / _best_seconds(lambda: torch.mm(a, b), seconds)


def copy_rate(seconds: float = 0.5) -> float:
    """Bytes/s that a copy of 256 MB reads and writes on this process's threads: the best of many."""
    import torch

    a, b = torch.ones(2**25), torch.zeros(2**25)
    return 2.0 * a.nbytes / _best_seconds(lambda: b.copy_(a), seconds)


def _best_seconds(call: Callable[[], object], seconds: float) -> float:
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds:
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best
