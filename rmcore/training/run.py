"""Holds everything that the loop works with.

Input: what `rmcore.training.assembly` has built.
Output: a frozen `Run`.
Example: a run that resumes from step 8 has `position.step == 8`, and `plan.steps_from(8)` are the steps that remain.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from rmcore.checkpoint.resume import Start
from rmcore.config.schema import Config
from rmcore.data.batches.step_plan import Plan, Step
from rmcore.data.prepare import PreparedData
from rmcore.model.adapter import BaseWeights
from rmcore.model.lora import Adapted
from rmcore.parallel.strategy import Strategy
from rmcore.parallel.world import World
from rmcore.tracking.moment import Moment


@dataclass(frozen=True)
class Run:
    """One run on this rank. All ranks have the same values, except for `world` and the weights in `strategy`.

    Attributes:
        token_budget: most tokens in a micro batch.
        share: whether batches hold each prompt once (the result of the self-test).
        flops_per_token: training FLOPs per computed token; None where the model FLOPs utilisation is not logged.
        start: where the run begins: at step 0, or at a checkpoint.
        lines: facts about the run, for the user.
        adapted: the layers that LoRA trains instead of their weights.
        base: with LoRA, the fingerprint of the weights that are not trained.
        base_weights: on rank 0 with export.adapter, what the adapter states of its base model's weights.
        in_parts: whether each rank read only its rows of the weights.
        towers: on rank 0, the weights that take no part in a reward; the export writes them as they were.
    """

    config: Config
    world: World
    tokenizer: PreTrainedTokenizerFast
    data: PreparedData
    plan: Plan
    strategy: Strategy
    model_class: type[PreTrainedModel]
    hf_config: PretrainedConfig
    token_budget: int
    share: bool
    flops_per_token: float | None
    start: Start
    lines: tuple[str, ...]
    adapted: tuple[Adapted, ...] = ()
    base: str = ""
    base_weights: BaseWeights | None = None
    in_parts: bool = False
    towers: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def position(self) -> Moment:
        """Steps, pairs and epochs that were done before this process started."""
        manifest = self.start.manifest
        return Moment(manifest.step, manifest.episode, manifest.epoch) if manifest else Moment(0, 0, 0.0)

    def chosen_weights(self) -> AbstractContextManager[None]:
        """Within, the model has the weights that run.weights selects for evaluation and export."""
        ema = self.strategy.ema if self.config.run.weights == "ema" else None
        return ema.in_place() if ema else nullcontext()


def moment_after(step: Step) -> Moment:
    """The position of the run after `step`."""
    return Moment(step.index + 1, step.episode, step.epoch)
