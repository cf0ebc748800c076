"""A plan as text, and as one JSON object.

Enters: `Plan`, everything that `rmcore plan` found. Leaves: lines for a person, or a dict for a script. Example line:
`memory     zero2, recompute none: 41.3 GiB a rank of 67.2 that are planned with (85 % of 79.1): it fits`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rmcore.config import Config
from rmcore.config.parallel import TRAITS
from rmcore.cost.data_size import DataFigures
from rmcore.cost.dry_run import Sizes
from rmcore.cost.estimate import Estimate, Setting
from rmcore.cost.machines import GIB, LINK_SHARE
from rmcore.cost.memory import RESERVE

MFU_SOURCE = (
    "published on H100 in bf16: 0.39 torchtitan 8B, 0.43 to 0.46 llm-foundry 1b and 3b; rmcore's own is unmeasured"
)


@dataclass(frozen=True)
class RunPlan:
    """`asked`: under the config's own strategy; `best`: the cheapest that fits; `table`: the cheapest by GPUs."""

    config: Config
    sizes: Sizes
    shape_from: str
    data: DataFigures
    setting: Setting
    mfu_from: str
    flops_a_pair: float
    steps: int | None
    disk: float  # bytes of a checkpoint
    kept: int
    runtime: float  # bytes of the process itself, on a CPU
    copied: bool  # a checkpoint is written from a copy in host memory
    asked: Estimate
    best: Estimate
    every: list[Estimate]
    table: list[Estimate]

    def copy(self, one: Estimate) -> float:
        """Bytes of host memory that a rank's share of a checkpoint takes while it is written."""
        return self.disk / one.gpus if self.copied else 0.0

    def beside(self, one: Estimate) -> float:
        """What a rank on a CPU takes besides the step itself."""
        return self.runtime + self.copy(one) if self.setting.machine.is_cpu else 0.0

    def hours(self, one: Estimate) -> float | None:
        return None if self.steps is None else self.steps * one.step_seconds / 3600


def lines(plan: RunPlan) -> Iterator[str]:
    """The plan for a person."""
    config, data, setting, asked = plan.config, plan.data, plan.setting, plan.asked
    size = plan.sizes
    yield f"model      {config.model.name}: {size.total:,} parameters, {size.layers} layers ({plan.shape_from})"
    pairs = "an unknown number of pairs" if data.pairs is None else f"{data.pairs:,} pairs"
    yield (
        f"data       {pairs}; a pair: {data.tokens:.0f} tokens computed, {data.logical:.0f} in its texts "
        f"(sharing {data.logical / data.tokens:.2f}); longest comparison {data.longest:,}"
    )
    yield from (f"           note: {note}" for note in data.notes)
    precision, machine = config.parallel.precision, setting.machine
    yield (
        f"machine    {setting.gpus} x {machine.name} on {setting.hosts} host{'s' * (setting.hosts > 1)}, "
        f"{machine.peak(precision) / 1e12:.3g} TFLOP/s in {precision}, MFU {setting.mfu:g} ({plan.mfu_from})"
    )
    yield from _memory(plan, asked)
    if not asked.counted:
        yield "           note: activations by rule of thumb: the model does not run on fake tensors"
    each = TRAITS[asked.strategy].gathers_each_micro_batch
    deferred = f", gradients reduced with {'each' if each else 'the last'}" if asked.micro_batches > 1 else ""
    most = "" if asked.most_tokens is None else f" (at most {max(0, asked.most_tokens):,} would fit)"
    yield (
        f"batch      {config.batch.pairs} pairs a step; micro batches of up to {asked.tokens:,} tokens{most}, "
        f"{asked.micro_batches} a step on each rank{deferred}; ranks idle {asked.idle:.1%} by imbalance"
    )
    yield from _time(plan, asked)
    yield from _sending(plan, asked)
    yield (
        f"disk       {plan.disk / 1e9:.3g} GB a checkpoint, {plan.kept} at most at a time: "
        f"{plan.kept * plan.disk / 1e9:.3g} GB; the exported model {4e-9 * size.total:.3g} GB"
    )
    yield f"cheapest   {_cheapest(plan)}"
    yield ""
    yield from _table(plan)


