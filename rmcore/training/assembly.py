"""Builds everything that a run needs: data, model, plan, strategy.

Input: a `Config` and this process's `World`.
Output: a `Run`.
Example: hh.yaml on 8 GPUs -> 43,000 comparisons as token arrays from the cache, a plan of 168 steps of 256 pairs,
Pythia 2.8b sharded by ZeRO-2, "attention shared: rewards equal the plain forward's to 3.1e-03" (bf16).

The cheapest parts come first, so that a mistake is found early. A failure on one rank is raised on all ranks.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from rmcore import ops
from rmcore.checkpoint.resume import Start, restore
from rmcore.config.schema import Config
from rmcore.cost.data_size import measured_size
from rmcore.cost.dry_run import DryRun
from rmcore.cost.flops import flops_of_pair
from rmcore.cost.machines import device_peak_flops
from rmcore.cost.memory import Budget, Rectangle, choose_budget, keys_per_token
from rmcore.data.batches.counting import sizes_of
from rmcore.data.batches.step_plan import Plan
from rmcore.data.inspection.first_example import show_first_example
from rmcore.data.prepare import PreparedData, describe
from rmcore.data.tokens.comparisons import TokenizedComparisons, computed_tokens
from rmcore.evaluation.criterion import Criterion, check_best_metric
from rmcore.evaluation.own_metrics import check_functions
from rmcore.evaluation.trained import on_one_day
from rmcore.host.terminal import visible
from rmcore.model.compiled import speed_up
from rmcore.model.fp8 import check_fp8, use_fp8
from rmcore.model.long_rope import check_split
from rmcore.model.lora import count_weights
from rmcore.model.reward_model import ALONE, PADDED, SHARED, RewardModel
from rmcore.model.selftest import choose_path, skips_weights, trial_comparisons
from rmcore.ops.blockwise import check_bitsandbytes
from rmcore.parallel.context import context_group, with_context
from rmcore.parallel.make import make_strategy
from rmcore.parallel.precision import bf16_of_all, with_precision
from rmcore.parallel.world import World, first_error, use_deterministic_algorithms
from rmcore.training.agreement import agree, check_same_plan, plan_facts
from rmcore.training.loading import ShardedModel, load
from rmcore.training.outcome import OUT_OF_MEMORY_FILE
from rmcore.training.run import Run
from rmcore.training.run_data import prepared


def assemble(config: Config, world: World, start: Start | None = None) -> Run:
    """Raises UserError, on all ranks, for anything in config, data or model files that cannot be trained."""
    start = start or Start()
    if config.parallel.deterministic:
        use_deterministic_algorithms(world)
    world = with_context(world, config.parallel.context)
    first_error(world, "looking at run.best_metric", lambda: Criterion.of(config))  # before the data, which take long
    first_error(world, "importing functions", lambda: check_functions(config))
    stored = start.manifest.config["parallel"].get("precision") if start.manifest else None
    config, precision_lines = with_precision(config, bf16_of_all(world), stored)
    if config.parallel.fp8:
        first_error(world, "looking for FP8", lambda: check_fp8(world.device))
    if config.optim.states == "int8":
        first_error(world, "looking for bitsandbytes", lambda: check_bitsandbytes("optim.states=int8"))
    day = start.manifest.config["data"].get("date") if start.manifest else None
    dated = on_one_day(config, world, day)
    tokenizer, data = first_error(world, "preparing the data", lambda: _data(dated, start))
    if data.template.date is not None:  # the run, its checkpoints and a resumed run keep the date
        config = dated

    # The model is loaded, or built in parts. The self-test finds the fastest path that is exact for it.
    loaded = load(config, world, tokenizer, start)
    loaded.tested.context = context_group(world)
    parameters = count_weights(loaded.tested)
    trained = sum(p.numel() for p in loaded.tested.parameters() if p.requires_grad)
    path, self_test_line = first_error(
        world, "the self-test", partial(self_test, config, loaded.tested, data.train, world.device)
    )
    share = path == SHARED

    # All ranks train by one plan.
    tokens_N = computed_tokens(data.train, share)
    budget = agree(world, _own_budget(config, loaded.hf_config, data, tokens_N, loaded.tested, world))
    check_same_plan(world, plan_facts(config, data, budget, path))
    plan_of = partial(Plan.of, config, data.train, tokens_N, token_budget=budget.tokens, world_size=world.groups)
    plan = first_error(world, "planning", plan_of)
    start.check_steps(plan.steps)

    # The strategy wraps the model, and a checkpoint fills it.
    model = loaded.to_train()
    speed_up(model.backbone, recompute=budget.recompute, compiled=config.parallel.compile)
    converted = use_fp8(model.backbone) if config.parallel.fp8 else 0
    strategy = make_strategy(config, model, world, loaded.shards)
    restore(start, strategy, world)

    lines = (
        describe(data, config),
        f"{loaded.model_class.__name__}, {parameters:,} parameters, {trained:,} of them trained; {self_test_line}",
        *loaded.notes,
        ops.describe(),
        *precision_lines,
        *_remote_code(config),
        *untrained_outputs(config),
        f"{plan.steps} steps of {config.batch.pairs} {config.unit} on {world.size} x {world.device.type}, "
        f"{config.parallel.strategy}, {config.parallel.precision}, micro batches of at most {budget.tokens:,} tokens, "
        f"recompute {budget.recompute}"
        + (f", each row over {world.context} ranks" if world.context > 1 else "")
        + (f", {converted} linear layers in FP8" if converted else ""),
    )
    return Run(
        config=config,
        world=world,
        tokenizer=tokenizer,
        data=data,
        plan=plan,
        strategy=strategy,
        model_class=loaded.model_class,
        hf_config=loaded.hf_config,
        token_budget=budget.tokens,
        share=share,
        flops_per_token=flops_per_token(config, loaded.hf_config, data, share, world.device),
        start=start,
        lines=lines,
        adapted=loaded.adapted,
        base=loaded.base,
        base_weights=loaded.base_weights,
        in_parts=isinstance(loaded, ShardedModel),
        towers=loaded.towers,
    )


def self_test(config: Config, model: RewardModel, data: TokenizedComparisons, device: torch.device) -> tuple[str, str]:
    """The fastest exact path of this model on these data, and a line about it.

    On a GPU half precision is tried too, because some kernels exist only for it.
    """
    half = None
    if device.type == "cuda" and config.parallel.bf16:
        half = torch.autocast("cuda", dtype=torch.bfloat16)
    if model.context is not None:
        check_split(model.backbone, config.data.max_tokens)
    numbers = trial_comparisons(computed_tokens(data, share=True))
    found = choose_path(model, data, numbers, device, config.model.attention, half, gradients=True)
    if not config.parallel.traits.shards_weights:  # FSDP2 reduces the gradients that there are
        model.skips_weights = skips_weights(model, data, device)
    return found


def flops_per_token(
    config: Config, hf_config: PretrainedConfig, data: PreparedData, share: bool, device: torch.device
) -> float | None:
    """Training FLOPs per computed token, for the model FLOPs utilisation (`mfu`), or None where it is not logged.

    It is logged on devices whose peak is known. It is not logged with LoRA, which computes no gradients of frozen
    weights; nor with loss.sft and loss.router_aux, which run the last layer, and sft a large head, on all tokens.
    """
    if device_peak_flops(device) is None or config.model.lora.rank is not None:
        return None
    if config.loss.sft or config.loss.router_aux:
        return None
    size = measured_size(data.train, data.evals.values(), share=share, config=config)
    return flops_of_pair(DryRun(hf_config, trust_remote_code=config.model.trust_remote_code), size) / size.tokens


def introduce(run: Run, *more: str) -> None:
    """Before the first step, on rank 0: print the facts about the run, and the first comparison token by token."""
    console = Console(quiet=not run.world.is_main, highlight=False)
    for line in (*run.start.lines, *run.lines, *more):
        console.print(visible(line), markup=False, soft_wrap=True)
    show_first_example(run.data.train.comparison(run.plan.first()), run.tokenizer, console)


def _data(config: Config, start: Start) -> tuple[PreTrainedTokenizerFast, PreparedData]:
    tokenizer, data = prepared(config)
    start.check_data(config, data.train.fingerprint)
    check_best_metric(config, data)
    return tokenizer, data


def _own_budget(
    config: Config,
    hf_config: PretrainedConfig,
    data: PreparedData,
    tokens_N: np.ndarray,
    model: RewardModel,
    world: World,
) -> Budget:
    """The token budget and the recompute that suit this rank's memory.

    After a run that ended out of memory, batch.shrink limits the budget to 3/4 of the tokens that did not fit.
    """
    evals = (computed_tokens(e, model.path == SHARED) for e in data.evals.values())
    longest = max(int(tokens.max()) for tokens in (tokens_N, *evals))
    units = sizes_of(config, data.train)
    tokens_of_step = float(tokens_N.sum()) / max(1, int(units.sum())) * config.batch.pairs / world.size
    ranks = world.local_size if config.parallel.traits.by_host else world.size  # that share one state
    rectangle = None
    if model.masked or model.path in (PADDED, ALONE):
        rows = tokens_N if model.masked else data.train.text_length_A
        rectangle = Rectangle.of(rows, padded=model.path != ALONE)
    keys = keys_per_token(config, tokens_N, data.train.logical_tokens_N, longest)
    own = choose_budget(config, hf_config, longest, world.device, ranks, tokens_of_step, rectangle, keys)
    path = Path(config.run.dir) / OUT_OF_MEMORY_FILE
    if not config.batch.shrink or not path.exists():
        return own
    return Budget(min(own.tokens, json.loads(path.read_text(encoding="utf-8"))["tokens"] * 3 // 4), own.recompute)


def untrained_outputs(config: Config) -> list[str]:
    """A warning if the head has outputs that no loss trains; the reward does not read them."""
    if not config.untrained:
        return []
    return [
        f"warning: model.outputs has {', '.join(config.untrained)}, which no loss trains: exported as drawn at random, "
        "of use only to a later training with model.head=stored"
    ]


def _remote_code(config: Config) -> list[str]:
    """A warning if the model's own code runs here."""
    if not config.model.trust_remote_code:
        return []
    pinned = f"at revision {config.model.revision}" if config.model.revision else "NOT pinned: set model.revision"
    return [f"warning: model.trust_remote_code is on: code that comes with {config.model.name} runs here ({pinned})"]
