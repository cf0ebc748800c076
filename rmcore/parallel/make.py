"""The strategy that `parallel.strategy` names."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from rmcore.config import Config
from rmcore.model.reward_model import RewardModel
from rmcore.parallel.strategy import Strategy, is_sharded
from rmcore.parallel.world import World, device_mesh


def make_strategy(
    config: Config,
    model: RewardModel,
    world: World,
    mesh: DeviceMesh | None = None,
    weights: dict[str, nn.Parameter] | None = None,
) -> Strategy:
    """The strategy that `parallel.strategy` names, with the model on `world.device` and an optimizer.

    Args:
        mesh: of `weights`; None: made here.
        weights: this rank's rows of a `model` that lies on meta; None: `model` has its weights.
    """
    from rmcore.parallel.ddp import DataParallel
    from rmcore.parallel.fsdp import FullySharded

    name = config.parallel.strategy
    if not is_sharded(config):
        return DataParallel(config, model, world, shard_optimizer=name == "zero1")
    return FullySharded(config, model, world, mesh=mesh or device_mesh(world, by_host=name == "hsdp"), weights=weights)
