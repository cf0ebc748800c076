"""Loads the model of a run, in one of two ways: whole on every rank, or in parts, each rank its rows of every weight.

Input: a config, the tokenizer, this process's `World`.
Output: a `WholeModel` or a `ShardedModel`. Both have the model for the self-test, `tested`, and then give the model to
train, `to_train()`.
Example: Pythia 1b under zero3 on 4 ranks: each rank reads 0.9 GB of fp32 rows. The self-test gathers one layer at a
time. Then a second model, on the meta device, takes the rows over without a copy.

    whole    load_model, LoRA               -> tested -> the same model        -> strategy
    sharded  model on meta, rows, FSDP2     -> tested -> second model on meta  -> strategy, which takes the rows over

The second model is needed because the self-test computes in fp32, and FSDP2 fixes its arithmetic when it wraps a model.
"""

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from rmcore.checkpoint.resume import Start
from rmcore.config import UserError
from rmcore.config.schema import Config
from rmcore.cost.formats import AVERAGES, EMA, WEIGHT
from rmcore.host.memory import available_memory, return_freed_memory
from rmcore.model.adapter import BaseWeights, StoredAdapter, check_adapter
from rmcore.model.backbone import base_rows, check_finite, load_model
from rmcore.model.classifier import text_model, text_prefix, towers
from rmcore.model.language_head import language_head
from rmcore.model.lazy_model import LazyModel, NeedsWholeModel, open_lazy_model
from rmcore.model.lora import Adapted, add_lora, frozen_fingerprint, store_base
from rmcore.model.objectives import objective_of
from rmcore.model.outputs import Outputs
from rmcore.model.reward_model import RewardModel
from rmcore.parallel.ddp import saves_memory
from rmcore.parallel.fsdp import sharded_for_test
from rmcore.parallel.strategy import Shards, Weights
from rmcore.parallel.world import World, broadcast_json, device_mesh, first_error


@dataclass
class WholeModel:
    """Every rank has all weights: the tested model is the trained one.

    `adapted`, `base`, `base_weights`, `towers`: see `rmcore.training.run.Run`. `notes`: lines for the user, such as why
    the model was not sharded although the strategy shards.
    """

    tested: RewardModel
    model_class: type[PreTrainedModel]
    hf_config: PretrainedConfig
    adapted: tuple[Adapted, ...]
    base: str
    base_weights: BaseWeights | None
    notes: list[str]
    towers: Mapping[str, Tensor]
    shards: Shards | None = None

    def to_train(self) -> RewardModel:
        """The model to train, on the path that the self-test chose."""
        return self.tested


@dataclass
class ShardedModel:
    """Every rank has some rows of each weight, in `shards`. `tested` is sharded for the self-test, in fp32."""

    tested: RewardModel
    config: Config
    model_class: type[PreTrainedModel]
    hf_config: PretrainedConfig
    parts: LazyModel
    shards: Shards
    towers: Mapping[str, Tensor]
    adapted: tuple[Adapted, ...] = ()
    base: str = ""
    base_weights: BaseWeights | None = None

    @property
    def notes(self) -> list[str]:
        return [self.parts.note] if self.parts.note else []

    def to_train(self) -> RewardModel:
        """A second model on meta, on the path that the self-test chose. The tested model is given up."""
        skeleton = self.parts.build()
        model = _reward_model(skeleton, self.config, self.tested.pad_token_id)
        model.context = self.tested.context
        model.use(self.tested.path, pruned=self.tested.pruned, masked=self.tested.masked)
        self.hf_config = skeleton.config
        del self.tested
        gc.collect()  # FSDP2's wrapping refers to itself, and holds memory
        return model


def load(config: Config, world: World, tokenizer: PreTrainedTokenizerFast, start: Start) -> WholeModel | ShardedModel:
    """Load the model; a collective. Raises UserError, on all ranks, for model files that cannot be trained from."""
    notes: list[str] = []
    first_error(world, "looking at the model", lambda: check_adapter(config.model))
    if world.device.type == "cpu" and (config.parallel.traits.shards_weights or saves_memory(config)):
        return_freed_memory()  # before the weights take a place on the heap
    if config.parallel.traits.shards_weights:
        found = first_error(world, "loading the model", lambda: _opened(config, tokenizer))
        if isinstance(found, LazyModel):
            return _load_sharded(found, config, world)
        notes.append(f"the weights are read whole on every rank: {found}")
    return _load_whole(config, world, tokenizer, start, notes)


def _opened(config: Config, tokenizer: PreTrainedTokenizerFast) -> LazyModel | str:
    """What a model in parts is built from; or the reason why this model must be loaded whole."""
    if config.model.lora.rank is not None:
        return "LoRA puts layers of its own into the model"
    if config.loss.sft:
        return "loss.sft loads the language-model head with it"
    try:
        return open_lazy_model(
            config.model, seed=config.run.seed, vocabulary=len(tokenizer), pad_token_id=_pad_token_id(tokenizer)
        )
    except NeedsWholeModel as reason:
        return str(reason)


