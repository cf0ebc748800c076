"""Bounds what rounding can do to a reward, so that the checks of exactness have tolerances that are derived.

Input: the precision of the arithmetic, the number of layers, and the size of the numbers that are rounded. Output: the
largest difference that two exact computations of one reward may have.
Example: 6 layers in fp32, one rounding of which moves a reward by 1e-7: sqrt(48) * 8 * 1e-7 = 5.5e-06; the floor for
rewards below 1 is larger, 1e-05.
"""

import torch

# The relative error of one rounding. The largest one is 2^-24 in fp32, 2^-8 in bf16 and 2^-4 in e4m3. For bf16 half of
# it is taken, which makes the check stricter and still leaves 4 sigmas of the largest error.
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float8_e4m3fn: 2.0**-4}
ROUNDINGS_PER_LAYER = 8  # a decoder layer rounds q, k, v, the attention, its projection, and three results of the MLP
SIGMAS = 8.0  # standard deviations: for a normal error, one reward in 10^15 would be further off
FLOOR = 1e-5  # relative to the rewards; sums of thousands of fp32 terms in another order differ by up to this


def all_roundings(one: float, layers: int) -> float:
    """The bound for a whole forward, if one rounding of its numbers moves the result by `one`.

    n independent roundings add up to about sqrt(n) of one. A layer adds its results to the residual stream, so the
    roundings of all layers reach the last hidden state with a weight of about 1.
    """
    return SIGMAS * (ROUNDINGS_PER_LAYER * layers) ** 0.5 * one


def allowed_difference(precision: torch.dtype, layers: int, scale: float, rewards: torch.Tensor) -> float:
    """The largest difference of a reward that rounding can explain.

    Args:
        scale: what a relative error of 1 in the last hidden state would do to a reward.
        rewards: the rewards that are compared; they set the floor.
    """
    # The roundings inside a sum are not in the first term. In fp32 they can be larger than it: hence the floor.
    return max(all_roundings(UNIT_ROUNDOFF[precision] * scale, layers), floor(rewards))


def floor(rewards: torch.Tensor) -> float:
    """The difference that two fp32 computations of `rewards` may always have."""
    return FLOOR * max(1.0, float(rewards.abs().max()))
