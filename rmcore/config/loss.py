"""The section `loss`: which objective is trained, which keys it uses, and what it reads of the data.

Enters: plain values. Leaves: a frozen `LossConfig`. Example: `loss.name=hinge loss.tie_rate=0.2` is refused, because
hinge reads no ties; `loss.name=regression` asks the data for scores and counts scored answers instead of pairs.

The objectives themselves are functions of the same names in rmcore/model/objectives.py.
"""

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from rmcore.config.section import Section, conflict

Name = Literal["bradley_terry", "hinge", "rao_kupper", "davidson", "plackett_luce", "regression"]
PAIRWISE = ("centering", "label_smoothing", "margin")


class Traits(NamedTuple):
    """What an objective uses and reads.

    `keys`: of the section `loss`, those that mean something to it. `ties`: it reads pairs that tie. `scores`: it reads
    a number an answer. `soft`: it can take both directions of a pair, weighted. `counts`: what a global batch and the
    mean of the loss count: pairs (by their weights, ties among them), lists (comparisons) or scored answers.
    """

    keys: tuple[str, ...] = ()
    ties: bool = False
    scores: bool = False
    soft: bool = True
    counts: Literal["pairs", "lists", "answers"] = "pairs"

    @property
    def unit(self) -> str:
        """What `batch.pairs` counts."""
        return "scored answers" if self.counts == "answers" else "pairs"


TRAITS: dict[str, Traits] = {
    "bradley_terry": Traits(PAIRWISE),
    "hinge": Traits(PAIRWISE),
    "rao_kupper": Traits(("centering", "margin", "tie_rate"), ties=True),
    "davidson": Traits(("centering", "margin", "tie_rate"), ties=True),
    "plackett_luce": Traits(soft=False, counts="lists"),
    "regression": Traits(scores=True, counts="answers"),
}


class LossConfig(Section):
    """the objective"""

    name: Name = Field(
        "bradley_terry",
        description="bradley_terry (K answers: all their pairs), hinge, rao_kupper or davidson (they read ties), "
        "plackett_luce (whole rankings), regression (on scores)",
    )
    centering: float = Field(0.0, ge=0, description="weight of (r_chosen + r_rejected)^2: keeps rewards near 0")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="probability that a label is taken to be wrong")
    margin: Literal["none", "data"] | Annotated[float, Field(ge=0)] = Field(
        "none", description="none, that of each row (data), or one number for all"
    )
    tie_rate: float = Field(
        0.25, gt=0, lt=1, description="rao_kupper, davidson: probability of a tie of two equally good answers"
    )

    @property
    def traits(self) -> Traits:
        """What the chosen objective uses and reads."""
        return TRAITS[self.name]

    @model_validator(mode="after")
    def _check(self) -> "LossConfig":
        for key, field in type(self).model_fields.items():
            if key != "name" and key not in self.traits.keys and getattr(self, key) != field.default:
                used = ", ".join(f"loss.{one}" for one in self.traits.keys) or "no other key of loss"
                raise conflict(f"loss.{key}", f"means nothing to loss.name={self.name}, which uses {used}")
        return self
