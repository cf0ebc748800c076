"""Estimates memory, time and communication of a run under one strategy; finds the cheapest strategy that fits.

Input: a config, a `DryRun` of the model, the `DataSize`, and a `Setting` (machine, GPUs, hosts, assumed MFU).
Output: `Estimate`s.
Example: Pythia 2.8b on 8 H100s, 256 pairs of 227 tokens per step: 863 TFLOP, 0.27 s at an MFU of 0.4.

The seconds of a step are the sum of three terms:
1. compute: FLOPs (rmcore.cost.flops) / (GPUs * peak * MFU), divided by the share of time in which ranks are busy. On a
   CPU, products do not hide the memory traffic of elementwise work: 4 bytes per byte of kept activations are added;
2. exposed communication: what the forward (a third of the compute) or the backward does not hide;
3. the update, clipping and AdamW: the memory traffic of the parameters that the rank updates (rmcore.cost.formats).
"""

import math
from dataclasses import dataclass

import numpy as np

from rmcore.config import Config
from rmcore.config.parallel import TRAITS
from rmcore.cost.communication import BACKWARD, FORWARD, Collective, collectives, exchange
from rmcore.cost.data_size import DataSize
from rmcore.cost.dry_run import DryRun
from rmcore.cost.flops import flops_of_pair, recompute_share
from rmcore.cost.formats import stored
from rmcore.cost.machines import Machine
from rmcore.cost.memory import (
    MOST_TOKENS,
    RESERVE,
    Memory,
    cpu_budget,
    gpu_budget,
    largest_budget,
    memory_of_step,
    token_bytes,
    trained_sizes,
)

SAMPLED_STEPS = 8  # steps of the run from which the balance of ranks is measured
# Bytes of memory traffic per byte of kept activations on a CPU: the activation and its gradient are each written and
# read.
ACTIVATION_TRAFFIC = 4.0
AS_GOOD = 1.02  # prefer a simpler strategy if its step is at most 2 % slower


@dataclass(frozen=True)
class Setting:
    """`gpus` ranks on `hosts`. `mfu`: the share of the peak that the FLOPs are assumed to reach."""

    machine: Machine
    gpus: int
    hosts: int
    mfu: float


@dataclass(frozen=True)
class Estimate:
    """One strategy on one setting, per rank."""

    strategy: str
    recompute: str
    gpus: int
    hosts: int
    tokens: int  # budget of a micro batch
    most_tokens: int | None  # the largest budget that fits; None on a CPU
    micro_batches: int  # of a step
    memory: Memory
    room: float  # bytes of the device's memory; 0 on a CPU
    fits: bool | None  # None where the device's memory is unknown
    idle: float  # share of the time in which ranks wait for the busiest
    compute_seconds: float
    exposed_seconds: float  # of communication that no computation hides
    optimizer_seconds: float
    transfers: tuple[Collective, ...]
    counted: bool  # activations by a dry run; False: by the rule of thumb

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.exposed_seconds + self.optimizer_seconds

    @property
    def hidden(self) -> bool:
        """Whether computation hides all communication."""
        return self.exposed_seconds == 0.0


def estimate(config: Config, model: DryRun, data: DataSize, setting: Setting, strategy: str) -> Estimate:
    """The run of `config` under `strategy`, with the recompute and the token budget that the run would choose."""
    parallel = config.parallel.model_copy(update={"strategy": strategy})
    config = config.model_copy(update={"parallel": parallel})
    machine = setting.machine
    ranks = setting.gpus // setting.hosts if parallel.traits.by_host else setting.gpus
    step_tokens = data.tokens * config.batch.pairs / setting.gpus  # mean of a rank

    sizes = trained_sizes(config, model)

    # The micro batch: its budget, and how the pairs of a step are divided into ranks and micro batches.
    if machine.is_cpu:
        budget = cpu_budget(config, data.longest)
        per_token = token_bytes(config, model, budget.recompute, cuda=False)
        most_tokens = None
    else:
        budget = gpu_budget(config, model, data.longest, machine.memory, ranks, step_tokens, keys=data.keys)
        per_token = token_bytes(config, model, budget.recompute, keys=data.keys)
        most_tokens = largest_budget(config, sizes, per_token, machine.memory, ranks, step_tokens)
    micro_batches, idle, largest = _balance(config, data, setting, budget.tokens)

    memory = memory_of_step(
        config,
        sizes,
        per_token,
        tokens=largest,
        ranks=ranks,
        deferred=micro_batches > 1,
        gloo=machine.is_cpu,
    )

    # Time: compute, exposed communication, update.
    flops = flops_of_pair(model, data) * config.batch.pairs * (1 + recompute_share(budget.recompute, model, data))
    compute = flops / setting.gpus / (machine.peak(parallel.precision) * setting.mfu) / (1 - idle)
    if machine.is_cpu and machine.memory_rate:
        compute += ACTIVATION_TRAFFIC * per_token.kept * step_tokens / machine.memory_rate / (1 - idle)
    context, passes = parallel.context, 2 if budget.recompute == "none" else 3
    sent = collectives(config, sizes, setting.gpus, setting.hosts, micro_batches, passes)
    local = setting.gpus // setting.hosts
    sent += exchange(sizes, parallel.precision, step_tokens, context, local, passes)
    own = sizes.trained / (ranks if parallel.traits.shards_optimizer else 1)
    update = own * stored(config, sizes).update  # bytes of memory traffic

    return Estimate(
        strategy=strategy,
        recompute=budget.recompute,
        gpus=setting.gpus,
        hosts=setting.hosts,
        tokens=budget.tokens,
        most_tokens=most_tokens,
        micro_batches=micro_batches,
        memory=memory,
        room=machine.memory,
        fits=memory.total <= RESERVE * machine.memory if machine.memory else None,
        idle=idle,
        compute_seconds=compute,
        exposed_seconds=_exposed(sent, machine, compute / micro_batches, budget.recompute),
        optimizer_seconds=update / machine.memory_rate if machine.memory_rate else 0.0,
        transfers=tuple(sent),
        counted=per_token.counted,
    )


