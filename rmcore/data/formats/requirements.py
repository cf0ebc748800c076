"""What an objective reads of the rows beyond pairs and margins: ties, scores; and whether a source can give it.

In: the RowFormat of a source and the section `loss`. Out: the format with what is to be read, or a UserError; of the
tokenised data, what the objective counts.
Example: `loss.name=regression` on rows with score_a and score_b reads both; on rows with chosen and rejected alone it
is refused before anything is tokenised.

Ties come from rows whose scores or ranks are equal, from the verdict `tie` (winner, votes: its share of them), and from
a probability of exactly 0.5. Objectives that do not read ties drop such pairs; a probability of 0.5 is then an even
split, and a vote for neither counts half for each.
"""

from dataclasses import replace

from rmcore.config import UserError
from rmcore.config.loss import LossConfig
from rmcore.data.formats.row_format import RowFormat


def fitted(format: RowFormat, loss: LossConfig, *, origin: str, key: str) -> RowFormat:
    """The format with `ties` and `scores` as the objective reads them.

    Scores that evaluation data lack (`key` data.eval) are no mistake: the objective's own loss is left out there.
    Raises UserError for rows that the objective cannot be trained on.
    """
    traits = loss.traits
    if not traits.soft and format.judged_by in ("probability", "votes"):
        raise UserError(
            f"{origin}: loss.name={loss.name} needs rankings, but these rows hold {format.judged_by} (soft labels); "
            "choose loss.name=bradley_terry, which takes them"
        )
    scored = traits.scores and has_scores(format)
    if traits.scores and not scored and key != "data.eval":
        told = "ranks, which say only the order" if format.judged_by == "ranks" else str(format)
        raise UserError(
            f"{origin}: loss.name={loss.name} needs a score of each answer (score; scores; score_a and score_b; "
            f"score_chosen and score_rejected), but these rows hold {told}; set {key}.columns={{score: ...}} (our "
            "name: theirs), or another loss.name"
        )
    return replace(format, ties=traits.ties, scores=scored)


def has_scores(format: RowFormat) -> bool:
    """Whether every answer of these rows comes with a number that means more than its rank."""
    sides = {"pair": {"score_chosen", "score_rejected"}, "two": {"score_a", "score_b"}, "single": {"score"}}
    if format.layout == "many":
        return format.judged_by == "scores"
    return sides[format.layout] <= format.names.keys()
