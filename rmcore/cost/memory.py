"""Predicts the memory of a training step on one rank; chooses the token budget and the recompute that fit a device.

Input: `Sizes` of the model (rmcore.cost.dry_run), strategy, precision, ranks, tokens of a micro batch.
Output: `Memory`, bytes by part; or `Budget(tokens, recompute)`, for `batch.tokens=auto` and for `rmcore plan` alike.
Example: a 1.4b GPT-NeoX (24 layers, D 2048) on one 80 GB GPU in bf16. Weights, gradients, AdamW's averages and bf16
copies take 18 bytes per parameter, 24 GB. A token keeps 34 * 2048 * 24 bytes = 1.7 MB, so about 25,000 tokens fit
without recompute.

The model, in bytes. W parameters, B of them in a decoder layer and R outside the layers; n ranks share one state; w is
2 in bf16, 4 in fp32. Weights, gradients and AdamW's two averages take 4 + 4 + 8 bytes per parameter, or what other
formats and LoRA make of it (rmcore.cost.formats). zero1 keeps 1/n of the averages; zero2, zero3 and hsdp keep 1/n of
all three (Rajbhandari et al., arXiv 1910.02054, p. 8, with fp32 in place of fp16).
- copies: ddp and zero1 in bf16: on GPUs 2 W (rmcore.parallel.half_copies); on CPUs, and with LoRA or FP8, what autocast
  casts, 2 (W - embedding); nothing if the weights are bf16, the largest matrix if LoRA's base is restored at each use.
  zero2: all weights gathered, w W. zero3, hsdp: two layers, w (R + 2 B). Of a stored base only the largest matrix and
  its codes, under each of them.
- the first of two moments, the start of the last backward of a step: gradients that earlier micro batches left (zero2:
  4 W, not sharded), and DDP's buckets, which are never freed; copies; activations; under zero2, zero3 and hsdp a
  layer's gradients (w B), two fp32 buffers of the reduce-scatter (2 * 4 B) and one of the all-gather (w B). gloo
  scatters a copy, 4 B more. Or, if this is more (zero3, hsdp), the buffer in which the root is gathered again, w R.
- the second, its end: all gradients, and what makes those of the embedding or of the root. ddp and zero1: 4 bytes per
  element of the embedding; 2 if it is bf16, and 4 more for the sum over several micro batches. The others: the gathered
  root and its gradient (2 w R; zero2 with several micro batches 4 R more); its gradient and the buffer of the
  reduce-scatter; or this buffer and gloo's copy. The gathered layers and the casts are gone.
- activations: tokens * (kept + working), counted by a dry run. There are no logits. Of a row that N ranks compute
  together (`parallel.context`), each has 1/N of the tokens; the dry run is that of one of the ranks.
- on GPUs attention gathers the prompt's keys and values for each answer (rmcore.model.varlen): up to 2 keys per token
  of pairs, more of several answers to a long prompt. The dry run has as many as the micro batch with most of them.
- paths that do not pack: the cells of the rectangle in place of the tokens; a cell's bytes, with dense masks and kept
  scores, are counted at the length of the longest row. Per token there are as many cells as the longest row is longer
  than the mean one: so it is in the micro batch that holds it.
The larger of the two counts: its parts are those that are there at that moment.
README.md has this as a table, and compares it with measurements.
"""

from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from transformers import PretrainedConfig

from rmcore.config.schema import Config
from rmcore.cost.dry_run import AUTOCAST, CAST, FP32, KEYS, RECOMPUTES, DryRun, Sizes, TokenBytes
from rmcore.cost.formats import BASE, stored
from rmcore.model.language_head import is_tied

CPU_TOKENS = 4096  # large enough for full-rate matrix products, small enough that a micro batch stays under a gigabyte
MOST_TOKENS = 32768  # a larger micro batch is not faster
ENOUGH_TOKENS = 8192  # below this, a larger micro batch is worth the recompute that makes room for it
RESERVE = 0.85  # share of the GPU's memory to plan with; fragments, kernels' work space and NCCL take the rest
NEIGHBORS = 2**20  # comparisons in which micro batches are looked for at a time, which bounds the memory for it
UNEVEN = 1.25  # the busiest rank of a step has at most this many times the mean tokens


