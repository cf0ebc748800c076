"""Finds how many pairs a run has and how long they are: from the prepared rows, or from flags and assumptions.

Input: a config, and the flags --pairs, --tokens-a-pair, --sharing.
Output: `DataSize`, the means of a pair; with `RowSizes` where the rows could be read.
Example: a comparison [P | C | R] of 140, 58 and 44 tokens takes 242 computed tokens and has 382 tokens in its two
texts. In 26,851 pairs of its tokens, one attends to the other.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rmcore.config import Config, UserError
from rmcore.cost.dry_run import KEYS
from rmcore.cost.memory import keys_per_token
from rmcore.data.batches.counting import sizes_of
from rmcore.data.batches.step_plan import Plan
from rmcore.data.tokens.comparisons import TokenizedComparisons, computed_tokens

# The prepared comparisons of training, followed by those of each evaluation set.
Comparisons = Sequence[TokenizedComparisons]

# Means of hh-rlhf's test sets, helpful and harmless base: 3,773 pairs, Pythia's tokenizer.
HH_TOKENS = 227.0  # computed tokens per pair, the prompt once
HH_SHARING = 1.58  # tokens in both texts per computed token


@dataclass(frozen=True)
class RowSizes:
    """The N comparisons of the training data, and the tokens computed for each of them."""

    data: TokenizedComparisons
    tokens_N: np.ndarray

    def plan(self, config: Config, ranks: int, budget: int) -> Plan:
        """The steps of the run. Raises UserError when the longest comparison exceeds the budget."""
        return Plan.of(config, self.data, self.tokens_N, token_budget=budget, world_size=ranks)


@dataclass(frozen=True)
class DataSize:
    """Number of pairs, and means per pair.

    pairs: None where it is neither given nor readable.
    tokens: computed tokens.
    logical: tokens in both texts.
    visible: pairs of tokens in which one attends to the other.
    longest: computed tokens of the longest comparison.
    rows: None where the means are assumed.
    notes: each assumption, and the flag that replaces it.
    keys: that attention gathers on GPUs per token, in the micro batch with most of them.
    """

    pairs: int | None
    tokens: float
    logical: float
    visible: float
    longest: int
    rows: RowSizes | None
    notes: tuple[str, ...]
    keys: float = KEYS


def size_of_data(
    config: Config,
    prepare: Callable[[Config], Comparisons],
    pairs: int | None = None,
    tokens: float | None = None,
    sharing: float | None = None,
) -> DataSize:
    """The size of the config's data. Raises UserError for flags out of range.

    `prepare` reads the data; it is called unless both `pairs` and `tokens` are given. Where it raises UserError, the
    means are assumed.
    """
    if pairs is not None and tokens is not None:
        return _assumed(config, pairs, tokens, sharing, [])
    try:
        train, *evals = prepare(config)
    except UserError as error:
        reason = " ".join(str(error).split())
        flags = [flag for flag, value in (("--pairs N", pairs), ("--tokens-a-pair T", tokens)) if value is None]
        note = f"the data cannot be read; give {' and '.join(flags)}. {reason}"
        return _assumed(config, pairs, tokens, sharing, [note])
    share = config.model.attention in ("auto", "shared")
    return measured_size(train, evals, share=share, config=config)


def measured_size(
    train: TokenizedComparisons, evals: Iterable[TokenizedComparisons], *, share: bool, config: Config
) -> DataSize:
    """The means of the prepared data.

    share: each prompt is computed once (for attention=auto the self-test decides at the start of the run; it is assumed
    to succeed here). config: its objectives decide what counts as a pair.
    """
    tokens_N, units_N = computed_tokens(train, share), sizes_of(config, train)
    pairs = max(1, int(units_N.sum()))
    longest = max(int(computed_tokens(part, share).max()) for part in (train, *evals))

    # A token attends to itself and to all tokens before it in its text. A prefix of p tokens makes p (p + 1) / 2 pairs
    # of tokens; a tail of t behind it t p more within the prefix, and t (t + 1) / 2 of its own.
    tail_A, prefix_N = train.tail_length.astype(np.float64), train.prefix_length.astype(np.float64)
    prefix_A = np.repeat(prefix_N, np.diff(train.answer_offset))
    if share:
        visible = (prefix_N * (prefix_N + 1) / 2).sum() + (tail_A * prefix_A + tail_A * (tail_A + 1) / 2).sum()
    else:
        visible = ((prefix_A + tail_A) * (prefix_A + tail_A + 1) / 2).sum()

    return DataSize(
        pairs=pairs,
        tokens=float(tokens_N.sum()) / pairs,
        logical=float(train.logical_tokens_N.sum()) / pairs,
        visible=float(visible) / pairs,
        longest=longest,
        rows=RowSizes(train, tokens_N),
        notes=(),
        keys=keys_per_token(config, tokens_N, train.logical_tokens_N, longest),
    )


def _assumed(
    config: Config, pairs: int | None, tokens: float | None, sharing: float | None, notes: list[str]
) -> DataSize:
    """The means of hh-rlhf's test sets, where `tokens` and `sharing` are not given."""
    longest = 2 * config.data.max_tokens
    if tokens is None:
        tokens = min(HH_TOKENS, float(longest))
        notes.append(f"assumed {tokens:g} computed tokens per pair, as in hh-rlhf's test sets (--tokens-a-pair)")
    if sharing is None:
        sharing = HH_SHARING
        notes.append(f"assumed {sharing:g} tokens in both texts per computed token, as in hh-rlhf (--sharing)")
    keys = max(KEYS, sharing)
    notes.append(
        f"assumed that GPUs gather {keys:g} keys per computed token for attention, as for pairs (--sharing); several "
        "answers to a long prompt need more, which is counted where the data can be read"
    )
    if tokens > longest:
        raise UserError(f"--tokens-a-pair {tokens:g} is more than two texts of data.max_tokens={longest // 2}")
    notes.append("assumed that ranks are balanced, except that a pair is never divided between ranks")
    notes.append(
        f"assumed that the longest comparison has {longest:,} tokens: two texts of data.max_tokens that share nothing"
    )
    prefix = min((sharing - 1.0) * tokens, tokens)  # in both texts, but computed once
    tail = (tokens - prefix) / 2
    visible = prefix * (prefix + 1) / 2 + 2 * (tail * prefix + tail * (tail + 1) / 2)
    return DataSize(pairs, tokens, sharing * tokens, visible, longest, None, tuple(notes), keys)
