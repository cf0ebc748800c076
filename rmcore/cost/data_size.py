"""What a plan knows of the data: from the prepared rows, or from flags and stated assumptions.

Enters: a config, and the flags --pairs, --tokens-a-pair, --sharing. Leaves: `DataFigures`. Example: a comparison
[P | C | R] of 140, 58 and 44 tokens is 242 tokens computed and 382 in both texts; in 26,851 pairs of tokens one sees
the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rmcore.config import Config, UserError

if TYPE_CHECKING:
    from rmcore.data.batches.step_plan import Plan
    from rmcore.data.prepare import PreparedData
    from rmcore.data.tokens.comparisons import TokenizedComparisons

# hh-rlhf's test sets, helpful and harmless base, 3,773 pairs, Pythia's tokenizer: prompts once, and both texts.
HH_TOKENS, HH_SHARING = 227.0, 1.58


@dataclass(frozen=True)
class Rows:
    """Of N comparisons: computed tokens, their work, pairs and weights: what a Plan is made of."""

    tokens_N: np.ndarray
    cost_N: np.ndarray
    pairs_N: np.ndarray
    weight_N: np.ndarray

    def plan(self, config: Config, ranks: int, budget: int) -> Plan:
        """The steps of the run. Raises UserError when the longest comparison exceeds the budget."""
        from rmcore.data.batches.step_plan import Plan

        try:
            return Plan(
                self.tokens_N, self.cost_N, self.pairs_N, self.weight_N, pairs_per_step=config.batch.pairs,
                token_budget=budget, world_size=ranks, seed=config.run.seed, epochs=config.run.epochs,
                shuffle=config.data.shuffle, max_steps=config.run.max_steps,
            )  # fmt: skip
        except ValueError as error:
            raise UserError(f"batch.tokens={budget}: {error}") from None


@dataclass(frozen=True)
class DataFigures:
    """`tokens`, `logical`, `visible`: means a pair, of computed tokens, of tokens in both texts, and of pairs of tokens
    of which one sees the other. `pairs` is None when nothing tells. `notes`: what was assumed, and which flag sets it.
    """

    pairs: int | None
    tokens: float
    logical: float
    visible: float
    longest: int
    rows: Rows | None
    notes: tuple[str, ...]


def figures_of(
    config: Config,
    prepare: Callable[[Config], PreparedData],
    pairs: int | None = None,
    tokens: float | None = None,
    sharing: float | None = None,
) -> DataFigures:
    """Calls `prepare`, which reads the data, unless both `pairs` and `tokens` are given."""
    if pairs is not None and tokens is not None:
        return _assumed(config, pairs, tokens, sharing, ())
    try:
        data = prepare(config)
    except UserError as error:
        reason = " ".join(str(error).split())
        lacking = " and ".join(
            flag for flag, value in (("--pairs N", pairs), ("--tokens-a-pair T", tokens)) if value is None
        )
        return _assumed(config, pairs, tokens, sharing, (f"the data cannot be read; give {lacking}. {reason}",))
    return measured(
        data.train, data.eval, share=config.model.attention in ("auto", "shared"), counts=config.loss.traits.counts
    )


def measured(
    train: TokenizedComparisons, evaluation: TokenizedComparisons | None, *, share: bool, counts: str
) -> DataFigures:
    """`share`: prompts are computed once, as the self-test decides at the start for attention=auto. `counts`: what the
    objective counts, pairs or else."""
    from rmcore.data.batches.counting import counted_N, size_N
    from rmcore.data.batches.step_plan import work
    from rmcore.data.tokens.comparisons import computed_tokens

    tokens_N, units_N = computed_tokens(train, share), size_N(train, counts)
    pairs = max(1, int(units_N.sum()))
    longest = max(int(computed_tokens(part, share).max()) for part in (train, evaluation) if part is not None)
    tail_A, prefix_N = train.tail_length.astype(np.float64), train.prefix_length.astype(np.float64)
    prefix_A = np.repeat(prefix_N, np.diff(train.answer_offset))
    if share:
        visible = (prefix_N * (prefix_N + 1) / 2).sum() + (tail_A * prefix_A + tail_A * (tail_A + 1) / 2).sum()
    else:
        visible = ((prefix_A + tail_A) * (prefix_A + tail_A + 1) / 2).sum()
    return DataFigures(
        pairs=pairs,
        tokens=float(tokens_N.sum()) / pairs,
        logical=float(train.logical_tokens_N.sum()) / pairs,
        visible=float(visible) / pairs,
        longest=longest,
        rows=Rows(tokens_N, work(tokens_N), units_N, counted_N(train, counts)),
        notes=(),
    )


def _assumed(
    config: Config, pairs: int | None, tokens: float | None, sharing: float | None, notes: tuple[str, ...]
) -> DataFigures:
    told: list[Any] = list(notes)
    longest = 2 * config.data.max_tokens
    if tokens is None:
        tokens = min(HH_TOKENS, float(longest))
        told.append(f"assumed {tokens:g} computed tokens a pair, as in hh-rlhf's test sets (--tokens-a-pair)")
    if sharing is None:
        sharing = HH_SHARING
        told.append(f"assumed {sharing:g} tokens in both texts for each one computed, as in hh-rlhf's (--sharing)")
    if tokens > longest:
        raise UserError(f"--tokens-a-pair {tokens:g} is more than two texts of data.max_tokens={longest // 2}")
    told.append("assumed ranks that are balanced but for whole pairs")
    told.append(f"assumed a longest comparison of {longest:,} tokens, two texts of data.max_tokens that share nothing")
    prefix = min((sharing - 1.0) * tokens, tokens)  # both texts hold it, it is computed once
    tail = (tokens - prefix) / 2
    visible = prefix * (prefix + 1) / 2 + 2 * (tail * prefix + tail * (tail + 1) / 2)
    return DataFigures(pairs, tokens, sharing * tokens, visible, longest, None, tuple(told))