def _exposed(sent: list[Collective], machine: Machine, compute: float, recompute: str) -> float:
    """Seconds of a step's communication that no computation hides.

    compute: seconds of one micro batch, forward and backward. A collective that runs once in a step does so in a micro
    batch in which the repeated ones run as well.
    """
    forward = compute / (4 if recompute in ("full", "offload") else 3)
    windows = {FORWARD: forward, BACKWARD: compute - forward}
    exposed = sum(one.seconds(machine) * one.times for one in sent if one.behind not in windows)
    for behind, window in windows.items():
        here = [one for one in sent if one.behind == behind]
        repeated = sum(one.seconds(machine) for one in here if one.times > 1)
        once = sum(one.seconds(machine) for one in here if one.times == 1)
        times = max([one.times for one in here], default=1)
        exposed += max(0.0, repeated + once - window) + (times - 1) * max(0.0, repeated - window)
    return exposed


def _balance(config: Config, data: DataSize, setting: Setting, budget: int) -> tuple[int, float, int]:
    """(micro batches of a step on each rank, idle share, tokens of the largest micro batch).

    Where the rows are known, they come from SAMPLED_STEPS steps of the run's own plan; else from the means. The ranks
    of a context group count as one.
    """
    groups = setting.gpus // config.parallel.context
    if data.rows is None:
        pairs = math.ceil(config.batch.pairs / groups)  # of the busiest group
        micro_batches = max(1, math.ceil(pairs * data.tokens / budget))
        largest = min(budget, max(data.longest, math.ceil(pairs / micro_batches) * data.tokens))
        return micro_batches, 1 - config.batch.pairs / groups / pairs, math.ceil(largest)
    plan = data.rows.plan(config, groups, budget)
    micro_batches, busiest, mean, largest = 0, 0.0, 0.0, 0.0
    sampled = np.unique(np.linspace(0, plan.steps - 1, min(SAMPLED_STEPS, plan.steps)).astype(int))
    for index in sampled:
        ranks = plan.step(int(index)).ranks
        cost = [sum(float(plan.cost_N[numbers].sum()) for numbers in rank) for rank in ranks]
        busiest, mean = busiest + max(cost), mean + sum(cost) / len(cost)
        micro_batches = max(micro_batches, len(ranks[0]))
        largest = max([largest, *(float(data.rows.tokens_N[numbers].sum()) for rank in ranks for numbers in rank)])
    return micro_batches, 1 - mean / busiest, int(largest)


def cheapest(config: Config, model: DryRun, data: DataSize, setting: Setting) -> tuple[Estimate, list[Estimate]]:
    """The strategy with the shortest step among those that fit, and the estimates of all strategies.

    Of nearly equal ones (AS_GOOD) it is the simplest. Where no strategy fits, it is the one that needs least memory.
    """
    names = [name for name, traits in TRAITS.items() if setting.hosts > 1 or not traits.by_host]
    if setting.gpus == 1:
        names = ["ddp"]
    every = [estimate(config, model, data, setting, name) for name in names]
    fitting = [one for one in every if one.fits is not False]
    if not fitting:
        return min(every, key=lambda one: one.memory.total), every
    if not setting.machine.within:  # without the rates of the links, communication cannot be compared
        return fitting[0], every
    least = min(one.step_seconds for one in fitting)
    return next(one for one in fitting if one.step_seconds <= AS_GOOD * least), every


def steps_of_run(config: Config, data: DataSize) -> int | None:
    """Steps of the run; None where the number of pairs is unknown."""
    if data.rows is not None:
        return data.rows.plan(config, 1, max(data.longest, MOST_TOKENS)).steps
    if data.pairs is None:
        return config.run.max_steps
    steps = config.run.epochs * math.ceil(data.pairs / config.batch.pairs)
    return min(steps, config.run.max_steps or steps)
