"""Everything that `rmcore plan` finds, put together.

Enters: a config and the command's options. Leaves: a `RunPlan` for the report. Example: hh.yaml on 8 H100s -> zero2 as
it asks, the cheapest strategy beside it, and one estimate each for 1, 8, 64 and 512 GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from rmcore.config import Config, UserError
from rmcore.cost.data_size import figures_of
from rmcore.cost.dry_run import DryRun, Sizes
from rmcore.cost.estimate import Setting, cheapest, estimate, steps_of
from rmcore.cost.flops import flops_of_pair
from rmcore.cost.machines import Machine, copy_rate, machine, matrix_rate
from rmcore.cost.memory import BYTES_A_PARAMETER
from rmcore.cost.report import MFU_SOURCE, RunPlan
from rmcore.cost.shapes import shape_of
from rmcore.data.prepare import PreparedData

PRODUCT_ROWS = 2048  # tokens of a micro batch, about, on a CPU


def plan_run(
    config: Config,
    options: argparse.Namespace,
    prepare: Callable[[Config], PreparedData],
    mfus: dict[bool, float],
    gpus_a_host: int,
    gpus: tuple[int, ...],
) -> RunPlan:
    """Raises UserError: a model whose shape is not to be had, data flags out of range.

    prepare: reads the data of the config; called when the options do not say how many there are.
    """
    hf_config, shape_from = shape_of(config.model, options.model_config)
    try:
        model = DryRun(hf_config, trust_remote_code=config.model.trust_remote_code)
    except (ValueError, OSError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model.name {config.model.name}: no reward model can be built of its config: {reason}"
        ) from None
    data = figures_of(config, prepare, options.pairs, options.tokens_a_pair, options.sharing)
    runtime = _runtime() if options.gpu == "cpu" else 0.0
    found = _machine(config, options, model.sizes)
    mfu = options.mfu or mfus[found.is_cpu]
    hosts = options.nodes or (1 if found.is_cpu else -(-options.gpus // gpus_a_host))
    if options.gpus % hosts:
        raise UserError(f"--gpus {options.gpus} do not divide into {hosts} hosts of {gpus_a_host}: give --nodes")
    setting = Setting(found, options.gpus, hosts, mfu)
    best, every = cheapest(config, model, data, setting)
    strategy = config.parallel.strategy
    asked = next((one for one in every if one.strategy == strategy), None)
    counts = (options.gpus,) if found.is_cpu else gpus
    settings = [Setting(found, count, max(1, count // gpus_a_host), mfu) for count in counts]
    return RunPlan(
        config=config,
        sizes=model.sizes,
        shape_from=shape_from,
        data=data,
        setting=setting,
        mfu_from="--mfu" if options.mfu else "of the rate measured" if found.is_cpu else f"assumed; {MFU_SOURCE}",
        flops_a_pair=flops_of_pair(model, data),
        steps=steps_of(config, data),
        disk=float(BYTES_A_PARAMETER * model.sizes.total),
        kept=config.run.keep + config.run.keep_best + 1,
        runtime=runtime,
        copied=config.run.background_save and (config.run.save_every or config.run.save_minutes) is not None,
        asked=asked or estimate(config, model, data, setting, strategy),
        best=best,
        every=every,
        table=[cheapest(config, model, data, one)[0] for one in settings],
    )


def _machine(config: Config, options: argparse.Namespace, sizes: Sizes) -> Machine:
    """The machine of --gpu, with --rate; a CPU's rates are measured now, on a product of the model's size."""
    rate = None if options.rate is None else 1e12 * options.rate
    if options.gpu != "cpu":
        return machine(options.gpu, rate)
    inner = round(sizes.products / max(1, sizes.layers - 1) / 3 / sizes.width)  # of three about equal products a layer
    rate = rate or matrix_rate(config.parallel.precision, (PRODUCT_ROWS, sizes.width, inner))
    return machine("cpu", rate, copy_rate())


def _runtime() -> float:
    """Bytes of a process that has imported what a run imports and read its data, without a model: a rank on a CPU takes
    them.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024.0 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # not Linux: the most so far stands for it
    return float(peak if sys.platform == "darwin" else 1024 * peak)
