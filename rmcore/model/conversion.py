"""Maps the weights of a checkpoint to those of a model where transformers renames them or fuses experts.

Input: a model, of which only names and shapes are used, and the names in a checkpoint. Output: for each name the
model's weight, and for one expert's weight its place in the fused one; and back, for an export.
Example: Qwen3-MoE's checkpoints hold `mlp.experts.7.gate_proj.weight` [I, D] and `mlp.experts.7.up_proj.weight`. The
model holds `mlp.experts.gate_up_proj` [experts, 2 I, D]: row 7 is the first over the second.

The names are transformers' own (transformers.conversion_mapping). Experts can be read one by one if they are merged
along the first dimension and their parts joined along the next one, or if each is transposed; weights that are joined
in the checkpoint, if they are so along the first dimension. Anything else needs the whole model.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping


class CannotConvert(Exception):
    """A weight is made in another way than by merging experts or cutting rows; the message says which one."""


class Target(NamedTuple):
    """Where a stored tensor goes: the model's weight; for one expert's, the expert and the part of its row.

    `cut`: the weight is piece i of the tensor, of n equal pieces one over the other. `turned`: the dimensions to swap,
    unless the tensor has the weight's shape as it is.
    """

    name: str
    expert: int | None = None
    part: int = 0
    cut: tuple[int, int] = (0, 1)
    turned: tuple[int, int] | None = None


class Conversion:
    """The renamings of one model. Raises CannotConvert, on use, for what cannot be read by experts."""

    def __init__(self, model: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(model)
        self._converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
        self._renamings = [t for t in transforms if not isinstance(t, loading.WeightConverter)]
        self._expected, self._prefix = model.state_dict(), model.base_model_prefix

    def targets(self, key: str) -> list[Target]:
        """The places of the stored tensor `key`; its own name where transformers does not know it."""
        name, pattern = self._renamed(key, self._renamings, self._converters)
        if name not in self._expected and key in self._expected:
            return [Target(key)]
        if pattern is None or name not in self._expected:
            return [Target(name)]
        converter = next(c for c in self._converters if pattern in c.source_patterns)
        if _cuts_rows(converter):
            first, *_ = cuts = converter.target_patterns
            return [Target(name.replace(first, cut, 1), cut=(i, len(cuts))) for i, cut in enumerate(cuts)]
        if (turned := _turns_experts(converter)) is not None:
            return [Target(name, turned=turned)]
        if not _merges_experts(converter):
            raise CannotConvert(f"transformers makes {name} of several weights while loading")
        expert = re.search(pattern.replace("*", r"(\d+)"), key)
        if expert is None:
            raise CannotConvert(f"{key} does not say of which expert it is")
        return [Target(name, int(expert[1]), list(converter.source_patterns).index(pattern))]

    def _renamed(self, key: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        return loading.rename_source_key(key, renamings, converters, self._prefix, self._expected)


def _cuts_rows(converter: Any) -> bool:
    """Whether the tensor holds several weights of the same size, one over the other."""
    cut, *rest = converter.operations
    plain = isinstance(cut, loading.Chunk) and cut.dim == 0 and getattr(cut, "num_shards_attribute", None) is None
    return plain and not rest and "\\" not in converter.target_patterns[0]


def _turns_experts(converter: Any) -> tuple[int, int] | None:
    """The dimensions that are swapped in each expert's matrix, of fused experts."""
    turn, *rest = converter.operations
    if rest or not isinstance(turn, loading.Transpose) or not turn.check_dims or 0 in (turn.dim0, turn.dim1):
        return None
    return turn.dim0, turn.dim1


def _merges_experts(converter: Any) -> bool:
    """Whether a row of the fused weight holds one expert, its parts one over the other."""
    merge, *rest = converter.operations
    if not isinstance(merge, loading.MergeModulelist) or merge.dim != 0:
        return False
    joined = len(rest) == 1 and isinstance(rest[0], loading.Concatenate) and rest[0].dim == 1
    return joined or (not rest and len(converter.source_patterns) == 1)


def stored_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of an exported checkpoint; None if its weights cannot be written one model weight at a time."""
    weights = {name: torch.empty(tensor.shape, device="meta") for name, tensor in model.state_dict().items()}
    whole = {name: tuple(tensor.shape) for name, tensor in loading.revert_weight_conversion(model, weights).items()}
    one_by_one: dict[str, tuple[int, ...]] = {}
    try:
        for name, tensor in stored(model, weights.items()):
            if name in one_by_one:
                return None
            one_by_one[name] = tuple(tensor.shape)
    except ValueError:  # a conversion that needs several weights, such as the two kinds of experts of ERNIE 4.5 VL MoE
        return None
    return whole if one_by_one == whole else None


def stored(model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an exported checkpoint, from pairs of a name and a weight of the model, one after the other."""
    for name, tensor in weights:
        yield from loading.revert_weight_conversion(model, {name: tensor}).items()
