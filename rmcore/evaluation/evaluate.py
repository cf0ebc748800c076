"""Evaluates a model exactly: every comparison is scored once over all ranks.

Input: a reward model on every rank and tokenised comparisons. Output: an `Evaluation`, the same on every rank: the
reward of every answer in the order of the data, and the metrics computed from them.
Example: 5 micro batches on 2 ranks: rank 0 takes 0, 2, 4; rank 1 takes 1, 3 and an empty one, so that collectives
inside the model (FSDP) stay aligned.

The micro batches depend only on the data and the token budget; the ranks take them in turn. So, at one token
budget, a comparison is computed in the same micro batch at any world size, and its reward is the same to the last bit.
With batch.tokens=auto, the budget of a training on GPUs depends on their memory, and so on the world size.

Communication: one sum of fp64 [K outputs + a count, of A answers], to which exactly one rank contributes each answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from rmcore.config import Config
from rmcore.config.loss import BESIDES, LossConfig
from rmcore.config.schema import UNNAMED
from rmcore.data.batches.batch import Judged
from rmcore.data.batches.loader import Loader
from rmcore.data.batches.step_plan import Step
from rmcore.data.tokens.comparisons import TokenizedComparisons, computed_tokens
from rmcore.evaluation.answer_metrics import pearson
from rmcore.evaluation.arrays import answer_arrays, pair_arrays
from rmcore.evaluation.metrics import logged
from rmcore.evaluation.pair_metrics import pair_metrics
from rmcore.evaluation.rewardbench_data import rewardbench_metrics
from rmcore.model.objectives import ONE, Joint, Objective, objective_of
from rmcore.model.outputs import Outputs
from rmcore.parallel.world import World, all_reduce_sum


@dataclass(frozen=True)
class Evaluation:
    """`rewards_A`: fp64, the reward of every answer in the order of the data; `metrics`: see `pair_metrics`.

    `outputs_AK`: all outputs of the score head.
    """

    rewards_A: np.ndarray
    metrics: dict[str, Any]
    outputs_AK: np.ndarray


@dataclass(frozen=True)
class Evaluations:
    """The evaluations of all sets of a run at one step, by the name of the set; the main one comes first."""

    by_set: Mapping[str, Evaluation]

    @property
    def main(self) -> Evaluation:
        """The evaluation of the sources without a set, or else of the first set."""
        return next(iter(self.by_set.values()))

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of the main set; where there are sets with a name, `sets` has the metrics of every set."""
        if list(self.by_set) == [UNNAMED]:
            return self.main.metrics
        return {**self.main.metrics, "sets": {name: found.metrics for name, found in self.by_set.items()}}

    def logged(self) -> dict[str, float]:
        """The overall metrics under their names in the log: eval/rm/accuracy, ..., eval/SET/accuracy, ..."""
        return {key: value for name, found in self.by_set.items() for key, value in logged(found.metrics, name).items()}


