"""Plans which comparisons each rank computes, in which micro batch, at each step. A pure function without state.

Input: the token and pair counts of N comparisons, pairs per step, a token budget, the world size, a seed.
Output: `Plan.step(index)` -> `Step`, for any step of the run, in any order. To resume, one integer is enough.
Example: 10 comparisons of one pair, 4 pairs per step, 1 epoch -> steps of 4, 4 and 2 pairs. On 2 ranks with a budget of
300 tokens, a step of lengths [200, 150, 120, 90] becomes rank 0: [[200, 90]], rank 1: [[150, 120]].

What a step trains on depends only on (seed, step). How the step is cut into ranks and micro batches depends on the
world size and the budget. Every rank gets the same number of micro batches (some may be empty), so collectives stay
aligned.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush, heapreplace

import numpy as np

from rmcore.config import Config, UserError
from rmcore.data.batches.answers import chosen_tokens_N
from rmcore.data.batches.counting import counted_of, sizes_of
from rmcore.data.tokens.comparisons import TokenizedComparisons


@dataclass(frozen=True)
class Step:
    """One optimizer update: `ranks[rank][micro_batch]` is an int64 array of comparison numbers.

    `index` counts from 0 over the run. `episode` is the number of pairs seen when this step is done. `global_weight` is
    the sum of the weights of all its pairs, over all ranks: the summed loss is divided by it. With several objectives
    it is what the first one counts, and `more_weights` what the others count; each divides its own sum.
    `language_tokens` counts the tokens of its chosen answers with loss.sft, in the same way, and `answers` its answers
    with loss.router_aux.
    """

    index: int
    epoch: float
    episode: int
    global_weight: float
    ranks: tuple[tuple[np.ndarray, ...], ...]
    language_tokens: float = 0.0
    more_weights: tuple[float, ...] = ()
    answers: float = 0.0

    @property
    def counts(self) -> tuple[float, ...]:
        """What the whole step counts for each objective."""
        return (self.global_weight, *self.more_weights)


HELD_AT_MOST = 2**26  # comparisons; a longer order is not held as an array, which would take half a minute to shuffle
ATTENTION_SHARE = 1e-4  # b in `work`, per token
ROUNDS = 6  # of a Feistel network; four make a strong pseudo-random permutation (Luby and Rackoff 1988)


class KeyedOrder:
    """A shuffled order of 0 .. count-1 that is computed when it is read and takes no memory, for a billion pairs.

    A balanced Feistel network over the least even number of bits that holds `count`, with splitmix64's finaliser as its
    round function. A result beyond `count` goes through the network again (cycle walking: Black and Rogaway, CT-RSA
    2002), which keeps the order one to one. Example: 16,384 of 10^9 places are read in a millisecond.
    """

    def __init__(self, count: int, seed: int, epoch: int) -> None:
        self._count = count
        self._half = np.uint64(max(1, (int(count - 1).bit_length() + 1) // 2))
        self._keys = np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS, np.uint64)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, places: slice) -> np.ndarray:
        """The comparisons at `places`, int64."""
        low = np.uint64(2 ** int(self._half) - 1)
        out = np.arange(*places.indices(self._count)).astype(np.uint64)
        beyond = np.arange(len(out))  # entries of `out` that are not yet a number below count: at first all of them
        while len(beyond):
            # One pass through the network: each round mixes the right half with its key and adds it to the left half.
            left, right = out[beyond] >> self._half, out[beyond] & low
            for key in self._keys:
                mixed = right + key
                mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & low)
            out[beyond] = (left << self._half) | right
            beyond = beyond[out[beyond] >= self._count]
        return out.astype(np.int64)


class Plan:
    """All steps of a run.

    Memory: the four arrays given, and for the two epochs used last the order (8 bytes per comparison), the start of
    each step and the number of pairs before it. For more than HELD_AT_MOST comparisons of one pair each, the shuffled
    order is computed step by step and takes no memory.

    Args:
        tokens_N: computed tokens of each comparison (its prefix once and every tail).
        cost_N: relative work of each comparison; ranks are balanced on it.
        pairs_N: pairs in each comparison.
        weight_N: sum of the pair weights of each comparison; more_weights: the same for further objectives.
        pairs_per_step: global batch. A comparison is never cut; it belongs to the step of its first pair.
        token_budget: most tokens in a micro batch.
        language_N: tokens of the chosen answers of each comparison, with loss.sft.
        answers_N: answers of each comparison, with loss.router_aux.
    Raises:
        ValueError: no comparisons, or a comparison longer than the budget.
    """

    def __init__(
        self,
        tokens_N: np.ndarray,
        cost_N: np.ndarray,
        pairs_N: np.ndarray,
        weight_N: np.ndarray,
        *,
        pairs_per_step: int,
        token_budget: int,
        world_size: int,
        seed: int = 0,
        epochs: int = 1,
        shuffle: bool = True,
        max_steps: int | None = None,
        language_N: np.ndarray | None = None,
        answers_N: np.ndarray | None = None,
        more_weights: Sequence[np.ndarray] = (),
    ) -> None:
        if len(tokens_N) == 0:
            raise ValueError("a plan needs at least one comparison")
        if (longest := int(tokens_N.max())) > token_budget:
            raise ValueError(f"the longest comparison has {longest} tokens, a micro batch at most {token_budget}")
        self.tokens_N, self.cost_N, self.pairs_N, self.weight_N = tokens_N, cost_N, pairs_N, weight_N
        self.more_weights = tuple(more_weights)
        self.pairs_per_step, self.token_budget, self.world_size = pairs_per_step, token_budget, world_size
        self.language_N, self.answers_N = language_N, answers_N
        self.seed, self.shuffle, self.epochs = seed, shuffle, epochs
        self.pairs_per_epoch = int(pairs_N.sum())
        self._uniform = bool((pairs_N == pairs_N[0]).all())
        self._keyed = shuffle and self._uniform and int(pairs_N[0]) == 1 and len(tokens_N) > HELD_AT_MOST
        self._epoch = lru_cache(maxsize=2)(self._lay_out_epoch)
        self._first_step_of_epoch = self._first_steps(epochs, max_steps)
        self.steps = min(self._first_step_of_epoch[-1], max_steps or self._first_step_of_epoch[-1])

    @classmethod
    def of(
        cls, config: Config, data: TokenizedComparisons, tokens_N: np.ndarray, *, token_budget: int, world_size: int
    ) -> "Plan":
        """The steps of the run that `config` describes. `tokens_N`: from `computed_tokens`.

        Raises UserError if the longest comparison exceeds the budget, or loss.sft has no token to train on.
        """
        if (longest := int(tokens_N.max())) > token_budget:
            raise UserError(
                f"batch.tokens={token_budget} is less than the longest comparison ({longest} tokens), which is never "
                f"cut: set batch.tokens to {longest} or more, or lower data.max_tokens"
            )
        weight_N, *more_weights = counts = counted_of(config, data)
        for loss, counted_N in zip(config.losses, counts, strict=True):
            if not counted_N.any():
                unit = loss.traits.unit.removesuffix("s")
                raise UserError(
                    f"loss.name={loss.name} counts nothing in data.train: no {unit} of its sources is left, or none "
                    "has a label that it reads"
                )
        language_N = chosen_tokens_N(data) if config.loss.sft else None
        if language_N is not None and not language_N.any():
            raise UserError("loss.sft: no answer of data.train is chosen over another; set loss.sft=0")
        return cls(
            tokens_N,
            work(tokens_N),
            sizes_of(config, data),
            weight_N,
            more_weights=more_weights,
            pairs_per_step=config.batch.pairs,
            token_budget=token_budget,
            world_size=world_size,
            seed=config.run.seed,
            epochs=config.run.epochs,
            shuffle=config.data.shuffle,
            max_steps=config.run.max_steps,
            language_N=language_N,
            answers_N=np.diff(data.answer_offset) if config.loss.router_aux else None,
        )

    def steps_from(self, position: int) -> Iterator[Step]:
        """The remaining steps after `position` steps are done."""
        return (self.step(index) for index in range(position, self.steps))

    def step(self, index: int) -> Step:
        """The step with this index, counted from 0. Raises IndexError beyond the last."""
        if not 0 <= index < self.steps:
            raise IndexError(f"step {index} of a plan of {self.steps}")
        epoch = int(np.searchsorted(self._first_step_of_epoch, index, side="right")) - 1
        order_N, start_S, pairs_before_S = self._epoch(epoch)
        local = index - self._first_step_of_epoch[epoch]
        chosen = order_N[start_S[local] : start_S[local + 1]]
        seen = epoch * self.pairs_per_epoch + int(pairs_before_S[local + 1])
        return Step(
            index=index,
            epoch=seen / self.pairs_per_epoch,
            episode=seen,
            global_weight=float(self.weight_N[chosen].sum(dtype=np.float64)),
            more_weights=tuple(float(weight_N[chosen].sum(dtype=np.float64)) for weight_N in self.more_weights),
            ranks=cut(chosen, self.tokens_N[chosen], self.cost_N[chosen], self.token_budget, self.world_size),
            language_tokens=0.0 if self.language_N is None else float(self.language_N[chosen].sum()),
            answers=0.0 if self.answers_N is None else float(self.answers_N[chosen].sum()),
        )

    def order(self, epoch: int) -> np.ndarray:
        """int64 [N]: the comparisons in the order in which `epoch` visits them, the same at any world size."""
        if not self.shuffle:
            return np.arange(len(self.tokens_N))
        if self._keyed:
            return KeyedOrder(len(self.tokens_N), self.seed, epoch)[:]
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self.tokens_N))

    def _first_steps(self, epochs: int, max_steps: int | None) -> list[int]:
        """Index of the first step of each epoch, and the total; without the epochs that max_steps does not reach."""
        firsts = [0]
        for epoch in range(epochs):
            firsts.append(firsts[-1] + len(self._epoch(epoch)[1]) - 1)
            if max_steps is not None and firsts[-1] >= max_steps:
                break
            if self._uniform:  # all epochs have the same number of steps: no need to lay them out
                firsts += [firsts[1] * e for e in range(2, epochs + 1)]
                break
        return firsts

    def first(self) -> int:
        """The number of the comparison that the run visits first."""
        return int(self._epoch(0)[0][:1][0])

    def _lay_out_epoch(self, epoch: int) -> tuple[np.ndarray | KeyedOrder, np.ndarray, np.ndarray]:
        """The order of the epoch, the place where each step starts (with the end appended), the pairs before it."""
        if self._keyed:
            count = len(self.tokens_N)
            start_S = np.append(np.arange(0, count, self.pairs_per_step), count)
            return KeyedOrder(count, self.seed, epoch), start_S, start_S
        order_N = self.order(epoch)
        after_N = np.cumsum(self.pairs_N[order_N])
        # Step s has the comparisons whose first pair is one of the pairs s * pairs_per_step ... (s + 1) *
        # pairs_per_step - 1 of the epoch. The comparison that passes the boundary is the last one of its step.
        step_N = np.concatenate([[0], after_N[:-1]]) // self.pairs_per_step
        start_S = np.concatenate([[0], np.flatnonzero(np.diff(step_N)) + 1, [len(order_N)]])
        return order_N, start_S, np.concatenate([[0], after_N[start_S[1:] - 1]])


def cut(
    chosen: np.ndarray, tokens: np.ndarray, cost: np.ndarray, token_budget: int, world_size: int
) -> tuple[tuple[np.ndarray, ...], ...]:
    """Cuts one step into [rank][micro batch], with the fewest micro batches found and ranks balanced on cost.

    Largest first: each comparison goes to the micro batch with the least cost so far that still has room (Graham 1969,
    the LPT rule: the busiest rank has at most 4/3 of the least possible load). If something does not fit, one more
    micro batch per rank is tried. Ties go to the lower rank, so the result depends only on the arguments.
    """
    order = np.argsort(-cost, kind="stable")

    # At least so many bins: all tokens have to fit, and two comparisons of more than half a budget never share a bin.
    bins_needed = max(1, -(-int(tokens.sum()) // token_budget), int((2 * tokens > token_budget).sum()))
    micro_batches = -(-bins_needed // world_size)
    while (bins := _fill(order, tokens, cost, token_budget, world_size * micro_batches)) is None:
        micro_batches += 1

    # Deal the bins to the ranks in order of cost, back and forth, so that the sums of the ranks are close too.
    contents, loads = bins
    ranks: list[list[np.ndarray]] = [[] for _ in range(world_size)]
    for place, b in enumerate(sorted(range(len(loads)), key=lambda b: -loads[b])):
        round_, seat = divmod(place, world_size)
        rank = seat if round_ % 2 == 0 else world_size - 1 - seat
        ranks[rank].append(chosen[sorted(contents[b])])
    return tuple(tuple(rank) for rank in ranks)


def _fill(
    order: np.ndarray, tokens: np.ndarray, cost: np.ndarray, token_budget: int, bin_count: int
) -> tuple[list[list[int]], list[float]] | None:
    """Fills `bin_count` bins of `token_budget` tokens, the largest comparison first: (content, cost) of the bins, or
    None if something finds no room. Python numbers and a heap, because numpy calls on single numbers are slower.
    """
    if bin_count == 1:
        return ([order.tolist()], [float(cost.sum())]) if tokens.sum() <= token_budget else None
    room = [token_budget] * bin_count
    bins: list[list[int]] = [[] for _ in range(bin_count)]
    least = [(0.0, b) for b in range(bin_count)]  # a heap of (cost, bin): the least cost first, then the lower bin
    for i, size, price in zip(order.tolist(), tokens[order].tolist(), cost[order].tolist(), strict=True):
        load, target = least[0]
        if room[target] >= size:  # the common case
            heapreplace(least, (load + price, target))
        else:  # take out the bins without room until one has it, then put them back
            full = []
            while least and room[least[0][1]] < size:
                full.append(heappop(least))
            if not least:
                return None
            load, target = least[0]
            heapreplace(least, (load + price, target))
            for other in full:
                heappush(least, other)
        room[target] -= size
        bins[target].append(i)
    loads = [load for load, _ in sorted(least, key=lambda entry: entry[1])]
    return bins, loads


def work(tokens_N: np.ndarray) -> np.ndarray:
    """Relative cost of comparisons of L tokens: L + b L^2.

    The second term is attention. In a decoder of width D, causal attention costs 6 D L per token and everything else
    12 D^2, so b = 1 / (2 D). ATTENTION_SHARE fits widths of some thousands; it only changes how ranks are balanced.
    """
    return tokens_N * (1.0 + ATTENTION_SHARE * tokens_N)
