"""Normalises rewards to mean 0 and deviation 1 on held-out answers.

Input: the rewards of held-out answers. Output: `pooler_config` of an exported config.json, with the keys of vLLM's
`PoolerConfig` (logit_mean, logit_sigma: pull request 39530 of vllm-project/vllm, April 2026). They mean
(logit - logit_mean) / logit_sigma.
Example: held-out rewards [1.0, 3.0, 5.0] -> {"logit_mean": 3.0, "logit_sigma": 1.63}; a reward of 4.63 becomes 1.0.

`rmcore export --normalise` measures and stores the two numbers, `--normalise` of `rmcore score` and `rmcore serve`
applies them. The weights do not change, so that a program that reads only the weights computes raw rewards. vLLM does
not read these numbers from config.json: its settings come from the command line (`--pooler-config`) or, for pooling
types only, from the files of sentence-transformers (`get_pooling_config`). The model card contains the command line.
A common mean and deviation change no ranking, and put the rewards of several models on one scale.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rmcore.config import UserError

KEY = "pooler_config"


@dataclass(frozen=True)
class Normalisation:
    """`mean` and (population) `deviation` of the rewards of held-out answers."""

    mean: float
    deviation: float

    def apply(self, reward: float) -> float:
        return (reward - self.mean) / self.deviation

    def stored(self) -> dict[str, float]:
        """As config.json holds it, under `pooler_config`."""
        return {"logit_mean": self.mean, "logit_sigma": self.deviation}


def measure(rewards_A: np.ndarray) -> Normalisation:
    """Mean and deviation over all held-out answers, preferred or not. Raises UserError if the deviation is 0 or NaN."""
    mean, deviation = float(np.mean(rewards_A)), float(np.std(rewards_A))
    if len(rewards_A) < 2 or not math.isfinite(mean) or not math.isfinite(deviation) or deviation == 0.0:
        raise UserError(
            f"cannot normalise with {len(rewards_A)} held-out rewards of mean {mean:.6g} and deviation "
            f"{deviation:.6g}: two or more finite rewards that differ are needed"
        )
    return Normalisation(mean, deviation)


def read_normalisation(hf_config: Any, model: str) -> Normalisation:
    """Mean and deviation from the config of an exported model. Raises UserError if it has none."""
    stored = getattr(hf_config, KEY, None)
    try:
        found = Normalisation(float(stored["logit_mean"]), float(stored["logit_sigma"]))  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        raise UserError(
            f"{model}: its config.json contains no {KEY} with logit_mean and logit_sigma; "
            "`rmcore export RUN -o DIR --normalise` measures and stores them"
        ) from None
    if not (math.isfinite(found.mean) and math.isfinite(found.deviation) and found.deviation > 0.0):
        raise UserError(f"{model}: {KEY} in its config.json is not a mean and a positive deviation: {stored}")
    return found
