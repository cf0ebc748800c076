"""The losses that are added to the objectives: language modelling of the chosen answers, decorrelation from length, and
the balance of experts where no objective holds it.

Input: the output of each micro batch of a step.
Output: what it adds to the loss of the step, as the gradient of one rank (the mean over ranks is taken later).
Example: loss.sft=0.01, a step of 500 tokens of chosen answers on 2 ranks, and a summed loss of 600 in this micro batch:
0.01 * 600 * 2 / 500 = 0.024.

Each is one mean over the whole step, on all ranks, whatever objectives its comparisons have: over the tokens of the
chosen answers (any answer that wins a pair and loses none), over all answers, and over all texts.
"""

from collections.abc import Iterator

from torch import Tensor

from rmcore.data.batches.batch import RaggedBatch
from rmcore.data.batches.step_plan import Step
from rmcore.model.reward_model import Output
from rmcore.training.decorrelation import Decorrelation
from rmcore.training.run import Run


class Regularisers:
    """Those that the section `loss` asks for; without any, every method does nothing."""

    def __init__(self, run: Run) -> None:
        self._sft, self._ranks, self._language_tokens = run.config.loss.sft, run.world.size, 1.0
        self._router_aux, self._answers = run.config.loss.router_aux, 1.0
        self._decorrelation = Decorrelation(run) if run.config.loss.length_decorrelation else None

    def begin(
        self, step: Step, micro_batches: Iterator[tuple[RaggedBatch, bool]]
    ) -> Iterator[tuple[RaggedBatch, bool]]:
        """Call it before the first micro batch of a step; returns the micro batches. A collective."""
        self._language_tokens, self._answers = max(1.0, step.language_tokens), max(1.0, step.answers)
        return self._decorrelation.first_pass(micro_batches) if self._decorrelation else micro_batches

    def loss(self, output: Output, batch: RaggedBatch) -> Tensor | float:
        """What this micro batch adds to the loss of the step."""
        total: Tensor | float = 0.0
        if output.language_sum is not None:
            total = output.language_sum * (self._sft * self._ranks / self._language_tokens)
        if output.balance_sum is not None and output.balance_sum.requires_grad:
            total = total + output.balance_sum * (self._router_aux * self._ranks / self._answers)
        if self._decorrelation:
            total = total + self._decorrelation.loss(output, batch) * self._ranks
        return total

    def logged(self) -> dict[str, float]:
        """Metrics of the last step; may wait for the device."""
        return self._decorrelation.logged() if self._decorrelation else {}
