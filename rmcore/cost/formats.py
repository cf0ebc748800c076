"""The bytes in which a run stores weights, gradients and AdamW's averages, from its config.

Input: a config, and the `Sizes` of the model.
Output: `Stored`, bytes of the whole model before any sharding.
Example: 8.0e9 parameters with `model.weights=bf16 optim.states=int8`: 16 GB of weights, 32 GB of gradients, 16 GB of
averages. With `model.lora.rank=16 model.lora.base=nf4`: 4 GB for the adapted layers and 2 GB for the embedding.
"""

from typing import NamedTuple

from rmcore.config import Config
from rmcore.cost.dry_run import Sizes

WEIGHT = {"fp32": 4.0, "bf16": 2.0}
AVERAGES = {"fp32": 8.0, "bf16": 4.0, "int8": 2.0 + 2 * 4.0 / 256}  # int8: and a scale for each block of 256
EMA = 4.0  # the moving average of the weights
BASE = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0 + 4.0 / 256, "nf4": 0.5 + 4.0 / 64}
# Bytes of memory traffic per updated parameter. torch's fused AdamW reads and writes weight and averages, and reads and
# writes the gradient, to clip it (32); the norm reads it (4). rmcore's own is made of elementwise operations that read
# and write 170 bytes; to round one tensor at random takes 158 more.
FUSED, OWN, ROUNDING = 36.0, 170.0, 158.0


class Stored(NamedTuple):
    """Bytes of the whole model. `width`: of a trained weight. `update`: memory traffic per trained parameter."""

    weights: float
    gradients: float
    averages: float
    width: float
    update: float


def stored(config: Config, sizes: Sizes) -> Stored:
    """What the run of `config` keeps."""
    lora, states = config.model.lora, config.optim.states
    width = WEIGHT[config.model.weights]
    weights = width * sizes.total
    if lora.rank is not None:
        weights = BASE[lora.base] * sizes.adapted + 4.0 * (sizes.total - sizes.adapted + sizes.adapters)
    weights += EMA * sizes.trained * (config.optim.ema is not None)
    update = FUSED
    if states != "fp32" or width == 2.0:
        update = OWN + ROUNDING * ((width == 2.0) + 2 * (states == "bf16"))
    return Stored(weights, 4.0 * sizes.trained, AVERAGES[states] * sizes.trained, width, update)


def checkpoint_bytes(config: Config, trained: int) -> float:
    """Bytes of a checkpoint of `trained` parameters: weights, AdamW's averages, and the moving average of optim.ema."""
    of_one = WEIGHT[config.model.weights] + AVERAGES[config.optim.states] + EMA * (config.optim.ema is not None)
    return of_one * trained
