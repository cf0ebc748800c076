"""Checks that a source has what the objective reads besides pairs and margins: ties, scores.

Input: the RowFormat of a source, and the section `loss` of the config.
Output: the format with `ties` and `scores` set as the objective reads them, or a UserError.
Example: `loss.name=regression` on rows with score_a and score_b reads both scores. Rows with only chosen and rejected
raise an error before anything is tokenised.

Ties come from equal scores or ranks, from the verdict `tie` (as the winner, or its share of the votes), and from a
probability of exactly 0.5. Objectives that do not read ties drop such pairs. For them a probability of 0.5 is an even
split, and a vote for neither counts half for each answer.
"""

from dataclasses import replace

from rmcore.config import UserError
from rmcore.config.loss import LossConfig
from rmcore.data.formats.row_format import RowFormat


def fitted(format: RowFormat, loss: LossConfig, *, origin: str, key: str) -> RowFormat:
    """The format with `ties` and `scores` as the objective reads them.

    Evaluation data (`key` data.eval, data.eval[1], ...) without scores are not an error: the objective's own loss is
    then left out.
    Raises UserError for rows that the objective cannot be trained on.
    """
    traits = loss.traits
    if not traits.soft and format.judged_by in ("probability", "votes"):
        raise UserError(
            f"{origin}: loss.name={loss.name} needs rankings, but these rows hold {format.judged_by} (soft labels); "
            "choose loss.name=bradley_terry, which takes them"
        )
    scored = traits.scores and format.has_scores
    if traits.scores and not scored and not key.startswith("data.eval"):
        found = "ranks, which say only the order" if format.judged_by == "ranks" else str(format)
        raise UserError(
            f"{origin}: loss.name={loss.name} needs a score of each answer (score; scores; score_a and score_b; "
            f"score_chosen and score_rejected), but these rows hold {found}; set {key}.columns={{score: ...}} (our "
            "name: theirs), or another loss.name"
        )
    if loss.attributes and not any(format.attributes) and not key.startswith("data.eval"):
        raise UserError(
            f"{origin}: loss.output={list(loss.attributes)} needs the attributes of each answer, but these rows hold "
            f"none of them; set {key}.columns={{{loss.attributes[0]}: ...}} (our name: theirs)"
        )
    if "weight" in format.names and traits.counts != "pairs":
        raise UserError(
            f"{origin}: {key}.columns maps weight, which objectives over pairs read; loss.name={loss.name} does not"
        )
    return replace(format, ties=traits.ties, scores=scored, targets=scored and traits.targets)
