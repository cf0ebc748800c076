"""The memory of a training step on one rank, by part; how many tokens fit in a micro batch; whether to recompute.

Enters: `Sizes` of the model (rmcore.cost.dry_run), strategy, precision, ranks, tokens of a micro batch. Leaves:
`Memory`, bytes by part; or `Fit(tokens, recompute)`, for `batch.tokens=auto` and `rmcore plan` alike. Example: a 1.4b
GPT-NeoX (24 layers, D 2048) on one 80 GB GPU in bf16: weights, gradients, AdamW's averages and bf16 copies take 18
bytes a parameter = 24 GB; a token keeps 34 * 2048 * 24 = 1.7 MB -> some 25,000 tokens without recompute.

The model, in bytes; N parameters, B of a decoder layer, R of all else, n ranks that share a state, w = 2 in bf16, 4 in
fp32. Weights, gradients and AdamW's two averages are fp32: 4 + 4 + 8 a parameter; zero1 keeps 1/n of the averages,
zero2, zero3 and hsdp 1/n of all three (Rajbhandari et al., arXiv 1910.02054, p. 8, with fp32 in place of fp16).
- copies: ddp and zero1 in bf16: what autocast casts, 2 (N - embedding). zero2: all weights gathered, w N. zero3, hsdp:
  w (R + 2 B), two layers.
- deferred gradients: zero2 adds up 4 N unsharded when a step is several micro batches; zero3 and hsdp do not.
- in flight, at the first moment of the backward: activations, a layer's gradients (w B) and two fp32 buffers of the
  reduce-scatter (2 * 4 B) and one of the all-gather (w B); at its last moment the embedding's gradient instead, w R and
  4 R (ddp: 4 R). The larger of the two counts. gloo scatters a copy: 4 B or 4 R more.
- activations: tokens * (kept + working), counted by a dry run. There are no logits.
`python -m rmcore.bench plan` compares this with measured memory; its figures stand in rmcore/plan/__init__.py.
"""

from dataclasses import asdict, dataclass

import torch
from transformers import PretrainedConfig

from rmcore.config.parallel import ParallelConfig
from rmcore.config.schema import Config
from rmcore.cost.dry_run import AUTOCAST, CAST, FP32, HOW, DryRun, Sizes, TokenBytes

BYTES_A_PARAMETER = 12  # fp32 weight and AdamW's two averages


CPU_TOKENS = 4096  # large enough for full-rate matrix products, small enough that a micro batch stays under a gigabyte
MOST_TOKENS = 32768  # more adds no speed
ENOUGH_TOKENS = 8192  # with fewer than this, recomputing for a larger micro batch is worth more than it costs
RESERVE = 0.85  # share of the GPU's memory that is planned with; the rest is fragments, kernels' work space, NCCL
UNEVEN = 1.25  # the rank with most tokens in a step has at most so many times the average