@dataclass(frozen=True)
class Budget:
    """`tokens`: the most tokens of a micro batch; `recompute`: none, selective, full or offload."""

    tokens: int
    recompute: str


@dataclass(frozen=True)
class Rectangle:
    """The rows of the paths that do not pack: each has up to `length` cells, of which there are `cells` per token."""

    length: int
    cells: float

    @classmethod
    def of(cls, lengths: np.ndarray, *, padded: bool = True) -> "Rectangle":
        """Of rows of these lengths, in tokens. Padded, those of the micro batch with the longest row are as long."""
        longest = int(lengths.max())
        return cls(longest, longest / float(lengths.mean()) if padded else 1.0)


def keys_per_token(config: Config, computed_N: np.ndarray, texts_N: np.ndarray, longest: int) -> float:
    """The keys that attention gathers on GPUs, per token, in the micro batch with most of them.

    computed_N: the tokens of each comparison in a packed row; texts_N: in its texts, each with the prompt, which are
    the gathered keys. longest: as for `choose_budget`. A micro batch is taken to be a comparison and those before it in
    the data, of as many tokens as `gpu_budget` wants room for; in a larger one such a comparison counts for less.
    Example: one comparison of 4,000 tokens with 40,000 keys among pairs with 1.5 per token, in 8,192 tokens: 5.65.
    """
    budget, most = _wanted(config, longest), 0.0
    for first in range(0, len(computed_N), NEIGHBORS):
        tokens, keys = (np.cumsum(x[first : first + NEIGHBORS], dtype=np.float64) for x in (computed_N, texts_N))
        size = min(float(budget), tokens[-1])
        before = np.interp(tokens - size, np.append(0.0, tokens), np.append(0.0, keys))
        most = max(most, float((keys - before).max()) / size)
    return most


