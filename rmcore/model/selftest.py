"""Which path is exact for this architecture? Asked of a few real comparisons before training starts.

Enters: a reward model, tokenised data. Leaves: the fastest of shared, packed, padded whose rewards equal those of the
plain Hugging Face forward of each text alone, and one line that says so. A wrong fast path never trains.

The last layer runs on the scored tokens alone (rmcore.model.pruning) where that is exact too.

Example: Llama -> ("shared", "attention shared: rewards equal the plain forward's to 2.4e-07, last layer on scored
tokens alone"); Bloom, whose ALiBi bias is computed inside its own attention -> ("padded", "... not shared: KeyError
...").
"""

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from rmcore.config import UserError
from rmcore.data.batches.batch import Comparisons, build_batch
from rmcore.model.reward_model import PADDED, PATHS, SHARED, RewardModel

# fp32 paths differ by rounding alone: 1e-7 to 1e-5 at depths of 4 to 80 layers; a wrong mask or position moves a reward
# of order 1 by 1e-3 and more, so the bound stands between the two.
TOLERANCE = 1e-4


def choose_path(
    model: RewardModel,
    data: Comparisons,
    numbers: list[int],
    wanted: str = "auto",
    half: AbstractContextManager | None = None,
) -> tuple[str, str]:
    """Makes the model use its fastest exact path; returns that and a line about it.

    Args:
        numbers: comparisons to try; the longest should be among them (windows and position limits show only there).
        wanted: `auto`, or one path, which is then the only one tried.
        half: an autocast context when training runs in half precision on kernels that exist for it alone; the paths
            may then differ from the fp32 oracle by what half precision itself costs.
    Raises:
        UserError: no path that may be used is exact.
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
        except Exception as error:  # an architecture may refuse the path in any way; the next path is tried
            refused.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
            continue
        difference = float((rewards - oracle).abs().max())
        if difference <= tolerance:
            part = ", last layer on scored tokens alone" if pruned else ""
            line = f"attention {path}: rewards equal the plain forward's to {difference:.1e}{part}"
            return path, "; ".join([line, *(f"not {reason}" for reason in refused)])
        refused.append(f"{name}: rewards differ from the plain forward's by {difference:.1e}")
    raise UserError(
        f"{type(model.backbone).__name__}: no exact way to compute it with model.attention={wanted}: "
        + "; ".join(refused)
    )


@torch.no_grad()
def rewards_alone(model: RewardModel, data: Comparisons, numbers: list[int]) -> Tensor:
    """fp64 rewards of every answer, each text alone through the model as transformers runs it: the oracle."""
    device = next(model.parameters()).device
    rewards = []
    for number in numbers:
        item = data.comparison(number)
        for tail in item.tails:
            text = torch.from_numpy(np.concatenate([item.prefix, tail]).astype(np.int64)).to(device)
            rewards.append(model.reward_alone(text))
    return torch.stack(rewards)


def trial_comparisons(tokens_N: np.ndarray, count: int = 4, limit: int = 8192) -> list[int]:
    """The longest comparison and a few others spread over the data, at most `limit` tokens beyond the longest."""
    chosen = [int(np.argmax(tokens_N))]
    total = 0
    for number in np.linspace(0, len(tokens_N) - 1, count).astype(int).tolist():
        total += int(tokens_N[number])
        if number not in chosen and total <= limit:
            chosen.append(number)
    return chosen