@dataclass(frozen=True)
class Fit:
    """`tokens`: the budget of a micro batch; `recompute`: none, selective or full."""

    tokens: int
    recompute: str


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the fullest moment of a step."""

    weights: float
    gradients: float
    optimizer: float
    copies: float  # weights gathered, or cast to bf16
    buffers: float  # of communication, and gradients on their way
    activations: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    @property
    def state(self) -> float:
        """What does not grow with the tokens of a micro batch."""
        return self.total - self.activations


def arithmetic_of(parallel: ParallelConfig) -> str:
    """How weights come to their precision: see rmcore.cost.dry_run."""
    if parallel.precision == "fp32":
        return FP32
    return CAST if parallel.traits.shards_weights else AUTOCAST


def memory(
    parallel: ParallelConfig,
    model: Sizes,
    per_token: TokenBytes,
    *,
    tokens: int,
    ranks: int,
    deferred: bool,
    gloo: bool = False,
) -> Memory:
    """Bytes by part. `ranks`: that share one state (hsdp: of a host); `deferred`: a step is several micro batches."""
    traits, width = parallel.traits, 2.0 if parallel.precision == "bf16" else 4.0
    everything, layer, root = float(model.total), float(model.layer), float(model.root)
    activations = tokens * per_token.total
    if not traits.shards_weights:
        largest = max(everything / ranks, float(model.embedding))  # zero1 deals out whole parameters
        averages = largest if traits.shards_optimizer else everything
        gradients = everything / ranks if traits.shards_gradients else everything
        copies = 2.0 * (everything - model.embedding) if parallel.precision == "bf16" else 0.0
        first, last = activations, 4.0 * model.embedding
        buffers = max(0.0, last - first)
        return Memory(4 * everything, 4 * gradients, 8 * averages, copies, buffers, activations)
    each = traits.gathers_each_micro_batch
    gathered = min(everything, root + 2 * layer) if each else everything
    waiting = 4.0 * everything if deferred and not each else 0.0
    copied = 4.0 if gloo and ranks > 1 else 0.0
    first, last = activations + (2 * width + 8.0 + copied) * layer, (width + 4.0 + copied) * root
    buffers = waiting + max(first, last) - activations
    own = everything / ranks
    return Memory(4 * own, 4 * own, 8 * own, width * gathered, buffers, activations)


def fit(
    config: Config,
    hf_config: PretrainedConfig,
    longest: int,
    device: torch.device,
    ranks: int,
    step_tokens: float | None = None,
) -> Fit:
    """The token budget and the recompute that `batch.tokens` and `parallel.recompute` ask for, or that suit the memory.

    `longest` is the longest comparison in tokens: the budget is at least that, since a comparison is never cut.
    `step_tokens`: what a rank computes in a step, on average; None: more than a micro batch holds.
    """
    if device.type == "cpu":
        asked = None if config.batch.tokens == "auto" else config.batch.tokens
        recompute = config.parallel.recompute
        return Fit(asked or max(longest, CPU_TOKENS), "none" if recompute == "auto" else recompute)
    room = torch.cuda.get_device_properties(device).total_memory
    model = DryRun(hf_config, trust_remote_code=config.model.trust_remote_code)
    return fit_in(config, model, longest, room, ranks, step_tokens)


def fit_in(
    config: Config, model: DryRun, longest: int, room: float, ranks: int, step_tokens: float | None = None
) -> Fit:
    """`fit` on a GPU of `room` bytes: the first recompute with which enough tokens fit, and as many as fit then."""
    asked_tokens = None if config.batch.tokens == "auto" else config.batch.tokens
    asked = config.parallel.recompute
    wanted = max(longest, asked_tokens or ENOUGH_TOKENS)
    fits: dict[str, int] = {}
    for how in HOW if asked == "auto" else (asked,):
        per_token = model.token_bytes(arithmetic_of(config.parallel), how)
        fits[how] = most_tokens(config.parallel, model.sizes, per_token, room, ranks, step_tokens)
        if fits[how] >= wanted:
            break
    recompute = max(fits, key=lambda how: (min(fits[how], wanted), fits[how]))
    return Fit(asked_tokens or max(longest, min(fits[recompute], MOST_TOKENS)), recompute)


def most_tokens(
    parallel: ParallelConfig, model: Sizes, per_token: TokenBytes, room: float, ranks: int, step_tokens: float | None
) -> int:
    """Tokens of the largest micro batch that fits in RESERVE of `room` bytes; 0 or less when nothing fits."""

    def most(deferred: bool) -> int:
        state = memory(parallel, model, per_token, tokens=0, ranks=ranks, deferred=deferred).state
        return int((RESERVE * room - state) / per_token.total)

    whole_step = most(deferred=False)
    if step_tokens is not None and UNEVEN * step_tokens <= min(whole_step, MOST_TOKENS):
        return whole_step
    return most(deferred=True)
