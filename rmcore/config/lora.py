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

    @property
    def scale_alpha(self) -> float:
        """`alpha`, or its default of twice the rank."""
        return self.alpha or 2.0 * (self.rank or 0)

    @model_validator(mode="after")
    def _check(self) -> "LoraConfig":
        for key in ("alpha", "targets"):
            if self.rank is None and getattr(self, key) != type(self).model_fields[key].default:
                raise conflict(f"model.lora.{key}", "needs model.lora.rank")
        return self
