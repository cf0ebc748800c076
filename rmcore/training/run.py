"""A run: everything that the loop works with."""

from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from rmcore.checkpoint.resume import Start
from rmcore.config.schema import Config
from rmcore.data.batches.step_plan import Plan
from rmcore.data.prepare import PreparedData
from rmcore.model.lora import Adapted
from rmcore.parallel.strategy import Strategy
from rmcore.parallel.world import World
from rmcore.tracking.moment import Moment


@dataclass(frozen=True)
class Run:
    """What the loop works with. `share`: whether batches hold each prompt once (the self-test's answer)."""

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
    start: Start  # where the run begins: at zero, or from a checkpoint
    lines: tuple[str, ...]  # what the user should know of the above
    adapted: tuple[Adapted, ...] = ()  # the layers that LoRA trains in place of their weights
    base: str = ""  # with LoRA, the fingerprint of the weights that are not trained

    @property
    def position(self) -> Moment:
        """Steps done, pairs and passes seen before the first step of this start."""
        manifest = self.start.manifest
        return Moment(manifest.step, manifest.episode, manifest.epoch) if manifest else Moment(0, 0, 0.0)
