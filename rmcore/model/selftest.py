"""Finds the fastest path that is exact for an architecture, on a few real comparisons, before training starts.

Input: a reward model and tokenised data.
Output: the fastest of shared, packed and padded whose rewards equal those of the plain Hugging Face forward of each
text by itself, and one line about it. The last layer is pruned (rmcore.model.pruning) where that is exact too.
Example: Llama -> ("shared", "attention shared: rewards equal the plain forward's to 2.4e-07, last layer on scored
tokens only"). Bloom, whose own attention computes its ALiBi bias -> ("padded", "... not shared: KeyError ...").

A wrong fast path never trains: rmcore takes a slower one, or stops.
"""

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from rmcore.config import UserError
from rmcore.data.batches.batch import Comparisons, build_batch
from rmcore.model.reward_model import PADDED, PATHS, SHARED, RewardModel

# Rounding makes exact fp32 paths differ by 1e-7 to 1e-5 at depths of 4 to 80 layers. A wrong mask or position moves a
# reward of order 1 by 1e-3 and more. The bound lies between the two.
TOLERANCE = 1e-4


def choose_path(
    model: RewardModel,
    data: Comparisons,
    numbers: list[int],
    wanted: str = "auto",
    half: AbstractContextManager | None = None,
) -> tuple[str, str]:
    """Make the model use its fastest exact path; return the path and a line about it.

    Args:
        numbers: the comparisons to try. The longest should be among them, because windows and position limits show only
            there.
        wanted: `auto`, or the only path to try.
        half: an autocast context, if training uses kernels that exist only for half precision. The paths may then
            differ from the fp32 oracle by the error of half precision itself.
    Raises:
        UserError: none of the paths to try is exact.
    """
    device = next(model.parameters()).device
    model.use(PADDED)
    oracle = rewards_alone(model, data, numbers)
    tolerance = TOLERANCE * max(1.0, float(oracle.abs().max()))
    if half is not None:
        with half:
            tolerance += 3.0 * float((rewards_alone(model, data, numbers) - oracle).abs().max())
    refused = []
    paths = PATHS if wanted == "auto" else [wanted]
    for path, pruned in [(path, pruned) for path in paths for pruned in (True, False)]:
        model.use(path, pruned=pruned)
        if model.pruned != pruned:
            continue
        name = f"{path}, last layer on scored tokens" if pruned else path
        batch = build_batch(data, numbers, share=path == SHARED).on(device)
        try:
            with torch.no_grad(), half or nullcontext():
                rewards = model(batch).rewards_A.double().cpu()
        except Exception as error:  # an architecture may raise anything for a path; the next one is tried
            refused.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
            continue
        difference = float((rewards - oracle).abs().max())
        if difference <= tolerance:
            part = ", last layer on scored tokens only" if pruned else ""
            line = f"attention {path}: rewards equal the plain forward's to {difference:.1e}{part}"
            return path, "; ".join([line, *(f"not {reason}" for reason in refused)])
        refused.append(f"{name}: rewards differ from the plain forward's by {difference:.1e}")
    raise UserError(
        f"{type(model.backbone).__name__}: no path is exact with model.attention={wanted}: " + "; ".join(refused)
    )


@torch.no_grad()
def rewards_alone(model: RewardModel, data: Comparisons, numbers: list[int]) -> Tensor:
    """The oracle: fp64 rewards of every answer, each text by itself through the model as transformers runs it."""
    device = next(model.parameters()).device
    rewards = []
    for number in numbers:
        item = data.comparison(number)
        for tail in item.tails:
            text = torch.from_numpy(np.concatenate([item.prefix, tail]).astype(np.int64)).to(device)
            rewards.append(model.reward_alone(text))
    return torch.stack(rewards)


def trial_comparisons(tokens_N: np.ndarray, count: int = 4, limit: int = 8192) -> list[int]:
    """The longest comparison and a few others spread over the data, with at most `limit` tokens beyond the longest."""
    chosen = [int(np.argmax(tokens_N))]
    total = 0
    for number in np.linspace(0, len(tokens_N) - 1, count).astype(int).tolist():
        total += int(tokens_N[number])
        if number not in chosen and total <= limit:
            chosen.append(number)
    return chosen
