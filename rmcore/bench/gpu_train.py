"""Runs training steps of a model with random weights on rows of given lengths: by rmcore's loop, and padded.

Input: a reward model, rows, a number of steps of `pairs` pairs.
Output: pairs per second, computed and logical tokens per second, MFU, peak memory. Both ways: bf16 autocast over fp32
weights, fused AdamW, clipping at 1.0, gradients summed over micro batches.
Example: 8 steps of 64 pairs of HH lengths, about 200 computed tokens per pair: 102,400 tokens.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmcore.config.schema import Config
from rmcore.cost.dry_run import DryRun
from rmcore.cost.flops import model_flops_per_token
from rmcore.cost.machines import PEAK_FLOPS
from rmcore.cost.memory import choose_budget, keys_per_token, memory_of_step, token_bytes
from rmcore.data.batches.loader import Loader
from rmcore.data.batches.step_plan import Plan, work
from rmcore.data.tokens.comparisons import EncodedRow, TokenizedComparisons
from rmcore.data.tokens.limits import LengthLimits, in_memory
from rmcore.model.backbone import recompute_activations
from rmcore.model.compiled import speed_up
from rmcore.model.fp8 import use_fp8
from rmcore.model.reward_model import SHARED, RewardModel
from rmcore.parallel.make import make_strategy
from rmcore.parallel.world import World

WARM = 2  # first steps, which are not timed


@dataclass(frozen=True)
class Rows:
    """Comparisons of random tokens, repeated as often as a run needs them."""

    data: TokenizedComparisons

    @property
    def mean_text(self) -> float:
        return float(self.data.text_length_A.mean())


def rows_of_lengths(lengths: list[list[int]], vocabulary: int) -> Rows:
    """Comparisons of random tokens; lengths: [prefix, chosen tail, rejected tail]. Tails differ from the start."""
    generator = np.random.Generator(np.random.PCG64(0))
    rows = []
    for prefix, *tails in lengths:
        shared = generator.integers(3, vocabulary, size=prefix)
        answers = []
        for place, tail in enumerate(tails):
            own = generator.integers(3, vocabulary, size=max(1, tail))
            own[0] = place
            answers.append(np.concatenate([shared, own]).astype(np.int32))
        rows.append(EncodedRow(answers[0][:prefix], answers, ((0, 1),), (0.0,), (1.0,)))
    return Rows(in_memory(rows, LengthLimits(max_tokens=2048)))


def settings_of(pairs: int, recompute: str, compiled: bool, strategy: str = "ddp", fp8: bool = False) -> Config:
    return Config.model_validate(
        {
            "model": {"name": "random"},
            "data": {"train": {"path": "random"}},
            "batch": {"pairs": pairs},
            "parallel": {
                "strategy": strategy,
                "precision": "bf16",
                "recompute": recompute,
                "compile": compiled,
                "fp8": fp8,
            },
        }
    )


def rmcore_run(
    model: RewardModel,
    rows: Rows,
    world: World,
    *,
    steps: int,
    pairs: int,
    tokens: int,
    strategy: str = "ddp",
    compiled: bool = False,
    fp8: bool = False,
) -> dict[str, Any]:
    """The steps of `rmcore.train`, without logging."""
    data, device = rows.data, world.device
    config = settings_of(pairs, "auto", compiled, strategy, fp8)
    longest = int(data.tokens_N.max())
    keys = keys_per_token(config, data.tokens_N, data.logical_tokens_N, longest)
    chosen = choose_budget(config, model.backbone.config, longest, device, 1, keys=keys)
    budget = max(longest, min(tokens, chosen.tokens))
    speed_up(model.backbone, recompute=chosen.recompute, compiled=compiled)
    if fp8:
        use_fp8(model.backbone)
    model.use(SHARED, pruned=True)
    chosen_strategy = make_strategy(config, model, world)
    flops_of = model_flops(model, rows)
    plan = Plan(
        data.tokens_N,
        work(data.tokens_N),
        data.pairs_N,
        data.weight_N,
        pairs_per_step=pairs,
        token_budget=budget,
        world_size=1,
        epochs=(steps + WARM) * pairs // len(data) + 1,
        max_steps=steps + WARM,
    )
    watch = Watch(device)
    with Loader(data, plan.steps_from(0), 0, device) as loader:
        for step, micro_batches in loader:
            if step.index == WARM:
                watch.start()
            for batch, is_last in micro_batches:
                with chosen_strategy.gradient_sync(is_last), chosen_strategy.autocast():
                    out = chosen_strategy.model(batch)
                (out.loss_sum / step.global_weight).backward()
                watch.count(batch.computed_tokens, batch.logical_tokens, batch.winner_P.numel())
            chosen_strategy.clip_grad_norm(1.0)
            chosen_strategy.optimizer.step()
            chosen_strategy.optimizer.zero_grad(set_to_none=True)
    sizes = DryRun(model.backbone.config)
    memory = memory_of_step(
        config,
        sizes.sizes,
        token_bytes(config, sizes, chosen.recompute, cuda=device.type == "cuda", keys=keys),
        tokens=watch.most,
        ranks=1,
        deferred=watch.batches > steps,
    )
    predicted = {"budget": budget, "recompute": chosen.recompute, "predicted_gb": memory.total / 1e9}
    return watch.record(flops_of) | predicted


def padded_run(
    model: RewardModel, rows: Rows, world: World, *, steps: int, pairs: int, tokens: int, recompute: bool = False
) -> dict[str, Any]:
    """The same pairs in the order of the rows; a micro batch is a padded rectangle of texts, as in other trainers."""
    device = world.device
    if recompute:
        recompute_activations(model.backbone, "full")
    model.to(device).train()
    model.backbone.set_attn_implementation("sdpa")
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, fused=True)
    texts = [rows.data.comparison(n) for n in range(len(rows.data))]
    longest = int(rows.data.text_length_A.max())
    at_once = max(1, min(pairs, tokens // (2 * longest)))
    watch, place = Watch(device), 0
    for step in range(steps + WARM):
        if step == WARM:
            watch.start()
        for first in range(0, pairs, at_once):
            chosen = [texts[(place + k) % len(texts)] for k in range(min(at_once, pairs - first))]
            place += len(chosen)
            flat = [np.concatenate([one.prefix, one.tails[side]]) for side in (0, 1) for one in chosen]
            ids, mask = rectangle(flat, device)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                hidden = model.backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                rewards = model.score(hidden[torch.arange(len(flat), device=device), mask.sum(1) - 1])[:, 0].float()
            loss = -F.logsigmoid(rewards[: len(chosen)] - rewards[len(chosen) :]).sum() / pairs
            loss.backward()
            watch.count(ids.numel(), sum(map(len, flat)), len(chosen))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return watch.record(model_flops(model, rows)) | {
        "pairs_at_once": at_once,
        "recompute": "full" if recompute else "none",
    }


def rectangle(texts: list[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask [texts, longest]."""
    ids = torch.ones(len(texts), max(map(len, texts)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = torch.from_numpy(text.astype(np.int64)), 1
    return ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)


def model_flops(model: RewardModel, rows: Rows) -> float:
    """Training FLOPs of one computed token. Called before the weights are sharded."""
    embedding = model.backbone.get_input_embeddings()
    tables = sum(p.numel() for p in embedding.parameters()) if isinstance(embedding, nn.Module) else 0
    weights = sum(p.numel() for p in model.parameters()) - tables
    return model_flops_per_token(model.backbone.config, weights, rows.mean_text)


class Watch:
    """Counts tokens, pairs and seconds between `start` and `record`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.computed = self.logical = self.pairs = self.batches = self.most = 0
        self._began = 0.0

    def start(self) -> None:
        self._wait()
        self.computed = self.logical = self.pairs = self.batches = 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._began = time.perf_counter()

    def count(self, computed: int, logical: int, pairs: int) -> None:
        self.computed, self.logical, self.pairs = self.computed + computed, self.logical + logical, self.pairs + pairs
        self.batches, self.most = self.batches + 1, max(self.most, computed)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def record(self, flops_per_token: float) -> dict[str, Any]:
        """Rates, MFU of the computed tokens (as a share of the H100's peak), peak memory in GB.

        `host_ms` is the time until the host had queued a micro batch; the GPU's is longer unless the host is too slow.
        """
        host = time.perf_counter() - self._began
        self._wait()
        seconds = time.perf_counter() - self._began
        flops = flops_per_token * self.computed / seconds
        cuda = self._device.type == "cuda"
        return {
            "steps": self.batches,
            "pairs_per_s": self.pairs / seconds,
            "computed_tokens_per_s": self.computed / seconds,
            "logical_tokens_per_s": self.logical / seconds,
            "logical_over_computed": self.logical / self.computed,
            "model_tflops": 1e-12 * flops,
            "mfu_of_h100": flops / PEAK_FLOPS["H100"],
            "ms": 1e3 * seconds / self.batches,
            "host_ms": 1e3 * host / self.batches,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
            "reserved_gb": torch.cuda.max_memory_reserved() / 1e9 if cuda else None,
        }