def evaluate(
    model: nn.Module,
    data: TokenizedComparisons,
    world: World,
    *,
    token_budget: int,
    share: bool = True,
    objective: Objective | Joint | None = None,
    outputs: Outputs = ONE,
    rewardbench: int | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    between: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score every comparison of `data` once over all ranks. A collective.

    Args:
        model: takes a `RaggedBatch` and returns an output with `rewards_A`. Its train or eval mode is left as it was.
        token_budget: most computed tokens in a micro batch; a longer comparison gets a micro batch of its own.
        share: pack the prefix of a comparison once. False for a model on a path that cannot share prefixes.
        rewardbench: the version of RewardBench whose data these are; adds its scores.
        objective: its mean loss on these data becomes the metric `objective_loss`.
        outputs: the outputs of the model's score head.
        autocast: makes the context in which each forward runs.
        between: called before each micro batch, equally often on every rank; it may raise to end the evaluation.
    """
    answer_offset = np.asarray(data.answer_offset)
    steps = deal(micro_batches(computed_tokens(data, share), token_budget), world.groups)
    found: list[torch.Tensor] = []
    places: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    was_training = model.training
    model.eval()
    loader = Loader(data, steps, world.group, world.device, share=share, multiple=world.context)
    with torch.no_grad(), loader:
        for _, batches in loader:
            between()
            for batch, _ in batches:
                with autocast():
                    found.append(model(batch).outputs_AK.double())
                places += [np.arange(answer_offset[n], answer_offset[n + 1]) for n in batch.comparisons_C]
    model.train(was_training)

    # Each rank writes its outputs into zeros, so that the sum over the ranks is every output once. Of the ranks that
    # compute a row together, the first one does.
    answers, width = int(answer_offset[-1]), len(outputs.names)
    outputs_and_counts = torch.zeros(width + 1, answers, dtype=torch.float64, device=world.device)
    if found and world.leads_group:
        index = torch.from_numpy(np.concatenate(places)).to(world.device)
        outputs_and_counts[:width, index] = torch.cat(found).t()
        outputs_and_counts[width].index_add_(0, index, torch.ones_like(index, dtype=torch.float64))
    *columns, count_A = all_reduce_sum(world, outputs_and_counts).cpu().numpy()
    if not (count_A == 1).all():
        wrong = int((count_A != 1).sum())
        raise RuntimeError(f"the evaluation did not score {wrong} of {answers} answers exactly once")
    outputs_AK = np.stack(columns, axis=1)
    rewards_A = outputs.reward(torch.from_numpy(outputs_AK)).numpy()
    metrics = metrics_of(data, rewards_A, objective, rewardbench, outputs_AK)
    if not outputs.single:
        metrics["outputs"] = output_metrics(outputs, outputs_AK, data)
    return Evaluation(rewards_A, metrics, outputs_AK)


def output_metrics(outputs: Outputs, outputs_AK: np.ndarray, data: TokenizedComparisons) -> dict[str, dict[str, float]]:
    """For each output its mean and deviation, and next to the attribute of its name, where the data were prepared with
    it: the mean squared error and the correlation (Pearson) over the `count` answers for which it is known."""
    attributes = data.report.get("attributes", [])
    metrics = {}
    for place, name in enumerate(outputs.names):
        values = outputs_AK[:, place]
        metrics[name] = {"mean": float(values.mean()), "deviation": float(values.std())}
        if name in attributes:
            truth = data.attribute[:, attributes.index(name)].astype(np.float64)
            known = np.isfinite(truth)
            if known.any():
                error = float(((values - truth)[known] ** 2).mean())
                metrics[name] |= {"mse": error, "pearson": pearson(values[known], truth[known])}
                metrics[name]["count"] = int(known.sum())
    return metrics


def metrics_of(
    data: TokenizedComparisons,
    rewards_A: np.ndarray,
    objective: Objective | Joint | None,
    rewardbench: int | None,
    outputs_AK: np.ndarray | None = None,
) -> dict[str, Any]:
    """The metrics of an evaluation, computed from the rewards of all answers; see `evaluate`."""
    if rewardbench is None:
        metrics = pair_metrics(pair_arrays(data, rewards_A), answer_arrays(data, rewards_A))
    else:
        metrics = rewardbench_metrics(rewardbench, data, rewards_A)
    return metrics if objective is None else metrics | objective_loss(objective, data, rewards_A, outputs_AK)


def own_objective(config: Config, outputs: Outputs | None = None) -> Objective | Joint | None:
    """The objective of a training whose loss is a metric of its own, because it is not the plain pairwise loss.

    `outputs`: of the model; None, before there is one: those that the config mentions.
    """
    if config.losses == (config.loss,) and config.loss.model_copy(update=dict.fromkeys(BESIDES, 0.0)) == LossConfig():
        return None
    mentioned = [name for loss in config.losses for name in loss.outputs]
    names = tuple(dict.fromkeys([*(config.model.outputs or ["reward"]), *mentioned]))
    return objective_of(config, outputs or Outputs(names, (1.0,) * len(names)))


def objective_loss(
    objective: Objective | Joint,
    data: TokenizedComparisons,
    rewards_A: np.ndarray,
    outputs_AK: np.ndarray | None = None,
) -> dict[str, float]:
    """`objective_loss`: the mean loss with its margins, in fp64; {} if the data hold nothing that the loss counts.

    Of several objectives it is the sum of their means.
    """
    rewards, means = torch.from_numpy(rewards_A), []
    outputs = None if outputs_AK is None else torch.from_numpy(outputs_AK)
    for number, one in enumerate(objective.objectives if isinstance(objective, Joint) else [objective]):
        judged = Judged.of(data, number)
        read = not one.reads_margins or bool(judged.margin_P.any())
        count = float(one.counted(judged)) if read else 0.0
        means += [float(one.loss_sum(rewards, judged, outputs)) / count] if count else []
    return {"objective_loss": sum(means)} if means else {}


def micro_batches(tokens_N: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """The numbers of the comparisons, each once, in micro batches of at most `token_budget` tokens, longest first.

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
    """One step per round, in which each rank takes the next micro batch; empty ones fill the last round."""
    nothing = np.zeros(0, dtype=np.int64)
    for index, start in enumerate(range(0, len(batches), world_size)):
        round_of = batches[start : start + world_size]
        round_of += [nothing] * (world_size - len(round_of))
        yield Step(index, 0.0, 0, 0.0, tuple((batch,) for batch in round_of))
