"""What a run takes under one strategy on one number of GPUs: memory, time, communication; and the cheapest that fits.

Enters: a config, a `DryRun` of the model, `DataFigures`, a `Setting` (GPUs, hosts, the machine, the assumed MFU).
Leaves: `Estimate`s. Example: Pythia 2.8b on 8 H100s, 256 pairs of 227 tokens a step: 863 TFLOP, 0.27 s at MFU 0.4.

FLOPs of training a token, forward and backward: 6 a matrix element that it meets (Kaplan et al., arXiv 2001.08361,
section 2.1) and 12 a pair of tokens that see each other, a layer and a unit of width; the last layer computes keys and
values for every token, the rest for the scored ones only. Recompute adds a forward (full) or attention's (selective).
A step takes FLOPs / (GPUs * peak * MFU), stretched by the idle share, then what communication does not hide behind the
forward (a third of the time) or the backward, then clipping and AdamW: 40 bytes a parameter of its own.
On a CPU elementwise work does not hide behind products: 4 bytes of memory are added for each byte of kept activations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rmcore.config import Config
from rmcore.config.parallel import TRAITS
from rmcore.cost.communication import BACKWARD, FORWARD, Transfer, transfers
from rmcore.cost.data_size import DataFigures
from rmcore.cost.dry_run import DryRun
from rmcore.cost.flops import extra_of, flops_of_pair
from rmcore.cost.machines import Machine
from rmcore.cost.memory import (
    CPU_TOKENS,
    MOST_TOKENS,
    RESERVE,
    Memory,
    arithmetic_of,
    fit_in,
    memory,
    most_tokens,
)

SAMPLED_STEPS = 8
# Bytes of memory a parameter in the step's end: AdamW reads and writes weight and averages and reads the gradient (28);
# the norm reads it too (4), clipping reads and writes it (8).
UPDATE_BYTES = 40.0
# Bytes of memory a byte of kept activations, where products do not hide it (a CPU): it is written and read, and so is
# its gradient.
ACTIVATION_TRAFFIC = 4.0
AS_GOOD = 1.02  # a simpler strategy is taken when it costs at most this much more


@dataclass(frozen=True)
class Setting:
    """`gpus` ranks on `hosts`; `mfu`: the share of the peak that the model's FLOPs are assumed to reach."""

    machine: Machine
    gpus: int
    hosts: int
    mfu: float


@dataclass(frozen=True)
class Estimate:
    """One strategy on one setting. Seconds are None where no rate is known; `fits` where no memory is."""

    strategy: str
    recompute: str
    gpus: int
    hosts: int
    tokens: int  # budget of a micro batch
    most_tokens: int | None  # the largest budget that fits
    micro_batches: int
    memory: Memory
    room: float
    fits: bool | None
    idle: float  # share of the ranks' time in which they wait for the busiest
    compute_seconds: float
    exposed_seconds: float
    optimizer_seconds: float
    transfers: tuple[Transfer, ...]
    counted: bool

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.exposed_seconds + self.optimizer_seconds

    @property
    def hidden(self) -> bool:
        """Whether all communication that can hide behind compute does."""
        return self.exposed_seconds == 0.0


def estimate(config: Config, model: DryRun, data: DataFigures, setting: Setting, strategy: str) -> Estimate:
    """The run of `config` under `strategy`, with the recompute and the token budget that it would choose itself."""
    parallel = config.parallel.model_copy(update={"strategy": strategy})
    config = config.model_copy(update={"parallel": parallel})
    ranks = setting.gpus // setting.hosts if parallel.traits.by_host else setting.gpus
    share = data.tokens * config.batch.pairs / setting.gpus
    arithmetic, machine = arithmetic_of(parallel), setting.machine
    if machine.is_cpu:
        tokens = max(data.longest, CPU_TOKENS) if config.batch.tokens == "auto" else config.batch.tokens
        recompute = parallel.recompute.replace("auto", "none")
        per_token, most = model.token_bytes(arithmetic, recompute, cuda=False), None
    else:
        chosen = fit_in(config, model, data.longest, machine.memory, ranks, share)
        tokens, recompute = chosen.tokens, chosen.recompute
        per_token = model.token_bytes(arithmetic, recompute)
        most = most_tokens(parallel, model.sizes, per_token, machine.memory, ranks, share)
    micro_batches, idle, largest = _balance(config, data, setting, tokens)
    parts = memory(parallel, model.sizes, per_token, tokens=largest, ranks=ranks, deferred=micro_batches > 1,
                   gloo=machine.is_cpu)  # fmt: skip
    flops = flops_of_pair(model, data) * config.batch.pairs * (1 + extra_of(recompute, model, data))
    compute = flops / setting.gpus / (machine.peak(parallel.precision) * setting.mfu) / (1 - idle)
    if machine.is_cpu and machine.memory_rate:
        compute += ACTIVATION_TRAFFIC * per_token.kept * share / machine.memory_rate / (1 - idle)
    sent = transfers(strategy, parallel.precision, model.sizes, setting.gpus, setting.hosts, micro_batches)
    own = model.sizes.total / (ranks if parallel.traits.shards_optimizer else 1)
    return Estimate(
        strategy, recompute, setting.gpus, setting.hosts, tokens, most, micro_batches, parts, machine.memory,
        parts.total <= RESERVE * machine.memory if machine.memory else None,
        idle, compute, _exposed(sent, machine, compute / micro_batches, recompute),
        UPDATE_BYTES * own / machine.memory_rate if machine.memory_rate else 0.0,
        tuple(sent), per_token.counted,
    )  # fmt: skip