def trained_sizes(config: Config, model: DryRun) -> Sizes:
    """The sizes of what a run trains: with loss.sft also a language-model head that is not the embedding."""
    sizes = model.sizes
    if not config.loss.sft or is_tied(model.hf_config):
        return sizes
    more = sizes.embedding
    return replace(sizes, total=sizes.total + more, root=sizes.root + more, trained=sizes.trained + more)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the moment of a step that needs most."""

    weights: float
    gradients: float
    optimizer: float
    copies: float  # weights gathered, or cast to bf16
    buffers: float  # of communication, and of gradients before they are sharded
    activations: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    @property
    def state(self) -> float:
        """The part that does not grow with the tokens of a micro batch."""
        return self.total - self.activations


def arithmetic_of(config: Config, *, cuda: bool = True) -> str:
    """How weights get their precision: AUTOCAST, CAST or FP32 of rmcore.cost.dry_run."""
    if not config.parallel.bf16:
        return FP32
    cast = config.parallel.traits.shards_weights or config.model.trains_bf16 or config.computes_with_copies(cuda=cuda)
    return CAST if cast else AUTOCAST


def token_bytes(config: Config, model: DryRun, recompute: str, *, cuda: bool = True, keys: float = KEYS) -> TokenBytes:
    """Activation bytes per token as the run of `config` computes, with the recompute that was chosen for it."""
    parallel = config.parallel
    arithmetic = arithmetic_of(config, cuda=cuda)
    return model.token_bytes(
        arithmetic, recompute, cuda=cuda, context=parallel.context, compiled=parallel.compile, keys=keys
    )


def memory_of_step(
    config: Config,
    model: Sizes,
    per_token: TokenBytes,
    *,
    tokens: int,
    ranks: int,
    deferred: bool,
    gloo: bool = False,
) -> Memory:
    """Bytes by part, as the module's docstring derives them.

    tokens: of the largest micro batch, over all ranks of a context group. ranks: that share one state (hsdp: those of a
    host). deferred: the step has several micro batches. gloo: the backend is gloo, which copies what it scatters.
    """
    parallel, kept = config.parallel, stored(config, model)
    traits, width = parallel.traits, 2.0 if parallel.bf16 else 4.0
    everything, layer, root = float(model.total + model.adapters), float(model.layer), float(model.root)
    share = model.trained / everything  # of the parameters that have gradients
    activations = tokens / parallel.context * per_token.total
    if not traits.shards_weights:
        largest = max(1.0 / ranks, model.embedding / everything if share == 1.0 else 0.0)  # zero1: whole parameters
        averages = kept.averages * (largest if traits.shards_optimizer else 1.0)
        copies, persistent = _casts(config, model, cuda=not gloo), config.computes_with_copies(cuda=not gloo)
        # The embedding's gradient in the dtype of the weights that compute. If that is bf16, its fp32 copy is added to
        # the gradients that earlier micro batches left; the first one becomes the gradient.
        halves = config.model.trains_bf16 or persistent
        last = (2.0 + 4.0 * deferred if halves else 4.0) * model.embedding * (share == 1.0)
        in_buckets = ranks > 1 and not halves  # DDP never frees its gradients
        begin = Memory(kept.weights, kept.gradients * (deferred or in_buckets), averages, copies, 0.0, activations)
        end = Memory(kept.weights, kept.gradients, averages, copies * persistent, last, 0.0)
        return max(begin, end, key=_total)
    each = traits.gathers_each_micro_batch
    gathered = min(everything, root + 2 * layer) if each else everything
    codes = 0.0
    if config.model.lora.base != "fp32":  # the stored base is gathered and restored one weight at a time
        gathered *= 1.0 - model.adapted / everything
        gathered += model.matrix
        codes = BASE[config.model.lora.base] * model.matrix
    waits = deferred and not each  # zero2 reduces the sums of a step, with its last micro batch
    copied = 4.0 if gloo and ranks > 1 else 0.0
    first = (width + 8.0 + copied) * layer * share + width * layer
    if each:  # first of all the root is gathered again, into one buffer and then out of it
        first = max(first, width * root)
    # Next to its gradient is the gathered root; then the buffer that is scattered; then gloo's copy of that.
    summed = 4.0 if waits else width
    last = root * max(2.0 * width + 4.0 * waits, summed + 4.0, 4.0 + copied) * (share == 1.0)
    weights, gradients, averages = (part / ranks for part in (kept.weights, kept.gradients, kept.averages))
    earlier = 4.0 * model.trained if waits else gradients * deferred
    begin = Memory(weights, earlier, averages, width * gathered + codes, first, activations)
    end = Memory(weights, gradients, averages, 0.0, last, 0.0)
    return max(begin, end, key=_total)


def _total(memory: Memory) -> float:
    return memory.total


def _casts(config: Config, model: Sizes, *, cuda: bool) -> float:
    """Bytes of the copies in which ddp and zero1 multiply, in bf16, or restore, weights that are stored otherwise."""
    if config.model.trains_bf16:
        return 0.0
    if config.computes_with_copies(cuda=cuda):
        return 2.0 * model.total
    half = config.parallel.bf16
    if config.model.lora.base != "fp32":
        return (2.0 if half else 4.0) * model.matrix + 2.0 * half * model.adapters
    return 2.0 * (model.total + model.adapters - model.embedding) if half else 0.0


def choose_budget(
    config: Config,
    hf_config: PretrainedConfig,
    longest: int,
    device: torch.device,
    ranks: int,
    step_tokens: float | None = None,
    rectangle: Rectangle | None = None,
    keys: float = KEYS,
) -> Budget:
    """The token budget and the recompute of the config; where these are `auto`, the ones that suit the device's memory.

    longest: tokens of the longest comparison. The budget is at least that, because a comparison is never cut.
    ranks: that share one state.
    step_tokens: mean tokens of a rank in a step; None: more than a micro batch holds.
    rectangle: what the path computes, if it does not pack.
    keys: that attention gathers per token (`keys_per_token`), if it packs.
    """
    if device.type == "cpu":
        return cpu_budget(config, longest)
    device_memory = torch.cuda.get_device_properties(device).total_memory
    model = dry_run_of(config, hf_config)
    return gpu_budget(config, model, longest, device_memory, ranks, step_tokens, rectangle, keys)


def dry_run_of(config: Config, hf_config: PretrainedConfig) -> DryRun:
    """The dry run of what a run of this config trains. Raises as `DryRun`."""
    trusted, balanced = config.model.trust_remote_code, config.loss.router_aux > 0
    return DryRun(hf_config, trust_remote_code=trusted, lora=config.model.lora, router_aux=balanced)


def cpu_budget(config: Config, longest: int) -> Budget:
    """`choose_budget` for a CPU, whatever its memory."""
    configured, own = config.batch.tokens, config.parallel.context * CPU_TOKENS
    tokens = max(longest, own) if configured == "auto" else configured
    return Budget(tokens, config.parallel.recompute.replace("auto", "none"))


def gpu_budget(
    config: Config,
    model: DryRun,
    longest: int,
    device_memory: float,
    ranks: int,
    step_tokens: float | None = None,
    rectangle: Rectangle | None = None,
    keys: float = KEYS,
) -> Budget:
    """`choose_budget` for a GPU with `device_memory` bytes.

    Takes the fastest recompute with which ENOUGH_TOKENS (or the configured budget) fit, and then as many tokens as fit.
    """
    configured = None if config.batch.tokens == "auto" else config.batch.tokens
    recompute, context = config.parallel.recompute, config.parallel.context
    wanted = _wanted(config, longest)
    sizes, fits = trained_sizes(config, model), dict[str, int]()
    # Compiled layers cannot offload.
    choice = [name for name in RECOMPUTES if not (name == "offload" and config.parallel.compile)]
    for name in choice if recompute == "auto" else (recompute,):
        per_token = _bytes_of_token(config, model, name, rectangle, keys)
        fits[name] = largest_budget(config, sizes, per_token, device_memory, ranks, step_tokens)
        if fits[name] >= wanted:
            break
    best = max(fits, key=lambda name: (min(fits[name], wanted), fits[name]))
    return Budget(configured or max(longest, min(fits[best], context * MOST_TOKENS)), best)


def _wanted(config: Config, longest: int) -> int:
    """Tokens for which a GPU needs room before less recompute is chosen."""
    configured = config.parallel.context * ENOUGH_TOKENS if config.batch.tokens == "auto" else config.batch.tokens
    return max(longest, configured)


def _bytes_of_token(
    config: Config, model: DryRun, recompute: str, rectangle: Rectangle | None, keys: float
) -> TokenBytes:
    """Activation bytes per token of a packed row, or per token of a rectangle with its padding and its masks."""
    if rectangle is None:
        return token_bytes(config, model, recompute, keys=keys)
    cell = model.cell_bytes(arithmetic_of(config), recompute, rectangle.length)
    return replace(cell, kept=cell.kept * rectangle.cells, working=cell.working * rectangle.cells)


def largest_budget(
    config: Config,
    model: Sizes,
    per_token: TokenBytes,
    device_memory: float,
    ranks: int,
    step_tokens: float | None,
) -> int:
    """Tokens of the largest micro batch that fits RESERVE of `device_memory` bytes; 0 or less when nothing fits."""

    def largest(deferred: bool) -> int:
        state = memory_of_step(config, model, per_token, tokens=0, ranks=ranks, deferred=deferred).state
        return int((RESERVE * device_memory - state) / per_token.total * config.parallel.context)

    # A step that is one micro batch needs no room for deferred gradients.
    one_micro_batch = largest(deferred=False)
    if step_tokens is not None and UNEVEN * step_tokens <= min(one_micro_batch / config.parallel.context, MOST_TOKENS):
        return one_micro_batch
    return largest(deferred=True)
