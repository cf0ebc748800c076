"""The section `model.lora`: train low-rank adapters instead of all weights.

Example: `model.lora.rank=16` trains updates of rank 16 for all linear layers, scaled by 32 / 16, and the score head.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rmcore.config.section import Section, conflict


class LoraConfig(Section):
    """low-rank adapters"""

    rank: int | None = Field(
        None,
        ge=1,
        description="train low-rank updates of this rank and the score head (extra: lora); null: train all weights",
    )
    alpha: float | None = Field(None, gt=0, description="the updates are scaled by alpha / rank; null: twice the rank")
    targets: Literal["all-linear"] | list[Annotated[str, Field(min_length=1)]] = Field(
        "all-linear", description="linear layers to adapt, by the last parts of their names: [q_proj, v_proj]"
    )

    base: Literal["fp32", "bf16", "int8", "nf4"] = Field(
        "fp32",
        description="how the adapted layers store their frozen weights: 4, 2, 1 or half a byte each (extra: "
        "bitsandbytes for int8 and nf4)",
    )
    dora: bool = Field(False, description="also train the norm of each row of an adapted weight (DoRA)")
    rslora: bool = Field(False, description="scale the updates by alpha / sqrt(rank) instead (rank-stabilised LoRA)")

    @property
    def scale_alpha(self) -> float:
        """`alpha`, or its default of twice the rank."""
        return self.alpha or 2.0 * (self.rank or 0)

    @model_validator(mode="after")
    def _check(self) -> "LoraConfig":
        for key in ("alpha", "targets", "base", "dora", "rslora"):
            if self.rank is None and getattr(self, key) != type(self).model_fields[key].default:
                raise conflict(f"model.lora.{key}", "needs model.lora.rank")
        return self
