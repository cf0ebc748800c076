"""The model of a run: whole on every rank, or each rank its own rows of every weight.

Enters: a config, this rank's place, the tokenizer. Leaves: a `Loaded` model to test, and then the model to train, which
is another one where weights are split: the self-test computes in fp32, and FSDP2 fixes its arithmetic when it wraps.
Example: Pythia 1b under zero3 on 4 ranks: each reads 0.9 GB of fp32 rows, the self-test gathers a layer at a time, and
the rows go over to a second model on meta without being copied.
"""

import gc
from dataclasses import dataclass, replace
from typing import cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from rmcore.checkpoint.resume import Start
from rmcore.config.schema import Config
from rmcore.host.memory import return_freed_memory
from rmcore.model.backbone import load_model
from rmcore.model.lazy_model import LazyModel, NeedsWholeModel, open_lazy_model
from rmcore.model.lora import Adapted, add_lora, frozen_fingerprint
from rmcore.model.objectives import Objective
from rmcore.model.reward_model import RewardModel
from rmcore.parallel.make import make_strategy
from rmcore.parallel.strategy import Strategy, is_sharded
from rmcore.parallel.world import World, broadcast_json, device_mesh, first_error


@dataclass(frozen=True)
class Loaded:
    """`model`: ready to compute. `parts` and `weights`: where it is split, what to build it again from.

    `line`: why a model that was to be split was read whole, or nothing.
    """

    model: RewardModel
    model_class: type[PreTrainedModel]
    hf_config: PretrainedConfig
    line: str = ""
    parts: LazyModel | None = None
    mesh: DeviceMesh | None = None
    weights: dict[str, nn.Parameter] | None = None
    adapted: tuple[Adapted, ...] = ()  # the layers that LoRA trains in place of their weights
    base: str = ""  # with LoRA, the fingerprint of the weights that are not trained


def load(config: Config, world: World, tokenizer: PreTrainedTokenizerFast, start: Start) -> Loaded:
    """A collective. Raises UserError, on all ranks alike, for model files that cannot be trained from."""
    if is_sharded(config) and world.device.type == "cpu":
        return_freed_memory()
    arguments = {
        "seed": config.run.seed, "vocabulary": len(tokenizer), "pad_token_id": cast(int, tokenizer.pad_token_id)
    }  # fmt: skip

    def opened() -> LazyModel | PreTrainedModel:
        if is_sharded(config):
            try:
                if config.model.lora.rank is not None:
                    raise NeedsWholeModel("LoRA puts layers of its own into the model")
                return open_lazy_model(config.model, **arguments)
            except NeedsWholeModel as reason:
                lines.append(f"the weights are read whole on every rank: {reason}")
        return load_model(config.model, **arguments)

    lines: list[str] = []
    found = first_error(world, "loading the model", opened)
    if isinstance(found, PreTrainedModel):
        adapted, base = _adapted(config, cast(PreTrainedModel, found.base_model), world, start)
        model = reward_model(found, config, arguments["pad_token_id"]).to(world.device)
        return Loaded(model, type(found), found.config, "".join(lines), adapted=tuple(adapted), base=base)
    return _split(found, config, world, arguments["pad_token_id"])


def _adapted(config: Config, backbone: PreTrainedModel, world: World, start: Start) -> tuple[list[Adapted], str]:
    """The layers that LoRA adapts, and the fingerprint of the weights that it does not train; nothing without it."""
    if config.model.lora.rank is None:
        return [], ""
    lora, seed = config.model.lora, config.run.seed
    adapted = first_error(world, "adding LoRA", lambda: add_lora(backbone, lora, seed))
    base = broadcast_json(world, frozen_fingerprint(backbone) if world.is_main else "")
    start.check_base(base)
    return adapted, base


def _split(parts: LazyModel, config: Config, world: World, pad_token_id: int) -> Loaded:
    from rmcore.parallel.fsdp import sharded_for_test

    mesh = device_mesh(world, by_host=config.parallel.strategy == "hsdp")
    skeleton = parts.build()
    model = reward_model(skeleton, config, pad_token_id)
    weights = first_error(
        world,
        "reading the weights",
        lambda: sharded_for_test(model, parts, mesh, world, offload=config.parallel.offload),
    )
    return Loaded(model, type(skeleton), skeleton.config, "", parts, mesh, weights)


def to_train(loaded: Loaded, config: Config) -> Loaded:
    """The model on the path that the self-test chose, without the self-test's wrapping."""
    if loaded.parts is None:
        return loaded
    skeleton = loaded.parts.build()
    model = reward_model(skeleton, config, loaded.model.pad_token_id)
    model.use(loaded.model.path, pruned=loaded.model.pruned)
    return replace(loaded, model=model, hf_config=skeleton.config)


def parallelise(loaded: Loaded, config: Config, world: World) -> Strategy:
    """Put the strategy on it; a collective."""
    gc.collect()  # FSDP2's wrapping of the tested model refers to itself
    return make_strategy(config, loaded.model, world, loaded.mesh, loaded.weights)


def reward_model(hf_model: PreTrainedModel, config: Config, pad_token_id: int) -> RewardModel:
    """The engine's model around transformers' parts."""
    backbone, score = cast(PreTrainedModel, hf_model.base_model), cast(nn.Linear, hf_model.score)
    return RewardModel(backbone, score, pad_token_id=pad_token_id, objective=Objective.of(config.loss))
