"""Rewards of mean 0 and deviation 1 on held-out answers: measured once, stored beside the model, applied on request.

Enters: the rewards of held-out answers. Leaves: `pooler_config` of an exported config.json, in the words of vLLM's
`PoolerConfig` (logit_mean, logit_sigma: pull request 39530 of vllm-project/vllm, April 2026), which stand for
(logit - logit_mean) / logit_sigma. The weights stay as they are: whoever reads only those gets raw rewards.
Example: held-out rewards [1.0, 3.0, 5.0] -> {"logit_mean": 3.0, "logit_sigma": 1.63}; a reward of 4.63 becomes 1.0.

vLLM does not look into config.json for this: its settings come from the command line (`--pooler-config`) or, for
pooling types alone, from the files of sentence-transformers (`get_pooling_config`). The model card says what to type.
Differences between the answers to one prompt are what a reward model is trained on; a common mean and deviation change
no ranking, and give rewards of several models one scale.
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
    """Of all held-out answers, the preferred and the others alike. Raises UserError where there is no deviation."""
    mean, deviation = float(np.mean(rewards_A)), float(np.std(rewards_A))
    if len(rewards_A) < 2 or not math.isfinite(mean) or not math.isfinite(deviation) or deviation == 0.0:
        raise UserError(
            f"no normalisation from {len(rewards_A)} held-out rewards of mean {mean:.6g} and deviation "
            f"{deviation:.6g}: it needs two or more that are finite and differ"
        )
    return Normalisation(mean, deviation)


def read_normalisation(hf_config: Any, model: str) -> Normalisation:
    """What an exported model's config holds. Raises UserError when it holds none."""
    stored = getattr(hf_config, KEY, None)
    try:
        found = Normalisation(float(stored["logit_mean"]), float(stored["logit_sigma"]))  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        raise UserError(
            f"{model}: its config.json holds no {KEY} with logit_mean and logit_sigma; "
            "`rmcore export RUN -o DIR --normalise` measures and stores them"
        ) from None
    if not (math.isfinite(found.mean) and math.isfinite(found.deviation) and found.deviation > 0.0):
        raise UserError(f"{model}: {KEY} in its config.json is no mean and deviation: {stored}")
    return found