def check_host_memory(config: Config, model: nn.Module, world: World) -> None:
    """Raises UserError unless the weights, gradients and averages that parallel.offload keeps fit into this host.

    The average of the weights (optim.ema) is kept with the weights. Of a GPU's rank, weights and gradients are pinned,
    for which PyTorch rounds each tensor up to a power of two.
    """
    ranks = world.local_size if config.parallel.traits.by_host else world.size
    weight = int(WEIGHT[config.model.weights])
    average = AVERAGES[config.optim.states] + EMA * (config.optim.ema is not None)
    need = 0.0
    for parameter in model.parameters():
        elements = -(-parameter.shape[0] // ranks) * parameter[:1].numel()
        trained = parameter.requires_grad
        copied = [weight * elements, 4 * elements * trained]
        if world.device.type == "cuda":
            copied = [1 << (size - 1).bit_length() for size in copied if size]
        need += sum(copied) + average * elements * trained
    need, free = need * world.local_size, available_memory()
    if need > free:
        raise UserError(
            f"parallel.offload=true keeps {need / 1e9:.0f} GB of weights, gradients and averages in the memory of this "
            f"host, of which {free / 1e9:.0f} GB are free: use more hosts, optim.states=bf16, or no offload"
        )


def _load_sharded(parts: LazyModel, config: Config, world: World) -> ShardedModel:
    mesh = device_mesh(world, by_host=config.parallel.traits.by_host)
    skeleton = parts.build()
    model = first_error(world, "loading the model", lambda: _reward_model(skeleton, config, parts.pad_token_id))
    offload = config.parallel.offload
    if offload:
        first_error(world, "looking at the memory", lambda: check_host_memory(config, model, world))

    def read() -> Weights:
        weights = sharded_for_test(model, parts, mesh, world, offload=offload)
        local = {name: cast(DTensor, weight).to_local() for name, weight in weights.items()}
        prefix = text_prefix(skeleton)  # the name in the files
        check_finite(config.model, ((name.replace("backbone.", prefix, 1), rows) for name, rows in local.items()))
        return weights

    weights = first_error(world, "reading the weights", read)
    untrained = first_error(world, "reading the weights", lambda: parts.towers() if world.is_main else {})
    return ShardedModel(model, config, type(skeleton), skeleton.config, parts, Shards(mesh, weights), untrained)


def _load_whole(
    config: Config, world: World, tokenizer: PreTrainedTokenizerFast, start: Start, notes: list[str]
) -> WholeModel:
    pad_token_id, seed = _pad_token_id(tokenizer), config.run.seed
    hf_model = first_error(
        world,
        "loading the model",
        lambda: load_model(
            config.model, seed=seed, vocabulary=len(tokenizer), pad_token_id=pad_token_id, say=notes.append
        ),
    )
    adapted: list[Adapted] = []
    base, base_weights = "", None
    if config.model.lora.rank is not None:
        backbone = text_model(hf_model)
        adapted = first_error(world, "adding LoRA", lambda: add_lora(backbone, config.model.lora, seed))
        stored = StoredAdapter.of(config.model)
        base = broadcast_json(world, frozen_fingerprint(backbone) if world.is_main else "")
        start.check_base(base)
        base_weights = first_error(
            world,
            "looking at the base model",
            lambda: _base_weights(config, backbone, stored) if world.is_main else None,
        )
        first_error(world, "storing the base", lambda: store_base(backbone, config.model.lora))
        if stored is not None:
            first_error(world, "loading the adapter", lambda: stored.load_adapters(hf_model))
    head = None
    if config.loss.sft:
        head = first_error(
            world, "loading the language-model head", lambda: language_head(config.model, hf_model, seed)
        )
    model = first_error(world, "loading the model", lambda: _reward_model(hf_model, config, pad_token_id, head))
    if config.loss.sft and model.long_rope.threshold is not None:
        raise UserError("loss.sft and longrope exclude each other: long and short texts are packed in another way")
    model = model.to(world.device)
    untrained = towers(hf_model) if world.is_main else {}
    return WholeModel(model, type(hf_model), hf_model.config, tuple(adapted), base, base_weights, notes, untrained)


def _base_weights(config: Config, backbone: PreTrainedModel, stored: StoredAdapter | None) -> BaseWeights | None:
    """What an exported adapter will state of its base model.

    Raises UserError if the adapter that the training continues was trained on another one.
    """
    if stored is not None:
        stored.check_base(backbone)
    return BaseWeights.of(backbone, base_rows(config.model)) if config.export.adapter else None


def _reward_model(
    hf_model: PreTrainedModel, config: Config, pad_token_id: int, lm_head: nn.Linear | None = None
) -> RewardModel:
    """Raises UserError for a loss on an output that the model does not have."""
    score, outputs = cast(nn.Linear, hf_model.score), Outputs.stored(hf_model.config)
    return RewardModel(
        text_model(hf_model),
        score,
        pad_token_id=pad_token_id,
        objective=objective_of(config, outputs),
        outputs=outputs,
        sft=bool(config.loss.sft),
        lm_head=lm_head,
    )


def _pad_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    return cast(int, tokenizer.pad_token_id)
