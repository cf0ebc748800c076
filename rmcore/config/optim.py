"""The section `optim`: AdamW and its schedule.

Input: plain values. Output: a frozen `OptimConfig`.
Example: `optim.schedule=wsd optim.warmup_ratio=0.05 optim.decay_ratio=0.2` in a run of 100 steps: the learning rate
rises over 5 steps, stays at its peak for 75, and falls over the last 20.

rmcore/parallel/optim.py has the formulas.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rmcore.config.section import Section, conflict

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """AdamW and its schedule"""

    lr: float = Field(3e-6, gt=0, description="peak learning rate")
    head_lr: float | None = Field(
        None, gt=0, description="peak learning rate of the score head, with the same schedule; null: optim.lr"
    )
    schedule: Literal["linear", "cosine", "wsd", "constant"] = Field(
        "linear",
        description="after the warm-up: linear or cosine decay to the end of the run; wsd (warm-up, stable, decay): "
        "constant, then a linear decay; or constant",
    )
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises from zero")
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="the same as a share of the steps of the run, rounded up")
    decay_ratio: float = Field(
        0.1, gt=0, le=1, description="wsd: share of the steps of the run, at its end, over which the rate decays"
    )
    min_lr_ratio: float = Field(
        0.0, ge=0, lt=1, description="linear, cosine, wsd: where the decay ends, as a share of the peak"
    )
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = Field(
        (0.9, 0.999), description="decay rates of AdamW's two averages"
    )
    eps: float = Field(1e-5, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    states: Literal["fp32", "bf16", "int8"] = Field(
        "fp32",
        description="of AdamW's two averages: 8, 4 or 2 bytes per parameter; int8 needs bitsandbytes (extra: "
        "bitsandbytes)",
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay per step of a moving average of the weights, such as 0.99, kept next to them in fp32; "
        "run.weights=ema evaluates and exports it",
    )
    max_grad_norm: float = Field(1.0, ge=0, description="clip the global gradient norm to this; 0: no clipping")

    @model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        if self.warmup_steps and self.warmup_ratio:
            raise conflict("optim.warmup_ratio", "and optim.warmup_steps exclude each other")
        if self.schedule != "wsd" and self.decay_ratio != type(self).model_fields["decay_ratio"].default:
            raise conflict("optim.decay_ratio", f"has no effect on optim.schedule={self.schedule}, only on wsd")
        if self.schedule == "constant" and self.min_lr_ratio:
            raise conflict("optim.min_lr_ratio", "has no effect on optim.schedule=constant, which does not decay")
        if self.schedule == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            raise conflict("optim.decay_ratio", "and optim.warmup_ratio are more than the whole run")
        return self
