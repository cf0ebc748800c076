"""Builds the strategy that `parallel.strategy` selects.

Input: the config, a model, and this process's `World`.
Output: a `Strategy`, of the class that the strategy's record in rmcore/config/parallel.py points to.
Example: `parallel.strategy=zero3` -> `rmcore.parallel.fsdp:FullySharded`. Only this module is imported.
"""

import importlib

from rmcore.config import Config
from rmcore.model.reward_model import RewardModel
from rmcore.parallel.ema import Ema
from rmcore.parallel.strategy import Shards, Strategy
from rmcore.parallel.world import World


def make_strategy(config: Config, model: RewardModel, world: World, shards: Shards | None = None) -> Strategy:
    """The configured strategy, with the model on `world.device` and an optimizer; a collective.

    Args:
        shards: this rank's rows of a `model` on meta; None if `model` holds its weights.
    """
    module, _, name = config.parallel.traits.implementation.partition(":")
    strategy: Strategy = getattr(importlib.import_module(module), name)(config, model, world, shards)
    strategy.ema = Ema(strategy.named_parameters, config.optim.ema) if config.optim.ema is not None else None
    return strategy
