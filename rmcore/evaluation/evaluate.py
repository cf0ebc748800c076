"""Exact evaluation: every comparison scored once over all ranks, figures from the complete arrays.

In: a reward model on every rank and tokenised comparisons. Out: an `Evaluation`, the same on every rank: the reward of
every answer in the order of the data, and the figures made of them (rmcore/evaluation/pair_metrics.py).

The micro batches depend on the data and the token budget alone; ranks are dealt them in turn. So each comparison is
computed in the same company at any world size, and its reward is the same to the last bit.

Communication: one sum of fp64 [A answers + A counts], to which exactly one rank gives each answer's reward.

Example: 5 micro batches on 2 ranks: rank 0 takes 0, 2, 4; rank 1 takes 1, 3 and an empty one, so that collectives
inside the model (FSDP) stay aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rmcore.data.tokens.comparisons import computed_tokens
from rmcore.evaluation.arrays import answer_arrays, pair_arrays
from rmcore.evaluation.pair_metrics import pair_figures

if TYPE_CHECKING:
    from torch import nn

    from rmcore.data.batches.step_plan import Step
    from rmcore.data.tokens.comparisons import TokenizedComparisons
    from rmcore.model.objectives import Objective
    from rmcore.parallel.world import World

LOGGED = ("accuracy", "loss", "chosen_rewards", "rejected_rewards", "reward_margin", "accuracy_low", "accuracy_high",
          "length_accuracy", "length_matched_accuracy", "length_spearman_within", "ece", "brier", "reward_mean",
          "reward_std", "best_of_k_accuracy", "count", "objective_loss")  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """`rewards_A`: fp64, the reward of every answer in the order of the data; `figures`: see `pair_figures`."""

    rewards_A: np.ndarray
    figures: dict[str, Any]

    def logged(self) -> dict[str, float]:
        """The overall figures under the names of the log: eval/rm/accuracy, eval/rm/loss, ..."""
        return {f"eval/rm/{name}": self.figures[name] for name in LOGGED if name in self.figures}


def evaluate(
    model: nn.Module,
    data: TokenizedComparisons,
    world: World,
    *,
    token_budget: int,
    share: bool = True,
    objective: Objective | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    between: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score every comparison of `data` once over all ranks; all ranks must call it together.

    Args:
        model: called with a `RaggedBatch`, gives an output with `rewards_A`. Its train/eval mode is left as it was.
        token_budget: most computed tokens in a micro batch; a longer comparison gets a micro batch of its own.
        share: pack comparisons with their prefix once (a model on a path that cannot share wants False).
        objective: whose mean loss on these data becomes the figure `objective_loss`.
        autocast: makes the context that each forward runs in.
        between: called before each micro batch, as often on every rank; gives the evaluation up by raising.
    """
    import torch

    from rmcore.data.batches.loader import Loader
    from rmcore.parallel.world import all_reduce_sum

    answer_offset = np.asarray(data.answer_offset)
    steps = deal(micro_batches(computed_tokens(data, share), token_budget), world.size)
    scored: list[torch.Tensor] = []
    places: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    was_training = model.training
    model.eval()
    with torch.no_grad(), Loader(data, steps, world.rank, world.device, share=share) as loader:
        for _, batches in loader:
            between()
            for batch, _ in batches:
                with autocast():
                    scored.append(model(batch).rewards_A.double())
                places += [np.arange(answer_offset[n], answer_offset[n + 1]) for n in batch.comparisons_C]
    model.train(was_training)

    answers = int(answer_offset[-1])
    mine = np.concatenate(places)
    rewards_and_counts = torch.zeros(2, answers, dtype=torch.float64, device=world.device)
    if scored:
        index = torch.from_numpy(mine).to(world.device)
        rewards_and_counts[0, index] = torch.cat(scored)
        rewards_and_counts[1].index_add_(0, index, torch.ones_like(index, dtype=torch.float64))
    rewards_A, count_A = all_reduce_sum(world, rewards_and_counts).cpu().numpy()
    if not (count_A == 1).all():
        raise RuntimeError(f"evaluation scored {int((count_A != 1).sum())} of {answers} answers not exactly once")
    figures = pair_figures(pair_arrays(data, rewards_A), answer_arrays(data, rewards_A))
    own = objective_loss(objective, data, rewards_A) if objective else {}
    return Evaluation(rewards_A, {**figures, **own})


def objective_loss(objective: Objective, data: TokenizedComparisons, rewards_A: np.ndarray) -> dict[str, float]:
    """`objective_loss`: the mean loss, margins and all, in fp64; nothing where the data hold nothing to count."""
    import torch

    from rmcore.data.batches.batch import Judged

    judged = Judged.of(data)
    count = float(objective.counted(judged))
    return {"objective_loss": float(objective.loss_sum(torch.from_numpy(rewards_A), judged)) / count} if count else {}


def micro_batches(tokens_N: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Comparison numbers in micro batches of at most `token_budget` tokens, longest first; each comparison once.

    Example: tokens [10, 40, 20, 35] with a budget of 60 -> [[1], [3, 2], [0]].
    """
    batches: list[np.ndarray] = []
    current: list[int] = []
    filled = 0
    for number in np.argsort(-tokens_N, kind="stable").tolist():
        tokens = int(tokens_N[number])
        if current and filled + tokens > token_budget:
            batches.append(np.array(current, dtype=np.int64))
            current, filled = [], 0
        current.append(number)
        filled += tokens
    if current:
        batches.append(np.array(current, dtype=np.int64))
    return batches


def deal(batches: list[np.ndarray], world_size: int) -> Iterator[Step]:
    """One step a round, in which each rank takes the next micro batch; the last round is filled up with empty ones."""
    from rmcore.data.batches.step_plan import Step

    nothing = np.zeros(0, dtype=np.int64)
    for index, start in enumerate(range(0, len(batches), world_size)):
        hands = batches[start : start + world_size]
        hands += [nothing] * (world_size - len(hands))
        yield Step(index, 0.0, 0, 0.0, tuple((hand,) for hand in hands))
