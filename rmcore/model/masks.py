"""Shared prompts through a model's own attention: on a rectangle of whole comparisons, with masks.

Input: a forward of a grid (rmcore.model.grid) within `packed_layout(grid)`. Output: masks and ALiBi biases in which
each token sees the tokens of its own text only, at their positions in that text.
Example: in the row [p0 p1 a b] of a comparison b sees p0 p1 b. With a sliding window of 2 it sees p1 b, because its
position is 2, like that of a.

This serves architectures that compute attention in their own code (MPT, XGLM, Falcon with ALiBi), or that need a mask
for more than attention (sparse attention that selects keys). Transformers' mask functions make all their masks from a
function of the numbers of a query and a key; here it is called with their positions in the text. The rectangle costs
padding, and dense masks, but computes the prompt once.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from rmcore.model.layout_context import current_grid


def prepare(backbone: Any) -> None:
    """Let the masks and ALiBi biases that the architecture makes follow the grid. They stay as they are without one."""
    for name in ("sdpa", "eager"):
        original = ALL_MASK_ATTENTION_FUNCTIONS[name]
        if not hasattr(original, "rmcore"):
            AttentionMaskInterface.register(name, _masks_by_position(original))
    for module in {sys.modules.get(cls.__module__) for cls in type(backbone).__mro__}:
        build = getattr(module, "build_alibi_tensor", None)  # Bloom, Falcon
        if build is not None and not hasattr(build, "rmcore"):
            setattr(module, "build_alibi_tensor", _alibi_by_position(build))  # noqa: B010 (mypy knows no such name)
    if hasattr(backbone, "build_mpt_alibi_tensor"):
        for block in backbone.blocks:
            if not hasattr(block.attn.forward, "rmcore"):
                block.attn.forward = _one_row_at_a_time(block.attn.forward)


def _masks_by_position(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def mask(*arguments: Any, **keywords: Any) -> Any:
        if grid := current_grid():
            changed = {"mask_function": grid.by_position(keywords["mask_function"]), "allow_is_causal_skip": False}
            return original(*arguments, **{**keywords, **changed})
        return original(*arguments, **keywords)

    mask.rmcore = True  # type: ignore[attr-defined]
    return mask


def _alibi_by_position(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The bias [R * H, 1, L] of each key: that of the column that is its position."""

    @wraps(original)
    def alibi(*arguments: Any, **keywords: Any) -> Tensor:
        bias = original(*arguments, **keywords)
        if grid := current_grid():
            rows, length = grid.position_RL.shape
            bias = bias.view(rows, -1, length)
            bias = bias.gather(2, grid.position_RL[:, None].expand_as(bias)).view(-1, 1, length)
        return bias

    alibi.rmcore = True  # type: ignore[attr-defined]
    return alibi


def _one_row_at_a_time(original: Callable[..., Any]) -> Callable[..., Any]:
    """MPT's attention, whose ALiBi bias [H, 1, positions] is the same for all rows of a batch."""

    @wraps(original)
    def attend(
        hidden_states: Tensor, *, position_bias: Tensor, attention_mask: Tensor, **keywords: Any
    ) -> tuple[Tensor, None]:
        grid = current_grid()
        if grid is None:
            return original(hidden_states, position_bias=position_bias, attention_mask=attention_mask, **keywords)
        bias = position_bias[..., -hidden_states.shape[1] :]
        inputs = zip(hidden_states.split(1), grid.position_RL, attention_mask.split(1), strict=True)
        outputs = [
            original(row, position_bias=bias[..., position_L], attention_mask=mask, **keywords)[0]
            for row, position_L, mask in inputs
        ]
        return torch.cat(outputs), None

    attend.rmcore = True  # type: ignore[attr-defined]
    return attend
