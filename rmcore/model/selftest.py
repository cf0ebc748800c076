"""Finds the fastest path that is exact for an architecture, on a few real comparisons, before training starts.

Input: a reward model and tokenised data.
Output: the fastest of shared, packed, padded and alone whose rewards equal those of the plain Hugging Face forward of
each text by itself, and in which no reward depends on a token of another text; and one line about it. Before training,
the gradients must be equal too. The last layer is pruned (rmcore.model.pruning) where that is exact too.
Example: Llama -> ("shared", "attention shared: rewards equal the plain forward's to 2.4e-07 and gradients to 3.1e-07,
last layer on scored tokens only"). Jamba, which has state-space layers -> ("padded", "... not shared: rewards differ
from the plain forward's by 8.3e-02 ...").

A wrong fast path never trains: rmcore takes a slower one, or stops.

Where ranks compute parts of a row (`RewardModel.context`), they run the test together, on comparisons that one rank can
compute whole (`Shortened`).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmcore.config import UserError
from rmcore.data.batches.batch import Comparisons, build_batch
from rmcore.data.tokens.comparisons import TokenizedComparison
from rmcore.model.backbone import decoder_layers
from rmcore.model.reward_model import ALONE, PADDED, PATHS, SHARED, RewardModel
from rmcore.model.rounding import UNIT_ROUNDOFF, all_roundings, floor

# Two exact fp32 paths may always differ by this, relative to the norm of a gradient. A wrong kernel changes a gradient
# by a large part of itself.
GRADIENT_FLOOR = 1e-4
BEYOND_LONGEST = 8192  # tokens of the comparisons to try, in addition to the longest
GRADIENT_TOKENS = 512  # of the comparisons whose gradients are computed, so that it takes seconds on a CPU, too


def choose_path(
    model: RewardModel,
    data: Comparisons,
    numbers: list[int],
    device: torch.device,
    wanted: str = "auto",
    half: AbstractContextManager | None = None,
    *,
    gradients: bool = False,
) -> tuple[str, str]:
    """Make the model use its fastest exact path; return the path and a line about it.

    Args:
        numbers: the comparisons to try. The longest should be among them, because windows and position limits show only
            there.
        device: where the model computes; with `parallel.offload` its weights are elsewhere.
        wanted: `auto`, or the only path to try.
        half: an autocast context, if training uses kernels that exist only for half precision. The paths may then
            differ from the fp32 oracle by the error of half precision itself.
        gradients: compare gradients too, on the shortest comparisons. `PADDED` and `ALONE` are transformers' own
            backward.
    Raises:
        UserError: none of the paths to try is exact.
    """
    if model.context is not None:
        data = Shortened(data, max(BEYOND_LONGEST, _longest(data, numbers) // model.context.size))
    model.use(PADDED)
    with _explained(model, "the reward of a text"):
        oracle = rewards_alone(model, data, numbers, device)
    _check_repeatable(model, data, numbers, device)
    tolerance = _tolerance(model, data, numbers, device, oracle)
    if half is not None:
        with _explained(model, "the reward of a text in half precision"), half:
            tolerance += 3.0 * float((rewards_alone(model, data, numbers, device) - oracle).abs().max())
    with _explained(model, "the gradient of a reward"):
        backward = BackwardTest(model, data, numbers, device, half, compare=gradients)
    refused = []
    paths = PATHS if wanted == "auto" else [wanted]
    for way in model.ways(paths):
        model.use(**way)
        path, pruned = model.path, model.pruned
        if pruned != way["pruned"]:
            continue
        name = ", ".join([path, *["by masks"] * model.masked, *["last layer on scored tokens"] * pruned])
        batch = build_batch(data, numbers, path == SHARED, multiple=model.multiple).on(device)
        try:
            with torch.no_grad(), half or nullcontext():
                rewards = model(batch).rewards_A.double().cpu()
            difference = float((rewards - oracle).abs().max())
            if not difference <= tolerance:
                refused.append(f"{name}: rewards differ from the plain forward's by {difference:.1e}")
                continue
            found = f"rewards equal the plain forward's to {difference:.1e}"
            if path not in (PADDED, ALONE):
                fault, error = backward.run(path)
                if fault:
                    refused.append(f"{name}: {fault}")
                    continue
                found += f" and gradients to {error:.1e}" if gradients else ""
        except (torch.OutOfMemoryError, UserError):
            raise
        except Exception as error:  # an architecture may raise anything for a path; the next one is tried
            refused.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
            continue
        part = ", by masks" * model.masked + ", last layer on scored tokens only" * pruned
        return path, "; ".join([f"attention {path}: {found}{part}", *(f"not {reason}" for reason in refused)])
    split = f" and parallel.context={model.context.size}" if model.context else ""
    raise UserError(
        f"{type(model.backbone).__name__}: no path is exact with model.attention={wanted}{split}: " + "; ".join(refused)
    )


@contextmanager
def _explained(model: RewardModel, what: str) -> Iterator[None]:
    """Within, transformers' own code runs. What it raises becomes one message.

    Some models with towers cannot run on text alone, and kernels refuse some sizes and dtypes.
    """
    try:
        yield
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as cause:
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
        raise UserError(f"{type(model.backbone).__name__} cannot compute {what}: {reason}") from cause


@torch.no_grad()
def rewards_alone(model: RewardModel, data: Comparisons, numbers: list[int], device: torch.device) -> Tensor:
    """The oracle: fp64 rewards of every answer, each text by itself through the model as transformers runs it."""
    return torch.stack([model.reward_alone(text) for text in _texts(data, numbers, device)])


def _check_repeatable(model: RewardModel, data: Comparisons, numbers: list[int], device: torch.device) -> None:
    """Raises UserError if two forwards of a text differ: no bound of rounding would then mean anything."""
    shortest = _shortest(data, numbers)[:1]
    first, second = (rewards_alone(model, data, shortest, device) for _ in range(2))
    if not (difference := float((first - second).abs().max())) <= floor(first):
        raise UserError(
            f"{type(model.backbone).__name__}: two forwards of one text give rewards that differ by {difference:.1e}: "
            "something in it is drawn at random; set its dropout or noise to 0 in config.json"
        )


def skips_weights(model: RewardModel, data: Comparisons, device: torch.device) -> bool:
    """Whether a batch may give some trained weights no gradient: indexers that select keys, experts without tokens.

    A batch without comparisons decides: its gradients are zeros, of all weights that take part in every batch.
    """
    with torch.enable_grad():
        out = model(build_batch(data, [], language=model.sft, multiple=model.multiple).on(device))
    nodes = [sum_.grad_fn for sum_ in (out.loss_sum, out.language_sum) if sum_ is not None]
    seen, reached = set(nodes), set()
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        reached.add(getattr(node, "variable", None))  # of an AccumulateGrad node
        new = {following for following, _ in node.next_functions} - seen
        seen |= new
        nodes += new
    return any(parameter.requires_grad and parameter not in reached for parameter in model.parameters())


def _tolerance(
    model: RewardModel, data: Comparisons, numbers: list[int], device: torch.device, oracle: Tensor
) -> float:
    """What rounding can do to these rewards: they are computed again with every embedded number off by one rounding."""
    with _moved_by_one_rounding(model):
        moved = float((rewards_alone(model, data, numbers, device) - oracle).abs().max())
    return max(all_roundings(moved, len(decoder_layers(model.backbone))), floor(oracle))


class BackwardTest:
    """Computes, for each answer, the gradient of its reward with respect to the embedded tokens of the batch.

    It must be exactly 0 at all tokens of other texts: a leak is a fault of structure, however small it is with these
    weights. With `compare`, it must also equal that of the text by itself: it passes through every layer, so it shows a
    wrong backward of any of them.
    """

    def __init__(
        self,
        model: RewardModel,
        data: Comparisons,
        numbers: list[int],
        device: torch.device,
        half: AbstractContextManager | None,
        *,
        compare: bool,
    ) -> None:
        self._model, self._data, self._device, self._half = model, data, device, half
        if model.context is not None:
            self._data = Shortened(data, GRADIENT_TOKENS)
        self._numbers = _shortest(self._data, numbers)
        self._oracle = self._alone() if compare else None
        if self._oracle is None:
            return
        with _moved_by_one_rounding(model):
            moved = max(map(_relative, self._alone(), self._oracle))
        # The backward rounds as often as the forward, and uses the rounded numbers of the forward.
        self._tolerance = max(all_roundings(2.0 * moved, len(decoder_layers(model.backbone))), GRADIENT_FLOOR)
        if half is not None:
            with half:
                self._tolerance += 3.0 * max(map(_relative, self._alone(), self._oracle))

    def run(self, path: str) -> tuple[str, float]:
        """What is wrong with the path that the model uses, "" if nothing is; and its largest relative error."""
        batch = build_batch(self._data, self._numbers, path == SHARED, multiple=self._model.multiple).on(self._device)
        batch, _ = self._model.long_rope.separated(batch)  # the texts as the backbone gets them
        largest = 0.0
        for answer, rows in enumerate(batch.answer_rows()):
            with torch.enable_grad(), self._half or nullcontext(), _embedded(self._model) as embedded:
                reward = self._model(batch).rewards_A[answer]
                gradient = self._model.packed_order(torch.autograd.grad(reward, embedded)[0], batch)
            others = torch.ones(len(gradient), dtype=torch.bool, device=gradient.device)
            others[rows] = False
            if (leak := float(gradient[others].abs().sum())) != 0.0:
                return f"a reward depends on tokens of another text (gradient {leak:.1e})", leak
            if self._oracle is not None:
                largest = max(largest, _relative(gradient[rows], self._oracle[answer]))
        if self._oracle is not None and not largest <= self._tolerance:
            return f"gradients differ from the plain backward's by {largest:.1e}", largest
        return "", largest

    def _alone(self) -> list[Tensor]:
        """The oracle: for each answer [tokens, D], its text by itself through the model as transformers runs it."""
        gradients = []
        for text in _texts(self._data, self._numbers, self._device):
            with torch.enable_grad(), _embedded(self._model) as embedded:
                gradients.append(torch.autograd.grad(self._model.reward_alone(text), embedded)[0][0])
        return gradients


class Shortened:
    """Comparisons of which each is cut to at most `tokens` computed tokens: its prompt and answers in proportion."""

    def __init__(self, data: Comparisons, tokens: int) -> None:
        self._data, self._tokens = data, tokens

    def comparison(self, number: int) -> TokenizedComparison:
        item = self._data.comparison(number)
        share = self._tokens / max(1, len(item.prefix) + sum(map(len, item.tails)))
        if share >= 1:
            return item
        # Of each part at least a token stays, so that no text becomes empty.
        prefix, *tails = (part[: max(1, int(share * len(part)))] for part in (item.prefix, *item.tails))
        return replace(item, prefix=prefix, tails=tails)


def trial_comparisons(tokens_N: np.ndarray, count: int = 4, limit: int = BEYOND_LONGEST) -> list[int]:
    """The longest comparison and a few others spread over the data, with at most `limit` tokens beyond the longest."""
    chosen = [int(np.argmax(tokens_N))]
    total = 0
    for number in np.linspace(0, len(tokens_N) - 1, count).astype(int).tolist():
        total += int(tokens_N[number])
        if number not in chosen and total <= limit:
            chosen.append(number)
    return chosen


def _longest(data: Comparisons, numbers: list[int]) -> int:
    """Most computed tokens of one of the comparisons, with its prompt shared."""
    items = (data.comparison(number) for number in numbers)
    return max(len(item.prefix) + sum(map(len, item.tails)) for item in items)


def _texts(data: Comparisons, numbers: list[int], device: torch.device) -> Iterator[Tensor]:
    for number in numbers:
        item = data.comparison(number)
        for tail in item.tails:
            yield torch.from_numpy(np.concatenate([item.prefix, tail]).astype(np.int64)).to(device)


def _shortest(data: Comparisons, numbers: list[int]) -> list[int]:
    """Two of the comparisons, so that texts have neighbours; fewer if they have more than GRADIENT_TOKENS."""
    tokens = {number: sum(map(len, _texts(data, [number], torch.device("cpu")))) for number in numbers}
    first, *others = sorted(numbers, key=tokens.__getitem__)
    return [first, *(other for other in others[:1] if tokens[first] + tokens[other] <= GRADIENT_TOKENS)]


@contextmanager
def _embedded(model: RewardModel) -> Iterator[list[Tensor]]:
    """Collects what the embedding returns in the forwards within: [1, T, D], where a gradient can end."""
    outputs: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())  # LoRA freezes the embedding, so that its output needs none
        return outputs[-1].clone()  # a model may change its embeddings in place, which a leaf does not permit

    hook = model.backbone.get_input_embeddings().register_forward_hook(keep)
    try:
        yield outputs
    finally:
        hook.remove()


@contextmanager
def _moved_by_one_rounding(model: RewardModel) -> Iterator[None]:
    """Within, every number that the embedding returns is off by one fp32 rounding, up or down."""
    generator = torch.Generator().manual_seed(0)

    def move(_: Any, __: Any, output: Tensor) -> Tensor:
        signs = torch.randint(2, output.shape, generator=generator).to(output) * 2.0 - 1.0
        return output * (1.0 + UNIT_ROUNDOFF[torch.float32] * 2.0 * signs)

    hook = model.backbone.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).double().norm() / expected.double().norm().clamp(min=1e-30))
