"""Parts of a decoder layer in one pass over memory each, on the CPU: the contract. Only the C++ kernels have them.

Input: CPU tensors in fp32 or bf16. Output: the result in the dtype that PyTorch's own composition has.
Example: `available()` is False without the C++ kernels; a model then computes these parts as transformers wrote them.

The ops, differentiable once with respect to all but cos and sin; arithmetic is fp32, and results are rounded once:
- gelu(x): x Phi(x) (Hendrycks and Gimpel, arXiv 1606.08415), Phi within 7.5e-8.
- swiglu(gate, up): silu(gate) * up (Shazeer, arXiv 2002.05202).
- rms_norm(x [..., D], weight [D], eps): weight * x / sqrt(mean(x^2) + eps), fp32 (arXiv 1910.07467).
- rotate(x [1, H, T, K], cos [1, T, R], sin [1, T, R]): rotary embeddings of the first R columns (arXiv 2104.09864),
  with columns d and d + R/2 as partners; the result is fp32.
"""

import torch

NAMES = ("gelu", "swiglu", "rms_norm", "rotate")


def available() -> bool:
    """Whether the library that is loaded has these ops."""
    return all(hasattr(torch.ops.rmcore, name) for name in NAMES)
