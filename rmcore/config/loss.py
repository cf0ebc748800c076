"""The section `loss`: the objective, the keys that it uses, and the labels that it reads from the data.

Input: plain values. Output: a frozen `LossConfig`.
Example: `loss.name=hinge loss.tie_rate=0.2` is an error, because hinge does not use ties. `loss.name=regression` needs
scores in the data and counts scored answers instead of pairs.

The objectives are functions of the same names in rmcore/model/objectives.py, or functions of the user.
"""

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from rmcore.config.section import ImportPath, Section, conflict
from rmcore.host.imports import imported

Name = Literal["bradley_terry", "hinge", "rao_kupper", "davidson", "plackett_luce", "regression"]
BESIDES = ("sft", "length_decorrelation", "router_aux")  # keys of losses that are added to any objective
PAIRWISE = ("centering", "label_smoothing", "margin")


class Traits(NamedTuple):
    """The keys that an objective uses, the labels that it reads, and what it counts."""

    keys: tuple[str, ...] = ()  # keys of the section `loss` that it uses
    ties: bool = False  # it reads tied pairs
    scores: bool = False  # it reads one number per answer
    soft: bool = True  # it accepts both directions of a pair, weighted
    # The unit of a global batch and of the mean of the loss: pairs (by weight, ties included), lists (comparisons) or
    # scored answers.
    counts: Literal["pairs", "lists", "answers"] = "pairs"

    @property
    def unit(self) -> str:
        """The unit of `batch.pairs`, in words."""
        return "scored answers" if self.counts == "answers" else "pairs"


TRAITS: dict[str, Traits] = {
    "bradley_terry": Traits(PAIRWISE),
    "hinge": Traits(PAIRWISE),
    "rao_kupper": Traits(("centering", "margin", "tie_rate"), ties=True),
    "davidson": Traits(("centering", "margin", "tie_rate"), ties=True),
    "plackett_luce": Traits(soft=False, counts="lists"),
    "regression": Traits(scores=True, counts="answers"),
}


class _WithOwn(dict[str, Traits]):
    """For a function of the user, its attribute `traits`; without one it is pairwise."""

    def __missing__(self, name: str) -> Traits:
        return getattr(imported(name, "loss.name"), "traits", Traits(PAIRWISE))


TRAITS = _WithOwn(TRAITS)


class LossConfig(Section):
    """the objective"""

    name: Name | ImportPath = Field(
        "bradley_terry",
        description="bradley_terry (K answers: all their pairs), hinge, rao_kupper or davidson (with ties), "
        "plackett_luce (whole rankings), regression (on scores), or a function of yours",
    )
    centering: float = Field(0.0, ge=0, description="weight of (r_chosen + r_rejected)^2, which keeps rewards near 0")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="assumed probability that a label is wrong")
    margin: Literal["none", "data"] | Annotated[float, Field(ge=0)] = Field(
        "none", description="none, the margin of each row (data), or one number for all"
    )
    sft: float = Field(
        0.0,
        ge=0,
        description="weight of the language-modelling loss of the chosen answers, per token, next to the objective; "
        "the base model's language-model head is trained along",
    )
    length_decorrelation: float = Field(
        0.0,
        ge=0,
        description="weight of |correlation| of the rewards and the lengths of all answers of a step (ODIN); costs one "
        "forward more",
    )
    tie_rate: float = Field(
        0.25, gt=0, lt=1, description="rao_kupper, davidson: probability of a tie between two equally good answers"
    )

    router_aux: float = Field(
        0.0, ge=0, description="weight of the balance of a mixture of experts: 1 if texts use all experts equally"
    )

    @property
    def traits(self) -> Traits:
        """The traits of the chosen objective."""
        return TRAITS[self.name]

    @model_validator(mode="after")
    def _check(self) -> "LossConfig":
        if ":" in self.name:  # a function of the user may read any key; it is imported when it is needed
            return self
        for key, field in type(self).model_fields.items():
            if key not in ("name", *BESIDES) and key not in self.traits.keys and getattr(self, key) != field.default:
                used = ", ".join(f"loss.{one}" for one in self.traits.keys) or "no other key of loss"
                raise conflict(f"loss.{key}", f"has no effect on loss.name={self.name}, which uses {used}")
        return self
