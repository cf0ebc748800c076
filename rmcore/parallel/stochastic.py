"""Rounds fp32 numbers to bf16 at random, without bias, by draws that are a function of what is rounded.

Input: fp32 values; a key of the tensor, made of the run's seed and the tensor's name; the number of the update; the
place of the values in the whole tensor.
Output: bf16 values. Each is one of the two neighbours of its fp32 value; its mean over many draws is that value.
Example: 1.001953125 lies a quarter of the way from 1.0 to the next bf16 number, 1.0078125. It becomes 1.0 in three of
four updates, and 1.0078125 in the fourth.

Rounding to the nearest loses an update that is smaller than half the distance of two bf16 numbers, 2^-9 of the weight,
however often it comes. AdamW's updates at usual learning rates are smaller than that. Rounded at random they are kept
in the mean (Gupta et al., arXiv 1502.02551, section 3).

The draws are those of a counter-based generator (Salmon et al., SC 2011): a hash of key, update and place. It has no
state, so a checkpoint stores none. An element gets the same draw under every strategy and at every world size, because
its place in the whole tensor counts, and not where it lies. The hash is MurmurHash3's finaliser (Appleby, public
domain) applied twice, to 32 bits; each result serves two neighbouring elements, with 16 bits each.
"""

import torch
import xxhash
from torch import Tensor

PERIOD = 1 << 32  # results of the hash before its counter repeats; then another key is used
_MASKS = {13: (1 << 19) - 1, 16: (1 << 16) - 1}


def key_of(seed: int, *names: str) -> str:
    """The key of a tensor: it differs with the seed and with every name."""
    return "\0".join((str(seed), *names))


def update_key(update: Tensor) -> Tensor:
    """The number of an update (a whole number, 0-dim) as the part of the key that changes with it; int32, 0-dim."""
    return _mixed(update.to(torch.int32).reshape(1) + _signed(0x9E3779B9)).reshape(())


def round_to_bf16(values: Tensor, key: str, update: Tensor, start: int) -> Tensor:
    """The fp32 `values`, contiguous, as bf16: values[i] is element `start` + i of the flattened tensor of the key.

    update: from `update_key`. Infinite values stay so, and so does NaN as arithmetic makes it (0x7FC00000).
    """
    bits = values.view(torch.int32).flatten()
    # A carry out of the lower 16 bits moves the number to its neighbour further from zero; it comes with the
    # probability (lower bits) / 2^16. Dropping the lower bits then rounds toward zero.
    rounded = draws(key, update, start, bits.numel(), bits.device).bitwise_and_(0xFFFF).add_(bits)
    return rounded.bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16).view(values.shape)


def draws(key: str, update: Tensor, start: int, count: int, device: torch.device) -> Tensor:
    """Random int32 [count] whose lower 16 bits are the draws of elements `start` to `start` + count."""
    first, end = start // 2, (start + count + 1) // 2
    parts = [torch.empty(0, dtype=torch.int16, device=device)] if not count else []
    while first < end:
        last = min(end, (first // PERIOD + 1) * PERIOD)
        word = xxhash.xxh64_intdigest(f"{key}\0{first // PERIOD}".encode())
        counter = torch.arange(last - first, dtype=torch.int32, device=device).add_(_signed(first + word))
        hashed = _mixed(_mixed(counter).bitwise_xor_(_signed(word >> 32)).add_(update))
        parts.append(hashed.view(torch.int16))
        first = last
    halves = parts[0] if len(parts) == 1 else torch.cat(parts)
    return halves[start % 2 : start % 2 + count].to(torch.int32)


def _mixed(x: Tensor) -> Tensor:
    """MurmurHash3's finaliser of int32, in place. Products wrap around; shifts fill with zeros."""
    spare = torch.empty_like(x)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, None)):
        torch.bitwise_right_shift(x, shift, out=spare)
        x.bitwise_xor_(spare.bitwise_and_(_MASKS[shift]))
        if factor is not None:
            x.mul_(_signed(factor))
    return x


def _signed(word: int) -> int:
    """The lower 32 bits of a number, as int32 reads them."""
    return (word + 0x80000000) % 0x100000000 - 0x80000000
