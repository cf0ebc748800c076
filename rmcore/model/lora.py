"""LoRA by peft: trains low-rank changes of chosen weight matrices, and the score head, in place of all weights.

Input: a backbone and the section `model.lora`. Output: the same backbone, in which peft's layers replace the chosen
linear layers and all other weights are frozen (no gradients, no optimizer state); and the list of adapted layers, with
which `merged` makes a plain state again: W + alpha / rank * B A.
Example: rank 16 on all linear layers of Pythia 1b adds 8.4 million trained weights to 909 million frozen ones.

Under `model.lora.base` the adapted layers store their frozen weight in fewer bits (QLoRA). DoRA divides each row of
W + s B A by its norm and multiplies it by a trained one (arXiv 2402.09353). Rank-stabilised LoRA scales by
alpha / sqrt(rank) (arXiv 2312.03732).

Source: Hu et al., arXiv 2106.09685, section 4.1. peft (extra `lora`) is imported only when `model.lora.rank` is set.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rmcore.config import UserError
from rmcore.config.lora import LoraConfig
from rmcore.model.frozen import FrozenLinear
from rmcore.ops.blockwise import check_bitsandbytes, restored

PREFIX = "backbone."  # in front of the backbone's weights in the reward model's state
CHUNK = 1 << 26  # elements that are hashed at a time
UNTRAINED_B = 0.01  # moves an output by some percent of its size, far more than rounding


class Adapted(NamedTuple):
    """One adapted layer: its name in the reward model, its scale, and whether it stores its weight transposed."""

    name: str
    scaling: float
    transposed: bool


def add_lora(backbone: PreTrainedModel, config: LoraConfig, seed: int) -> list[Adapted]:
    """Put adapters into `backbone`, in place, and freeze all its other weights.

    A is drawn under `seed`, the same on every rank. B is zero, so that the model computes the same as before.
    Raises UserError: peft is not installed, or a target is not the name of a linear layer that can be merged.
    """
    try:
        import peft
        from peft.tuners.lora import Linear
    except ImportError:
        raise UserError(
            "model.lora.rank is set and the package peft is not installed: pip install 'rmcore[lora]', or leave "
            "model.lora out"
        ) from None
    # peft sees a container that is not a transformers model: for those it also adapts the fused parameters of experts.
    container = nn.ModuleDict({"backbone": backbone})
    arguments: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": config.scale_alpha,
        "target_modules": [PREFIX + name for name in targets(backbone, config)],
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": config.dora,
        "use_rslora": config.rslora,
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in backbone.modules()),  # GPT-2's linear layers
    }
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(peft.LoraConfig(**arguments), container)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return [
        Adapted(PREFIX + name, float(module.scaling["default"]), bool(module.fan_in_fan_out))
        for name, module in backbone.named_modules()
        if isinstance(module, Linear)
    ]


def store_base(backbone: PreTrainedModel, config: LoraConfig) -> None:
    """Store the frozen weights of the adapted layers as `model.lora.base` says, in place, one layer after the other.

    Raises UserError: bitsandbytes is not installed.
    """
    if config.base == "fp32":
        return
    if config.base != "bf16":
        check_bitsandbytes(f"model.lora.base={config.base}")
    from peft.tuners.lora import Linear

    for module in backbone.modules():
        if isinstance(module, Linear):
            module.base_layer = FrozenLinear(module.base_layer, config.base)
            if config.dora:  # the change begins at zero for the numbers that are stored now
                weight: Tensor = module.base_layer.weight
                norms = torch.linalg.vector_norm(weight.T if module.fan_in_fan_out else weight, dim=1)
                magnitude: Any = module.lora_magnitude_vector["default"]
                magnitude.weight.data.copy_(norms)


def count_weights(model: nn.Module) -> int:
    """The number of weights, also of those that are stored in fewer bits."""
    frozen = sum(math.prod(module.shape) for module in model.modules() if isinstance(module, FrozenLinear))
    return frozen + sum(parameter.numel() for parameter in model.parameters())


def targets(backbone: PreTrainedModel, config: LoraConfig) -> list[str]:
    """The whole names of the linear layers to adapt.

    Raises UserError unless every target is the end of such a name: peft ignores wrong ones as long as one is right.
    """
    linear = _mergeable(backbone)
    if isinstance(config.targets, str):
        if not linear:
            raise UserError(f"model.lora: {type(backbone).__name__} has no linear layer that LoRA can adapt")
        return linear
    unknown = [target for target in config.targets if not any(f".{name}".endswith(f".{target}") for name in linear)]
    if unknown or not config.targets:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        given = ", ".join(unknown) or "an empty list"
        raise UserError(
            f"model.lora.targets: {given} is not a linear layer of {type(backbone).__name__}; its linear layers are "
            f"{known}; all-linear selects all of them"
        )
    ends = tuple(f".{target}" for target in config.targets)
    return [name for name in linear if f".{name}".endswith(ends)]


def _mergeable(backbone: PreTrainedModel) -> list[str]:
    """Names of the layers whose weight plus a low-rank change is again a weight of the same model.

    A subclass that computes something else (a router) is not one, and neither is a layer that shares its weight.
    """
    owners = Counter(map(id, (p for _, p in backbone.named_parameters(remove_duplicate=False))))
    return [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and type(module).forward in (nn.Linear.forward, Conv1D.forward)
        and owners[id(module.weight)] == 1
    ]


def merged(state: Mapping[str, Tensor], adapted: Sequence[Adapted]) -> dict[str, Tensor]:
    """A plain state under the names of the model without LoRA: each adapted weight plus its change, in its dtype.

    Raises KeyError when a part of an adapted layer is missing from the state.
    """
    plain = dict(state)
    for name, scaling, transposed in adapted:
        down, up = (plain.pop(f"{name}.lora_{part}.default.weight") for part in "AB")
        weight = _base_weight(plain, f"{name}.base_layer", (up.shape[0], down.shape[1]), transposed)
        change = scaling * (up.float() @ down.float()) if weight.dtype != torch.float64 else scaling * (up @ down)
        changed = weight + (change.T if transposed else change).to(weight.dtype)
        if (magnitude := plain.pop(f"{name}.lora_magnitude_vector.default.weight", None)) is not None:
            rows = changed.T if transposed else changed
            rows = rows * (magnitude.to(rows.dtype) / torch.linalg.vector_norm(rows, dim=1))[:, None]
            changed = (rows.T if transposed else rows).contiguous()
        plain[f"{name}.weight"] = changed
        if (bias := plain.pop(f"{name}.base_layer.bias", None)) is not None:
            plain[f"{name}.bias"] = bias
    return plain


def _base_weight(state: dict[str, Tensor], name: str, shape: tuple[int, int], transposed: bool) -> Tensor:
    """Take a frozen weight out of a state. `shape`: (out, in)."""
    if f"{name}.codes" not in state:
        return state.pop(f"{name}.weight")
    codes, scale = state.pop(f"{name}.codes"), state.pop(f"{name}.scale")
    if codes.is_meta:
        return codes.new_empty(shape[::-1] if transposed else shape, dtype=torch.float32)
    return restored(codes, scale, shape[::-1] if transposed else shape, torch.float32)


def merged_shapes(shapes: Mapping[str, tuple[int, ...]], adapted: Sequence[Adapted]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of `merged`, from those of the state."""
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {name: tuple(tensor.shape) for name, tensor in merged(empty, adapted).items()}


