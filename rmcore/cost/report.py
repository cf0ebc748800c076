"""Formats the prediction of a run as text, and as one JSON object.

Input: a `RunEstimate`.
Output: lines for a reader, or a dict for a script.
Example line: `memory     zero2, recompute none: 41.34 GiB per rank; 67.2 may be used (85% of 79.1): it fits`.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rmcore.config.parallel import TRAITS
from rmcore.cost.estimate import Estimate
from rmcore.cost.machines import GIB, LINK_SHARE
from rmcore.cost.memory import RESERVE
from rmcore.cost.run_cost import RunEstimate


def as_lines(run: RunEstimate) -> Iterator[str]:
    """The prediction for a reader."""
    config, data, setting, sizes, one = run.config, run.data, run.setting, run.sizes, run.configured
    yield f"model      {config.model.name}: {sizes.total:,} parameters, {sizes.layers} layers ({run.shape_from})"
    pairs = "an unknown number of pairs" if data.pairs is None else f"{data.pairs:,} pairs"
    yield (
        f"data       {pairs}; per pair {data.tokens:.0f} tokens computed, {data.logical:.0f} in its texts "
        f"(sharing {data.logical / data.tokens:.2f}); longest comparison {data.longest:,}"
    )
    yield from (f"           note: {note}" for note in data.notes)
    precision, machine = config.parallel.precision, setting.machine
    yield (
        f"machine    {setting.gpus} x {machine.name} on {setting.hosts} host{'s' * (setting.hosts > 1)}, "
        f"{machine.peak(precision) / 1e12:.3g} TFLOP/s in {precision}, MFU {setting.mfu:g} ({run.mfu_from})"
    )
    yield from (f"           {line}" for line in run.precision_lines)
    yield from _memory(run, one)
    each = TRAITS[one.strategy].gathers_each_micro_batch
    deferred = f", gradients reduced after {'each' if each else 'the last'}" if one.micro_batches > 1 else ""
    most = "" if one.most_tokens is None else f" (at most {max(0, one.most_tokens):,} would fit)"
    yield (
        f"batch      {config.batch.pairs} pairs per step; micro batches of up to {one.tokens:,} tokens{most}, "
        f"{one.micro_batches} per step on each rank{deferred}; ranks idle {one.idle:.1%} of the time by imbalance"
    )
    yield from _time(run, one)
    yield from _communication(run, one)
    yield (
        f"disk       {run.checkpoint_bytes / 1e9:.3g} GB per checkpoint, at most {run.checkpoints} at a time: "
        f"{run.checkpoints * run.checkpoint_bytes / 1e9:.3g} GB; the exported model {4e-9 * sizes.total:.3g} GB"
    )
    yield f"cheapest   {_cheapest(run)}"
    yield ""
    yield from _table(run)


def _memory(run: RunEstimate, one: Estimate) -> Iterator[str]:
    parts = {name: size / GIB for name, size in asdict(one.memory).items()}
    if run.setting.machine.is_cpu:
        parts |= {"runtime": run.runtime_bytes / GIB, "checkpoint copy": run.copy_bytes(one) / GIB}
    verdict = ""
    if one.fits is not None:
        memory = one.room / GIB
        verdict = f"; {RESERVE * memory:.1f} may be used ({RESERVE:.0%} of {memory:.1f}): "
        verdict += "it fits" if one.fits else "IT DOES NOT FIT"
    ways = f"{one.strategy}, recompute {one.recompute}"
    if (context := run.config.parallel.context) > 1:
        ways += f", each row over {context} ranks"
    yield f"memory     {ways}: {sum(parts.values()):.2f} GiB per rank{verdict}"
    yield "           " + ", ".join(f"{name} {size:.2f}" for name, size in parts.items())
    if run.saves_from_copy and not run.setting.machine.is_cpu:
        copy = run.copy_bytes(one) * (one.gpus // one.hosts) / GIB
        yield f"           plus {copy:.1f} GiB of each host's memory, for the copy that a checkpoint is written from"
    if not one.counted:
        yield "           note: activations by a rule of thumb, because the model does not run on fake tensors"


def _time(run: RunEstimate, one: Estimate) -> Iterator[str]:
    flops = run.flops_a_pair * run.config.batch.pairs
    yield (
        f"step       {one.step_seconds:.3g} s: {flops / 1e12:.4g} TFLOP in {one.compute_seconds:.3g} s, exposed "
        f"communication {one.exposed_seconds:.2g} s, optimizer {one.optimizer_seconds:.2g} s"
    )
    hours = run.hours(one)
    if run.steps is None or hours is None:
        yield "run        unknown: give --pairs N, the number of pairs in data.train"
        return
    pairs = run.data.pairs
    tokens = ""
    if pairs is not None and run.config.run.max_steps is None:
        seen = pairs * run.config.run.epochs
        tokens = f", {seen * run.data.tokens:.3g} tokens computed, {seen * run.data.logical:.3g} in the texts"
    total = flops * run.steps
    yield (
        f"run        {run.steps:,} steps{tokens}, {total:.3g} FLOP: {hours:.3g} hours, "
        f"{hours * one.gpus:.3g} GPU hours, without evaluation and saving"
    )


def _communication(run: RunEstimate, one: Estimate) -> Iterator[str]:
    if not one.transfers:
        yield "sends      nothing: one rank"
        return
    within = sum(t.within * t.times for t in one.transfers) / 1e9
    between = sum(t.between * t.times for t in one.transfers) / 1e9
    known = bool(run.setting.machine.within)
    exposed = "at an unknown rate"
    if known:
        exposed = "hidden behind compute" if one.hidden else f"{one.exposed_seconds:.2g} s not hidden behind compute"
    yield (
        f"sends      per rank and step {within:.3g} GB within the host, {between:.3g} GB between hosts; {exposed}"
        + (f" (links at {LINK_SHARE:.0%} of their data sheets' rates)" if known else "")
    )
    for t in one.transfers:
        times = f", {t.times} times" if t.times > 1 else ""
        yield f"           {t.what}: {t.within / 1e9:.3g} + {t.between / 1e9:.3g} GB{times}, behind {t.behind}"


def _cheapest(run: RunEstimate) -> str:
    best = run.cheapest
    if best.fits is False:
        return f"nothing fits; {best.strategy} needs the least memory: {best.memory.total / GIB:.1f} GiB per rank"
    seconds = ", ".join(
        f"{one.strategy} {one.step_seconds:.3g} s" + (" (does not fit)" if one.fits is False else "")
        for one in run.strategies
    )
    return f"parallel.strategy={best.strategy}: {seconds}"


def _table(run: RunEstimate) -> Iterator[str]:
    yield "the cheapest strategy that fits, by number of GPUs (8 per host):"
    yield (
        f"{'GPUs':>5} {'strategy':>8} {'recompute':>9} {'GiB':>6} {'tokens':>7} {'micro':>5} {'idle':>6} "
        f"{'step s':>8} {'hours':>8} {'GPU h':>8}  communication"
    )
    for one in run.by_gpus:
        hours = run.hours(one)
        spent = f"{hours:>8.3g} {hours * one.gpus:>8.3g}" if hours is not None else f"{'?':>8} {'?':>8}"
        exposed = "none" if not one.transfers else "hidden" if one.hidden else f"{one.exposed_seconds:.2g} s exposed"
        exposed = exposed if run.setting.machine.within else "unknown"
        memory = (one.memory.total + run.host_bytes(one)) / GIB
        yield (
            f"{one.gpus:>5} {one.strategy:>8} {one.recompute:>9} {memory:>6.1f} {one.tokens:>7,} "
            f"{one.micro_batches:>5} {one.idle:>6.1%} {one.step_seconds:>8.3g} {spent}  {exposed}"
            + ("" if one.fits is not False else "; DOES NOT FIT")
        )
    wide = [one for one in run.by_gpus if one.gpus > run.config.batch.pairs]
    if wide:
        yield (
            f"note: batch.pairs={run.config.batch.pairs} pairs per step leave ranks idle on {wide[0].gpus} GPUs and "
            "more: raise it there"
        )


def as_dict(run: RunEstimate) -> dict[str, Any]:
    """The prediction for a script, in bytes, seconds and counts."""
    return {
        "model": {"name": run.config.model.name, "shape_from": run.shape_from, **asdict(run.sizes)},
        "data": {key: value for key, value in vars(run.data).items() if key != "rows"},
        "setting": {
            "machine": asdict(run.setting.machine),
            "gpus": run.setting.gpus,
            "hosts": run.setting.hosts,
            "mfu": run.setting.mfu,
            "mfu_from": run.mfu_from,
            "precision": run.config.parallel.precision,
        },
        "flops_a_pair": run.flops_a_pair,
        "steps": run.steps,
        "checkpoint_bytes": run.checkpoint_bytes,
        "checkpoints_at_most": run.checkpoints,
        "runtime_bytes": run.runtime_bytes,
        "asked": _estimate(run, run.configured),
        "cheapest": _estimate(run, run.cheapest),
        "strategies": [_estimate(run, one) for one in run.strategies],
        "by_gpus": [_estimate(run, one) for one in run.by_gpus],
    }


def _estimate(run: RunEstimate, one: Estimate) -> dict[str, Any]:
    values = asdict(one)
    values["memory"]["total"] = one.memory.total + run.host_bytes(one)
    hours = run.hours(one)
    return {
        **values,
        "step_seconds": one.step_seconds,
        "communication_hidden": one.hidden,
        "hours": hours,
        "gpu_hours": None if hours is None else hours * one.gpus,
    }