def _exposed(sent: list[Transfer], machine: Machine, compute: float, recompute: str) -> float:
    """Seconds of a step's communication that nothing hides. `compute`: of one micro batch, forward and backward."""
    forward = compute / (4 if recompute == "full" else 3)
    windows = {FORWARD: forward, BACKWARD: compute - forward}
    exposed = sum(t.seconds(machine) * t.times for t in sent if t.behind not in windows)
    for behind, window in windows.items():
        every = sum(t.seconds(machine) for t in sent if t.behind == behind and t.times > 1)
        once = sum(t.seconds(machine) for t in sent if t.behind == behind and t.times == 1)
        repeats = max([t.times for t in sent if t.behind == behind], default=1)
        exposed += max(0.0, every + once - window) + (repeats - 1) * max(0.0, every - window)
    return exposed


def _balance(config: Config, data: DataFigures, setting: Setting, budget: int) -> tuple[int, float, int]:
    """(micro batches a step on each rank, idle share, tokens of the largest micro batch), from the run's own plan where
    the rows are known, for SAMPLED_STEPS of its steps; else from the means.
    """
    if data.rows is None:
        share = math.ceil(config.batch.pairs / setting.gpus)  # pairs of the busiest rank
        micro_batches = max(1, math.ceil(share * data.tokens / budget))
        largest = min(budget, max(data.longest, math.ceil(share / micro_batches) * data.tokens))
        return micro_batches, 1 - config.batch.pairs / setting.gpus / share, math.ceil(largest)
    plan = data.rows.plan(config, setting.gpus, budget)
    counts, busiest, mean, largest = 0, 0.0, 0.0, 0.0
    sampled = np.unique(np.linspace(0, plan.steps - 1, min(SAMPLED_STEPS, plan.steps)).astype(int))
    for index in sampled:
        ranks = plan.step(int(index)).ranks
        cost = [sum(float(data.rows.cost_N[numbers].sum()) for numbers in rank) for rank in ranks]
        busiest, mean = busiest + max(cost), mean + sum(cost) / len(cost)
        counts = max(counts, len(ranks[0]))
        largest = max([largest, *(float(data.rows.tokens_N[numbers].sum()) for rank in ranks for numbers in rank)])
    return counts, 1 - mean / busiest, int(largest)


def cheapest(config: Config, model: DryRun, data: DataFigures, setting: Setting) -> tuple[Estimate, list[Estimate]]:
    """The strategy with the shortest step among those that fit (of nearly equal ones the simplest), and all of them.

    Where nothing fits it is the one that needs least memory; `fits` says so.
    """
    names = [name for name, traits in TRAITS.items() if setting.hosts > 1 or not traits.by_host]
    if setting.gpus == 1:
        names = names[:1]  # there is nothing to share
    found = [estimate(config, model, data, setting, name) for name in names]
    fitting = [one for one in found if one.fits is not False]
    if not fitting:
        return min(found, key=lambda one: one.memory.total), found
    if not setting.machine.within:  # no rate of any link: what a strategy sends cannot be weighed
        return fitting[0], found
    least = min(one.step_seconds for one in fitting)
    return next(one for one in fitting if one.step_seconds <= AS_GOOD * least), found


def steps_of(config: Config, data: DataFigures) -> int | None:
    """Steps of the run, None where the number of pairs is not known."""
    if data.rows is not None:
        return data.rows.plan(config, 1, max(data.longest, MOST_TOKENS)).steps
    if data.pairs is None:
        return config.run.max_steps
    steps = config.run.epochs * math.ceil(data.pairs / config.batch.pairs)
    return min(steps, config.run.max_steps or steps)
