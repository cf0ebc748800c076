"""Puts the prediction of a whole run together.

Input: a config and the options of `rmcore plan`.
Output: a `RunEstimate` for the report.
Example: hh.yaml on 8 H100s -> an estimate under zero2, as the config has it; the cheapest strategy that fits; and the
cheapest one each on 1, 8, 64 and 512 GPUs.
"""

import argparse
import contextlib
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from rmcore.config import Config, UserError
from rmcore.cost.data_size import Comparisons, DataSize, size_of_data
from rmcore.cost.dry_run import Sizes
from rmcore.cost.estimate import Estimate, Setting, cheapest, estimate, steps_of_run
from rmcore.cost.flops import flops_of_pair
from rmcore.cost.formats import checkpoint_bytes
from rmcore.cost.machines import Machine, copy_rate, cpu, gpu, matrix_rate
from rmcore.cost.memory import dry_run_of, trained_sizes
from rmcore.cost.shapes import shape_of
from rmcore.parallel.precision import Bf16, bf16_of, with_precision

GPU_MFU, CPU_MFU = 0.4, 1.0  # a CPU's rate is measured on a product of the model's size
MFU_SOURCE = (
    "published on H100 in bf16: 0.39 torchtitan 8B, 0.43 to 0.46 llm-foundry 1b and 3b; rmcore's own is unmeasured"
)
GPUS_PER_HOST = 8
GPU_COUNTS = (1, 8, 64, 512)  # rows of the table
CPU_PRODUCT_TOKENS = 2048  # rows of the matrix product that is measured on a CPU: about a micro batch


@dataclass(frozen=True)
class RunEstimate:
    """Everything that `rmcore plan` predicts."""

    config: Config
    sizes: Sizes
    shape_from: str  # where the model's shape was read
    data: DataSize
    setting: Setting
    mfu_from: str
    precision_lines: list[str]
    flops_a_pair: float
    steps: int | None  # None: the number of pairs is unknown
    checkpoint_bytes: float
    checkpoints: int  # at most on disk at a time
    runtime_bytes: float  # of a process without a model; 0 on a GPU
    saves_from_copy: bool  # a checkpoint is written from a copy in host memory
    configured: Estimate  # under the config's own strategy
    cheapest: Estimate
    strategies: list[Estimate]
    by_gpus: list[Estimate]  # the cheapest on other numbers of GPUs

    def copy_bytes(self, one: Estimate) -> float:
        """Host memory of the copy that a rank writes its share of a checkpoint from."""
        return self.checkpoint_bytes / one.gpus if self.saves_from_copy else 0.0

    def host_bytes(self, one: Estimate) -> float:
        """Memory that a rank on a CPU takes in addition to the step itself; 0 on a GPU."""
        return self.runtime_bytes + self.copy_bytes(one) if self.setting.machine.is_cpu else 0.0

    def hours(self, one: Estimate) -> float | None:
        return None if self.steps is None else self.steps * one.step_seconds / 3600


def estimate_run(config: Config, options: argparse.Namespace, prepare: Callable[[Config], Comparisons]) -> RunEstimate:
    """The prediction for `config`. `options`: the flags of rmcore/plan.py, checked.

    prepare: reads training and evaluation data of the config; it is called unless the options give number and length of
    the pairs.
    Raises UserError for a model whose shape cannot be found and for data flags out of range.
    """
    context = config.parallel.context
    if options.gpus % context:
        raise UserError(f"--gpus {options.gpus} cannot form the groups of parallel.context={context}: give a multiple")
    config, precision_lines = with_precision(
        config, bf16_of(torch.device("cpu")) if options.gpu == "cpu" else Bf16("GPU")
    )
    hf_config, shape_from = shape_of(config.model, options.model_config)
    try:
        model = dry_run_of(config, hf_config)
    except (ValueError, OSError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model.name {config.model.name}: no reward model can be built from its config: {reason}"
        ) from None
    data = size_of_data(config, prepare, options.pairs, options.tokens_a_pair, options.sharing)
    runtime_bytes = _resident_bytes() if options.gpu == "cpu" else 0.0  # before the measurement of a CPU allocates
    machine = _machine(config, options, model.sizes)

    if options.mfu:
        mfu, mfu_from = options.mfu, "--mfu"
    elif machine.is_cpu:
        mfu, mfu_from = CPU_MFU, "of the measured rate"
    else:
        mfu, mfu_from = GPU_MFU, f"assumed; {MFU_SOURCE}"
    hosts = options.nodes or (1 if machine.is_cpu else -(-options.gpus // GPUS_PER_HOST))
    if options.gpus % hosts:
        raise UserError(f"--gpus {options.gpus} do not divide into {hosts} hosts of {GPUS_PER_HOST}: give --nodes")
    setting = Setting(machine, options.gpus, hosts, mfu)
    best, strategies = cheapest(config, model, data, setting)
    strategy = config.parallel.strategy
    configured = next((one for one in strategies if one.strategy == strategy), None)
    counts = (options.gpus,) if machine.is_cpu else [count for count in GPU_COUNTS if count % context == 0]
    settings = [Setting(machine, count, max(1, count // GPUS_PER_HOST), mfu) for count in counts]
    return RunEstimate(
        config=config,
        sizes=model.sizes,
        shape_from=shape_from,
        data=data,
        setting=setting,
        mfu_from=mfu_from,
        precision_lines=precision_lines,
        flops_a_pair=flops_of_pair(model, data),
        steps=steps_of_run(config, data),
        checkpoint_bytes=checkpoint_bytes(config, trained_sizes(config, model).trained),
        checkpoints=config.run.keep + config.run.kept_best + 1,
        runtime_bytes=runtime_bytes,
        saves_from_copy=config.run.background_save and (config.run.save_every or config.run.save_minutes) is not None,
        configured=configured or estimate(config, model, data, setting, strategy),
        cheapest=best,
        strategies=strategies,
        by_gpus=[cheapest(config, model, data, one)[0] for one in settings],
    )


def _machine(config: Config, options: argparse.Namespace, sizes: Sizes) -> Machine:
    """The machine of --gpu and --rate. The rates of a CPU are measured now, on a product of the model's size."""
    rate = None if options.rate is None else 1e12 * options.rate
    if options.gpu != "cpu":
        return gpu(options.gpu, rate)
    # A layer has about three equal products of width x inner elements.
    inner = round(sizes.products / max(1, sizes.layers - 1) / 3 / sizes.width)
    rate = rate or matrix_rate(config.parallel.precision, (CPU_PRODUCT_TOKENS, sizes.width, inner))
    return cpu(rate, copy_rate())


def _resident_bytes() -> float:
    """Resident memory of this process. It has imported what a run imports and read its data, and holds no model: a rank
    on a CPU takes as much.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024.0 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # outside Linux only the peak is known
    return float(peak if sys.platform == "darwin" else 1024 * peak)