def _memory(plan: RunPlan, one: Estimate) -> Iterator[str]:
    parts = {name: size / GIB for name, size in asdict(one.memory).items()}
    if plan.setting.machine.is_cpu:
        parts |= {"runtime": plan.runtime / GIB, "checkpoint copy": plan.copy(one) / GIB}
    verdict = ""
    if one.fits is not None:
        room = one.room / GIB
        verdict = f" of {RESERVE * room:.1f} to plan with ({RESERVE:.0%} of {room:.1f}): "
        verdict += "it fits" if one.fits else "IT DOES NOT FIT"
    yield f"memory     {one.strategy}, recompute {one.recompute}: {sum(parts.values()):.2f} GiB a rank{verdict}"
    yield "           " + ", ".join(f"{name} {size:.2f}" for name, size in parts.items())
    if plan.copied and not plan.setting.machine.is_cpu:
        copy = plan.copy(one) * (one.gpus // one.hosts) / GIB
        yield f"           and {copy:.1f} GiB of each host's own memory for the copy that a checkpoint is written from"


def _time(plan: RunPlan, one: Estimate) -> Iterator[str]:
    flops = plan.flops_a_pair * plan.config.batch.pairs
    yield (
        f"step       {one.step_seconds:.3g} s: {flops / 1e12:.4g} TFLOP in {one.compute_seconds:.3g} s, communication "
        f"that nothing hides {one.exposed_seconds:.2g} s, optimizer {one.optimizer_seconds:.2g} s"
    )
    hours = plan.hours(one)
    if plan.steps is None or hours is None:
        yield "run        unknown: give --pairs N, the number of pairs in data.train"
        return
    pairs = plan.data.pairs
    tokens = ""
    if pairs is not None and plan.config.run.max_steps is None:
        seen = pairs * plan.config.run.epochs
        tokens = f", {seen * plan.data.tokens:.3g} tokens computed for {seen * plan.data.logical:.3g} in texts"
    total = flops * plan.steps
    yield (
        f"run        {plan.steps:,} steps{tokens}, {total:.3g} FLOP: {hours:.3g} hours, "
        f"{hours * one.gpus:.3g} GPU hours, evaluation and saving not counted"
    )


def _sending(plan: RunPlan, one: Estimate) -> Iterator[str]:
    if not one.transfers:
        yield "sends      nothing: one rank"
        return
    within = sum(t.within * t.times for t in one.transfers) / 1e9
    between = sum(t.between * t.times for t in one.transfers) / 1e9
    known = bool(plan.setting.machine.within)
    told = "at an unknown rate"
    if known:
        told = "hidden behind compute" if one.hidden else f"{one.exposed_seconds:.2g} s not hidden behind compute"
    yield (
        f"sends      a rank and step: {within:.3g} GB within the host, {between:.3g} GB between hosts; {told}"
        + (f" (links at {LINK_SHARE:.0%} of their data sheets' rates)" if known else "")
    )
    for t in one.transfers:
        again = f", {t.times} times" if t.times > 1 else ""
        yield f"           {t.what}: {t.within / 1e9:.3g} + {t.between / 1e9:.3g} GB{again}, behind {t.behind}"


def _cheapest(plan: RunPlan) -> str:
    best = plan.best
    if best.fits is False:
        return f"nothing fits; {best.strategy} needs least: {best.memory.total / GIB:.1f} GiB a rank"
    told = ", ".join(
        f"{one.strategy} {one.step_seconds:.3g} s" + (" (does not fit)" if one.fits is False else "")
        for one in plan.every
    )
    return f"parallel.strategy={best.strategy}: {told}"


def _table(plan: RunPlan) -> Iterator[str]:
    yield "the cheapest strategy that fits, by GPUs (8 a host):"
    yield (
        f"{'GPUs':>5} {'strategy':>8} {'recompute':>9} {'GiB':>6} {'tokens':>7} {'micro':>5} {'idle':>6} "
        f"{'step s':>8} {'hours':>8} {'GPU h':>8}  communication"
    )
    for one in plan.table:
        hours = plan.hours(one)
        spent = f"{hours:>8.3g} {hours * one.gpus:>8.3g}" if hours is not None else f"{'?':>8} {'?':>8}"
        told = "none" if not one.transfers else "hidden" if one.hidden else f"{one.exposed_seconds:.2g} s exposed"
        told = told if plan.setting.machine.within else "not known"
        held = (one.memory.total + plan.beside(one)) / GIB
        yield (
            f"{one.gpus:>5} {one.strategy:>8} {one.recompute:>9} {held:>6.1f} {one.tokens:>7,} "
            f"{one.micro_batches:>5} {one.idle:>6.1%} {one.step_seconds:>8.3g} {spent}  {told}"
            + ("" if one.fits is not False else "; DOES NOT FIT")
        )
    wide = [one for one in plan.table if one.gpus > plan.config.batch.pairs]
    if wide:
        yield (
            f"note: batch.pairs={plan.config.batch.pairs} pairs a step leave ranks idle on {wide[0].gpus} GPUs: "
            "raise it there"
        )


def as_dict(plan: RunPlan) -> dict[str, Any]:
    """The plan for a script; bytes, seconds, counts."""
    data = {key: value for key, value in vars(plan.data).items() if key != "rows"}
    return {
        "model": {"name": plan.config.model.name, "shape_from": plan.shape_from, **asdict(plan.sizes)},
        "data": data,
        "setting": {
            "machine": asdict(plan.setting.machine),
            "gpus": plan.setting.gpus,
            "hosts": plan.setting.hosts,
            "mfu": plan.setting.mfu,
            "mfu_from": plan.mfu_from,
            "precision": plan.config.parallel.precision,
        },
        "flops_a_pair": plan.flops_a_pair,
        "steps": plan.steps,
        "checkpoint_bytes": plan.disk,
        "checkpoints_at_most": plan.kept,
        "runtime_bytes": plan.runtime,
        "asked": _estimate(plan, plan.asked),
        "cheapest": _estimate(plan, plan.best),
        "strategies": [_estimate(plan, one) for one in plan.every],
        "by_gpus": [_estimate(plan, one) for one in plan.table],
    }


def _estimate(plan: RunPlan, one: Estimate) -> dict[str, Any]:
    values = asdict(one)
    values["memory"]["total"] = one.memory.total + plan.beside(one)
    hours = plan.hours(one)
    return {**values, "step_seconds": one.step_seconds, "communication_hidden": one.hidden, "hours": hours,
            "gpu_hours": None if hours is None else hours * one.gpus}  # fmt: skip
