"""The outputs of the score head: their names, and the reward that everything else reads.

Input: the section `model` of a config, or the config.json of an exported model.
Output: `Outputs`. Example: names (helpfulness, verbosity) and weights (1.0, -0.2): answers with the outputs [3, 5] and
[2, 0] have the rewards 2.0 and 2.0.

An exported model keeps them in config.json: `id2label` has the names in order, and the key `rmcore` the weights,
{"reward": {"helpfulness": 1.0, "verbosity": -0.2}}. A model with the single output `reward` has no such key.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from rmcore.config import UserError
from rmcore.config.schema import ModelConfig
from rmcore.ops.contract import accumulate_dtype, add_at

KEY = "rmcore"  # in config.json


class Outputs(NamedTuple):
    """The names of the outputs, and each one's weight in the reward."""

    names: tuple[str, ...] = ("reward",)
    weights: tuple[float, ...] = (1.0,)

    @property
    def single(self) -> bool:
        """Whether the head has one output, which is the reward."""
        return self.weights == (1.0,)

    @classmethod
    def of(cls, config: ModelConfig, hf_config: PretrainedConfig) -> "Outputs":
        """The outputs that `config` asks for, or those that a stored head has.

        Raises UserError for unknown names, and for names or an order that are not those of the stored head.
        """
        stored = cls.stored(hf_config) if config.head == "stored" else cls()
        if config.outputs is not None and stored != cls() and tuple(config.outputs) != stored.names:
            raise UserError(
                f"model.outputs=[{', '.join(config.outputs)}]: the stored head of {config.name} has "
                f"[{', '.join(stored.names)}], in this order: leave model.outputs out, or draw a new head with "
                "model.head=fresh"
            )
        if config.outputs is None and config.reward is None:
            return stored
        names = stored.names if config.outputs is None else tuple(config.outputs)
        reward = config.reward
        if reward is None:
            same = names == stored.names and config.head == "stored"
            reward = dict(zip(names, stored.weights, strict=True)) if same else names[0]
        return cls(names, weights_of(reward if isinstance(reward, dict) else {reward: 1.0}, names, "model.reward"))

    @classmethod
    def stored(cls, hf_config: PretrainedConfig) -> "Outputs":
        """The outputs in the config of an exported model; one output `reward` where it has none of rmcore's keys."""
        kept = getattr(hf_config, KEY, None)
        reward = kept.get("reward") if isinstance(kept, dict) else None
        if not isinstance(reward, dict):
            return cls()
        labels = {int(place): str(name) for place, name in (hf_config.id2label or {}).items()}
        names = tuple(labels[place] for place in sorted(labels))
        return cls(names, weights_of(reward, names, f"{KEY}.reward in config.json"))

    @classmethod
    def settled(cls, config: ModelConfig, hf_config: PretrainedConfig) -> ModelConfig:
        """The config with the outputs of a stored head written out, so that a fresh head would have the same ones."""
        outputs = cls.of(config, hf_config)
        if outputs == cls():
            return config
        reward = dict(zip(outputs.names, outputs.weights, strict=True))
        return config.model_copy(update={"outputs": list(outputs.names), "reward": reward})

    def store(self, hf_config: PretrainedConfig) -> None:
        """Write names and weights into a config; of a single output `reward`, what other programs expect."""
        hf_config.id2label = dict(enumerate(self.names))
        hf_config.label2id = {name: place for place, name in enumerate(self.names)}
        kept = {key: value for key, value in (getattr(hf_config, KEY, None) or {}).items() if key != "reward"}
        if self != Outputs():
            kept["reward"] = dict(zip(self.names, self.weights, strict=True))
        vars(hf_config).pop(KEY, None)
        if kept:
            setattr(hf_config, KEY, kept)

    def places(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """The places of some outputs. Raises UserError for an unknown name."""
        if unknown := [name for name in names if name not in self.names]:
            raise UserError(f"loss.output has {unknown[0]}, but the model's outputs are {', '.join(self.names)}")
        return tuple(map(self.names.index, names))

    def reward(self, outputs_AK: Tensor) -> Tensor:
        """[A]: the reward of every answer."""
        parts = [w * outputs_AK[:, k] for k, w in enumerate(self.weights) if w]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def weights_of(reward: dict[str, Any], names: tuple[str, ...], what: str) -> tuple[float, ...]:
    """The weight of each output in the reward."""
    if unknown := [name for name in reward if name not in names]:
        raise UserError(f"{what} has {unknown[0]}, but the model's outputs are {', '.join(names)}")
    return tuple(float(reward.get(name, 0.0)) for name in names)


def head_outputs(hidden_TD: Tensor, weight_KD: Tensor, rows_A: Tensor) -> Tensor:
    """[A, K] in fp32 (fp64 for fp64 input): every output at the scored tokens.

    The gradient of a row that several answers share is summed in a fixed order.
    """
    dtype = accumulate_dtype(hidden_TD)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        return pick(hidden_TD, rows_A).to(dtype) @ weight_KD.to(dtype).t()


class _Pick(torch.autograd.Function):
    """index_select along the first dimension, whose backward adds up in a fixed order on every device."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.length = values.shape[0]
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return add_at(grads[0].new_zeros(ctx.length, *grads[0].shape[1:]), index, grads[0]), None


def pick(values: Tensor, index: Tensor) -> Tensor:
    """values[index], with a deterministic gradient."""
    return _Pick.apply(values, index)
