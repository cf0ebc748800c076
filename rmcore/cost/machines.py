"""Describes the machines that `rmcore plan` knows: GPUs by their data sheets, a CPU by measuring it.

Input: the name of a GPU, or `cpu`.
Output: a `Machine`: memory, peak rates, rates of the links between ranks.
Example: h100 -> 79.1 GiB, 989 TFLOP/s in bf16, 450 GB/s per direction over NVLink, 50 GB/s over InfiniBand.

Sources: NVIDIA's data sheets of A100 (NVLink 600 GB/s in both directions together), H100 and H200 SXM (900 GB/s
likewise; 67 TFLOP/s in fp32 outside the tensor cores, which is PyTorch's default); user guides of DGX A100 and DGX
H100: one 200 and one 400 Gb/s network port per GPU; data sheets of L40S and RTX 4090 (PCIe 4.0 x16: 32 GB/s per
direction; their networks, 200 and 100 Gb/s, are assumptions). The memory is what torch.cuda reports for such cards.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

LINK_SHARE = 0.8  # share of a link's rate that collectives reach: assumed; NCCL's own tests show 0.75 to 0.9
GIB = 2.0**30

# Dense bf16 matrix peaks in FLOP/s, without sparsity, from NVIDIA's data sheets. The first match wins.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class Machine:
    """The device of one rank. Links are counted per direction. A value of 0 is unknown."""

    name: str
    memory: float  # bytes; 0 for a CPU
    bf16: float  # peak FLOP/s
    fp32: float  # peak FLOP/s
    memory_rate: float  # bytes/s of its memory, which bounds the optimizer's update
    within: float  # bytes/s between ranks of one host
    between: float  # bytes/s between hosts

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"

    def peak(self, precision: str) -> float:
        return self.bf16 if precision == "bf16" else self.fp32


GPUS = {
    "rtx4090": Machine("rtx4090", 23.6 * GIB, PEAK_FLOPS["RTX 4090"], 82.6e12, 1.01e12, 32e9, 12.5e9),
    "l40s": Machine("l40s", 44.5 * GIB, PEAK_FLOPS["L40S"], 91.6e12, 0.864e12, 32e9, 25e9),
    "a100": Machine("a100", 79.1 * GIB, PEAK_FLOPS["A100"], 19.5e12, 2.04e12, 300e9, 25e9),
    "a100-40gb": Machine("a100-40gb", 39.4 * GIB, PEAK_FLOPS["A100"], 19.5e12, 1.56e12, 300e9, 25e9),
    "h100": Machine("h100", 79.1 * GIB, PEAK_FLOPS["H100"], 67e12, 3.35e12, 450e9, 50e9),
    "h200": Machine("h200", 139.8 * GIB, PEAK_FLOPS["H200"], 67e12, 4.8e12, 450e9, 50e9),
}
NAMES = (*GPUS, "cpu")


def gpu(name: str, rate: float | None = None) -> Machine:
    """The GPU of a name in GPUS. `rate`: peak FLOP/s that replaces the data sheet's."""
    return GPUS[name] if rate is None else replace(GPUS[name], bf16=rate, fp32=rate)


def cpu(rate: float, memory_rate: float) -> Machine:
    """A rank on a CPU. `rate`: peak FLOP/s; `memory_rate`: bytes/s of its memory."""
    return Machine("cpu", 0.0, rate, rate, memory_rate, 0.0, 0.0)


def device_peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None where PEAK_FLOPS does not have it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if all(word in name for word in part.split())), None)


def matrix_rate(precision: str, shape: tuple[int, int, int] = (1536, 1536, 1536), seconds: float = 1.0) -> float:
    """FLOP/s of a matrix product [m, k] x [k, n] on this process's threads: the best of as many as run in `seconds`."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    m, k, n = shape
    a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
    return 2.0 * m * k * n / _best_seconds(lambda: torch.mm(a, b), seconds)


def copy_rate(seconds: float = 0.5) -> float:
    """Bytes/s that a copy of 128 MiB reads and writes on this process's threads: the best of as many as run in
    `seconds`.
    """
    a, b = torch.ones(2**25), torch.zeros(2**25)
    return 2.0 * a.nbytes / _best_seconds(lambda: b.copy_(a), seconds)


def _best_seconds(call: Callable[[], object], seconds: float) -> float:
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds:
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best
