"""A config in, everything a run needs out: data, plan, model, strategy, tracker.

Enters: a `Config` and this process's `World`. Leaves: a `Run`. The order is the cheapest first, so that a mistake is
told before it costs: tokenizer, data, model, self-test, strategy. Whatever fails on one rank fails on all of them
alike.

Example: hh.yaml on 8 GPUs -> 43,000 comparisons as token arrays from the cache, a plan of 168 steps of 256 pairs,
Pythia 2.8b sharded by ZeRO-2, "attention shared: rewards equal the plain forward's to 3.1e-03" (bf16).
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from rmcore import ops
from rmcore.checkpoint.resume import Start, restore
from rmcore.config import UserError
from rmcore.config.schema import Config
from rmcore.cost.memory import choose_budget
from rmcore.data.batches.counting import counted_N, size_N
from rmcore.data.batches.step_plan import Plan, work
from rmcore.data.inspection.first_example import show_first_example
from rmcore.data.prepare import PreparedData, describe
from rmcore.data.tokens.comparisons import TokenizedComparisons, computed_tokens
from rmcore.model.backbone import recompute_activations
from rmcore.model.fp8 import check_fp8, use_fp8
from rmcore.model.reward_model import SHARED, RewardModel
from rmcore.model.selftest import choose_path, trial_comparisons
from rmcore.parallel.world import World, broadcast_json, first_error
from rmcore.training.loading import load, parallelise, to_train
from rmcore.training.outcome import TOO_MUCH
from rmcore.training.run import Run
from rmcore.training.run_data import prepared


def assemble(config: Config, world: World, start: Start | None = None) -> Run:
    """Raises UserError, on all ranks alike, for anything in config, data or model files that cannot be trained."""
    start = start or Start()
    if config.parallel.fp8:
        first_error(world, "looking for FP8", lambda: check_fp8(world.device))
    tokenizer, data = first_error(world, "preparing the data", lambda: _data(config, start))
    loaded = load(config, world, tokenizer, start)
    tested = loaded.model
    path, line = first_error(world, "the self-test", partial(self_test, config, tested, data.train))
    if path != broadcast_json(world, path):
        raise UserError(f"rank {world.rank} computes by {path}, rank 0 does not: set model.attention={path} for all")
    share = path == SHARED

    parameters = sum(p.numel() for p in tested.parameters())
    trained = sum(p.numel() for p in tested.parameters() if p.requires_grad)
    tokens_N = computed_tokens(data.train, share)
    longest = max(int(tokens_N.max()), int(computed_tokens(data.eval, share).max()) if data.eval else 0)
    ranks = world.local_size if config.parallel.strategy == "hsdp" else world.size
    units = size_N(data.train, config.loss.traits.counts)
    share_of_step = float(tokens_N.sum()) / max(1, int(units.sum())) * config.batch.pairs / world.size
    memory = choose_budget(config, loaded.hf_config, longest, world.device, ranks, share_of_step)
    budget = token_budget(config, memory.tokens)
    plan = first_error(world, "planning", lambda: make_plan(config, data.train, tokens_N, budget, world))
    loaded = to_train(loaded, config)
    del tested  # its wrapping holds memory
    recompute_activations(loaded.model.backbone, memory.recompute)
    converted = use_fp8(loaded.model.backbone) if config.parallel.fp8 else 0
    strategy = parallelise(loaded, config, world)
    restore(start, strategy, world)
    lines = (
        describe(data, config),
        f"{loaded.model_class.__name__}, {parameters:,} parameters, {trained:,} of them trained; {line}",
        *([loaded.line] if loaded.line else []),
        ops.describe(),
        *_remote_code(config),
        f"{plan.steps} steps of {config.batch.pairs} {config.loss.traits.unit} on {world.size} x {world.device.type}, "
        f"{config.parallel.strategy}, {config.parallel.precision}, micro batches of at most {budget:,} tokens, "
        f"recompute {memory.recompute}" + (f", {converted} linear layers in FP8" if converted else ""),
    )
    return Run(
        config, world, tokenizer, data, plan, strategy, loaded.model_class, loaded.hf_config, budget, share,
        start, lines, loaded.adapted, loaded.base,
    )  # fmt: skip


def _remote_code(config: Config) -> list[str]:
    """A loud word where the model's own code runs here."""
    if not config.model.trust_remote_code:
        return []
    pinned = f"at revision {config.model.revision}" if config.model.revision else "NOT pinned: set model.revision"
    return [f"warning: model.trust_remote_code is on: code that comes with {config.model.name} runs here ({pinned})"]


def _data(config: Config, start: Start) -> tuple[PreTrainedTokenizerFast, PreparedData]:
    tokenizer, data = prepared(config)
    start.check_data(config, data.train.fingerprint)
    return tokenizer, data


def self_test(config: Config, model: RewardModel, data: TokenizedComparisons) -> tuple[str, str]:
    """The exact path of this model on these data; half precision is tried only where kernels exist for it alone."""
    device = next(model.parameters()).device
    half = None
    if device.type == "cuda" and config.parallel.precision == "bf16":
        half = torch.autocast("cuda", dtype=torch.bfloat16)
    return choose_path(model, data, trial_comparisons(computed_tokens(data, share=True)), config.model.attention, half)


def make_plan(
    config: Config, data: TokenizedComparisons, tokens_N: np.ndarray, token_budget: int, world: World
) -> Plan:
    """The steps of the run. Raises UserError when a comparison exceeds the token budget that the config sets."""
    if (longest := int(tokens_N.max())) > token_budget:
        raise UserError(
            f"batch.tokens={token_budget} is less than the longest comparison ({longest} tokens), which is never cut: "
            f"set batch.tokens to {longest} or more, or lower data.max_tokens"
        )
    return Plan(
        tokens_N,
        work(tokens_N),
        size_N(data, config.loss.traits.counts),
        counted_N(data, config.loss.traits.counts),
        pairs_per_step=config.batch.pairs,
        token_budget=token_budget,
        world_size=world.size,
        seed=config.run.seed,
        epochs=config.run.epochs,
        shuffle=config.data.shuffle,
        max_steps=config.run.max_steps,
    )


def introduce(run: Run) -> None:
    """Before the first step, on rank 0: what was found in data and model, and the first comparison, token by token."""
    console = Console(quiet=not run.world.is_main, highlight=False)
    for line in (*run.start.lines, *run.lines):
        console.print(line, markup=False, soft_wrap=True)
    show_first_example(run.data.train.comparison(run.plan.first()), run.tokenizer, console)


def token_budget(config: Config, tokens: int) -> int:
    """`tokens`, or with batch.shrink at most 3/4 of what an earlier attempt at this run had no memory for."""
    path = Path(config.run.dir) / TOO_MUCH
    if not config.batch.shrink or not path.exists():
        return tokens
    return min(tokens, json.loads(path.read_text(encoding="utf-8"))["tokens"] * 3 // 4)
