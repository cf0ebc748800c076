"""The instructions with which a device multiplies matrices in bf16.

Input: a device. Output: their name, or nothing if the device has none.
Example: AVX512-BF16 on an AMD EPYC of the fourth generation; nothing on a CPU with AVX2 only.

Without such instructions a step of `python -m rmcore.bench train` takes more CPU time in bf16 than in fp32: 4.6 times
as much for the shape of Pythia 14m, 6.5 times for the small Llama (one thread, AMD EPYC under ONEDNN_MAX_CPU_ISA=AVX2).

On a CPU, PyTorch multiplies bf16 with oneDNN, which obeys ONEDNN_MAX_CPU_ISA; ATEN_CPU_CAPABILITY does not matter.
"""

import os
import platform

import torch

# The values of ONEDNN_MAX_CPU_ISA that leave oneDNN no bf16 products. An unknown value has no effect.
# https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html
WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}


def bf16_instructions(device: torch.device) -> str:
    """The instructions that multiply bf16 on the device; "" if there are none."""
    if device.type == "cuda":
        return "GPU" if torch.cuda.is_bf16_supported(including_emulation=False) else ""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    used = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not used or limit in WITHOUT_BF16:
        return ""
    if platform.machine() in ("aarch64", "arm64"):
        return "Arm BF16"
    if torch.cpu._is_amx_tile_supported() and not limit:
        return "AMX"
    return "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else ""