@contextmanager
@torch.no_grad()
def visible_changes(parameters: Callable[[], Mapping[str, Tensor]], adapted: Sequence[Adapted]) -> Iterator[None]:
    """Within, untrained adapters change their weights, so that a layer that computes without its adapter shows.

    B is UNTRAINED_B in place of what it was. `parameters` returns the parameters by their names in the reward model.
    """

    names = [f"{name}.lora_B.default.weight" for name, _, _ in adapted]
    own = parameters()
    before = {name: own[name].detach().clone() for name in names}
    for name in names:
        own[name].fill_(UNTRAINED_B)
    try:
        yield
    finally:
        own = parameters()
        for name, values in before.items():
            own[name].copy_(values)


def frozen_fingerprint(model: PreTrainedModel, rows: int | None = None) -> str:
    """Hash of the names and values of all frozen weights: a checkpoint does not hold them, the base model does.

    rows: the tokens of the base model's embedding; rows beyond them, which rmcore draws, are left out. None: all rows.
    """
    digest = xxhash.xxh3_128()
    tokens = None if rows is None else cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            values = parameter[:rows] if parameter.shape[:1] == (tokens,) else parameter
            digest.update(f"{name} {list(values.shape)}".encode())
            for part in values.detach().cpu().contiguous().view(-1).split(CHUNK):
                digest.update(part.view(torch.uint8).numpy().data)
    return digest.hexdigest()
