"""The section `parallel`: how ranks share the work, and the facts about each strategy that other code needs.

Input: plain values.
Output: a frozen `ParallelConfig`, whose `traits` describe the chosen strategy.
Example: `parallel.strategy=zero1 parallel.offload=true` is refused, because zero1 does not shard the weights.

A new strategy is one file in rmcore/parallel/ and one entry here (its name in `Name`, its record in `TRAITS`). No other
code compares names of strategies.
"""

from typing import Literal, NamedTuple, get_args

from pydantic import Field, model_validator

from rmcore.config.section import Section, conflict

Name = Literal["ddp", "zero1", "zero2", "zero3", "hsdp"]


class StrategyTraits(NamedTuple):
    """What a strategy splits over ranks, and when it communicates.

    Args:
        implementation: module and class, as `module:Class`; see `rmcore.parallel.strategy.Strategy`.
        shards_optimizer: each rank keeps a part of AdamW's averages.
        shards_weights: each rank keeps a part of every weight and gradient, and the model can be built without a whole
            copy.
        by_host: the parts lie on the ranks of one host, and every host holds all of them.
        gathers_each_micro_batch: weights are gathered and gradients reduced in every micro batch, so that neither is
            whole on a rank between layers. Otherwise once per step.
    """

    implementation: str
    shards_optimizer: bool = False
    shards_weights: bool = False
    by_host: bool = False
    gathers_each_micro_batch: bool = False


DDP, FSDP = "rmcore.parallel.ddp:DataParallel", "rmcore.parallel.fsdp:FullySharded"
TRAITS: dict[str, StrategyTraits] = {  # the simplest first: `rmcore plan` prefers it among equally fast ones
    "ddp": StrategyTraits(DDP),
    "zero1": StrategyTraits(DDP, True),
    "zero2": StrategyTraits(FSDP, True, True),
    "hsdp": StrategyTraits(FSDP, True, True, by_host=True, gathers_each_micro_batch=True),
    "zero3": StrategyTraits(FSDP, True, True, gathers_each_micro_batch=True),
}


class ParallelConfig(Section):
    """how ranks share the work"""

    strategy: Name = Field(
        "ddp",
        description="what is split over ranks: nothing, optimizer, also gradients, also weights; hsdp: within hosts",
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="of the model's arithmetic; weights and loss are fp32. auto: bf16 if the devices of all ranks have "
        "instructions for it, else fp32; a resumed run keeps its precision",
    )
    recompute: Literal["auto", "none", "selective", "full", "offload"] = Field(
        "auto",
        description="activation checkpointing: less memory, more time; offload: full, and what is kept of each layer "
        "waits in host memory",
    )
    context: int = Field(
        1,
        ge=1,
        description="ranks that compute each packed row together, for comparisons that are too long for one: each rank "
        "holds the activations of its part of the row; the number of ranks must be a multiple",
    )
    compile: bool = Field(False, description="torch.compile the model")
    offload: bool = Field(
        False,
        description="keep weights, gradients and optimizer in host memory (zero2, zero3, hsdp); slow, a last resort",
    )
    fp8: bool = Field(False, description="FP8 products in the linear layers, on GPUs that have them (extra: fp8)")
    deterministic: bool = Field(
        False,
        description="on GPUs, only algorithms whose results repeat bit for bit; slower. On a CPU they always do",
    )
    timeout_seconds: int = Field(600, ge=1, description="a collective that waits longer ends the run")

    @property
    def traits(self) -> StrategyTraits:
        """The facts about the chosen strategy."""
        return TRAITS[self.strategy]

    @property
    def bf16(self) -> bool:
        """Whether the model's arithmetic is bf16. Raises ValueError as long as the precision is `auto`."""
        if self.precision == "auto":
            raise ValueError("parallel.precision=auto was not resolved: see rmcore.parallel.precision")
        return self.precision == "bf16"

    @model_validator(mode="after")
    def _check(self) -> "ParallelConfig":
        if self.offload and not self.traits.shards_weights:
            *others, last = (name for name in get_args(Name) if TRAITS[name].shards_weights)
            raise conflict(
                "parallel.offload", f"needs parallel.strategy {', '.join(others)} or {last}, not {self.strategy}"
            )
        for key, chosen in (("recompute=offload", self.recompute == "offload"), ("context", self.context > 1)):
            if self.compile and chosen:
                raise conflict("parallel.compile", f"and parallel.{key} exclude each other: this is untested")
        if self.fp8 and self.precision == "fp32":
            raise conflict("parallel.fp8", "needs parallel.precision=bf16: what is not in FP8 runs in bf16")
        return self
