"""The section `loss`: the objective, the keys that it uses, and the labels that it reads from the data.

Input: plain values. Output: a frozen `LossConfig`.
Example: `loss.name=hinge loss.tie_rate=0.2` is an error, because hinge does not use ties. `loss.name=regression` needs
scores in the data and counts scored answers instead of pairs.

A source of data.train may have a `loss` of its own, with the same keys; then a run trains several objectives at once.
The objectives are functions of the same names in rmcore/model/objectives.py, or functions of the user.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from rmcore.config.section import ImportPath, Section, conflict
from rmcore.host.imports import imported

Name = Literal[
    "bradley_terry",
    "hinge",
    "rao_kupper",
    "davidson",
    "plackett_luce",
    "regression",
    "scaled_bradley_terry",
    "focal",
    "listwise",
    "quantile_regression",
]
PAIRWISE = ("centering", "label_smoothing", "log_barrier", "margin")
# Keys of losses that are added to the objectives; those of the section `loss` count, for the data of all sources.
BESIDES = ("sft", "length_decorrelation", "router_aux")
OF_ALL = ("name", "output", "weight", *BESIDES)  # keys that every objective uses
Counts = Literal["pairs", "lists", "answers", "cells", "targets"]


class Traits(NamedTuple):
    """The keys that an objective uses, the labels that it reads, and what it counts."""

    keys: tuple[str, ...] = ()  # keys of the section `loss` that it uses, besides OF_ALL
    ties: bool = False  # it reads tied pairs
    scores: bool = False  # it reads one number per answer
    targets: bool = False  # these numbers are the probabilities of a row's answers
    margins: bool = False  # it reads the margins of the data in any case
    soft: bool = True  # it accepts both directions of a pair, weighted
    outputs: Literal["one", "any", "several"] = "one"  # how many outputs of the score head it can train
    # The unit of a global batch and of the mean of the loss: pairs (by weight, ties included), lists (comparisons),
    # scored answers, cells (known attributes of answers), or targets (comparisons with probabilities).
    counts: Counts = "pairs"

    @property
    def unit(self) -> str:
        """The unit of `batch.pairs`, in words."""
        words = {"answers": "scored answers", "cells": "scored answers", "targets": "comparisons"}
        return words.get(self.counts, "pairs")


TRAITS: dict[str, Traits] = {
    "bradley_terry": Traits(PAIRWISE),
    "hinge": Traits(PAIRWISE),
    "rao_kupper": Traits(("centering", "margin", "tie_rate"), ties=True),
    "davidson": Traits(("centering", "margin", "tie_rate"), ties=True),
    "plackett_luce": Traits(soft=False, counts="lists"),
    "regression": Traits(scores=True, counts="answers", outputs="any"),
    "scaled_bradley_terry": Traits(("centering", "label_smoothing", "log_barrier"), margins=True),
    "focal": Traits((*PAIRWISE, "gamma")),
    "listwise": Traits(("brier", "rps"), scores=True, targets=True, soft=False, counts="targets"),
    "quantile_regression": Traits(scores=True, counts="answers", outputs="several"),
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
        description="bradley_terry (K answers: all their pairs), scaled_bradley_terry (times the margin of the data), "
        "focal (pairs that are ranked right count less), hinge, rao_kupper or davidson (with ties), plackett_luce "
        "(whole rankings), listwise (probabilities of K options), regression (on scores, or on attributes), "
        "quantile_regression (quantiles of scores), or a function of yours",
    )
    output: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = Field(
        None,
        description="the output of model.outputs that this loss trains; a list: several, each on the attribute of its "
        "name (regression), or quantiles; null: the reward",
    )
    weight: float = Field(1.0, gt=0, description="factor of this loss in the sum, where sources have different ones")
    centering: float = Field(0.0, ge=0, description="weight of (r_chosen + r_rejected)^2, which keeps rewards near 0")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="assumed probability that a label is wrong")
    log_barrier: float = Field(
        0.0, ge=0, description="weight of -log(5 + r) - log(5 - r), which keeps rewards between -5 and 5"
    )
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
    gamma: float = Field(2.0, ge=0, description="focal: how little pairs count that are ranked right; 0: all equally")
    brier: float = Field(0.0, ge=0, description="listwise: weight of the Brier score of the probabilities")
    rps: float = Field(0.0, ge=0, description="listwise: weight of the ranked probability score, for ordered options")
    router_aux: float = Field(
        0.0, ge=0, description="weight of the balance of a mixture of experts: 1 if texts use all experts equally"
    )

    @property
    def traits(self) -> Traits:
        """The traits of the chosen objective with its output."""
        traits = TRAITS[self.name]
        return traits._replace(scores=False, counts="cells") if self.attributes else traits

    @property
    def attributes(self) -> tuple[str, ...]:
        """The attributes of the answers that the objective reads."""
        return tuple(self.output) if self.name == "regression" and isinstance(self.output, list) else ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """The outputs that `output` lists; none: the reward."""
        return (self.output,) if isinstance(self.output, str) else tuple(self.output or ())

    @property
    def reads_margins(self) -> bool:
        """Whether the margins of the data are read."""
        return self.margin == "data" or self.traits.margins

    def changed(self) -> dict[str, Any]:
        """The keys that differ from their defaults, and the name."""
        values = self.model_dump(mode="json")
        kept = {key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default}
        return {key: value for key, value in values.items() if key in {"name", *kept}}

    @model_validator(mode="after")
    def _check(self) -> "LossConfig":
        if ":" in self.name:  # a function of the user may read any key; it is imported when it is needed
            return self
        for key, field in type(self).model_fields.items():
            if key not in OF_ALL and key not in self.traits.keys and getattr(self, key) != field.default:
                used = ", ".join(f"loss.{one}" for one in self.traits.keys) or "no other key of loss"
                raise conflict(f"loss.{key}", f"has no effect on loss.name={self.name}, which uses {used}")
        several = isinstance(self.output, list)
        if several and (not self.output or len(set(self.output)) < len(self.output)):
            raise conflict("loss.output", "must list at least one output, and each only once")
        if several and self.traits.outputs == "one":
            raise conflict("loss.output", f"must be one output: loss.name={self.name} does not train several")
        if self.traits.outputs == "several" and not several:
            raise conflict("loss.output", f"must list the outputs that loss.name={self.name} trains as quantiles")
        return self


def distinct_names(losses: Sequence[LossConfig]) -> tuple[str, ...]:
    """A name for each of several objectives, in metrics: regression, bradley_terry, regression_2."""
    names = [loss.name for loss in losses]
    before = [names[:place].count(name) for place, name in enumerate(names)]
    return tuple(f"{name}_{count + 1}" if count else name for name, count in zip(names, before, strict=True))
