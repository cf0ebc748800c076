"""Reads what a row says of its answers: ranks, scores, a winner, a probability or votes.

Input: a row and its RowFormat.
Output: a Judgement: pairs (winner, loser) with margins and weights, and ties.
Examples: the scores 5, 3, 3 give the pairs (0, 1) and (0, 2) of weight 1/3 each (the third pair ties). A probability of
0.7 that the first of two is better gives (0, 1) of weight 0.7 and (1, 0) of weight 0.3; the sum of their losses is the
cross entropy with a soft label. The votes [1, 1, 2] are the probability 2/3.

Each pair of K answers has the weight 1 / C(K, 2), so that a comparison counts once, however many answers it has
(InstructGPT, arXiv 2203.02155, section 3.5).

A `margin` column holds by how much the winner leads, whatever decides who wins: {"winner": "b", "margin": 2} gives the
pair (1, 0) of margin 2. For a soft label it is the lead of the likelier answer; the other direction has it negated.

Pairs that tie are dropped unless the objective reads them (RowFormat.ties); then they form a list of their own. With
ties, the scores 5, 3, 3 also give the tie (1, 2) of weight 1/3, and the votes [1, 1, tie] give (0, 1) of weight 2/3 and
a tie of weight 1/3.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rmcore.config import UserError
from rmcore.data.formats import fields
from rmcore.data.formats.fields import short
from rmcore.data.formats.row_format import LAYOUTS, SCORES, RowFormat, attribute_values
from rmcore.data.labels import Judgement

TIES = ("tie", "ties", "both", "bothbad", "neither", "none", "draw", "equal")

NOTHING, TIE = Judgement(), Judgement(ties=((0, 1),), tie_weight=(1.0,))


def all_pairs(values: Sequence[float], *, margins: bool, ties: bool = False) -> Judgement:
    """Every pair of answers whose values differ; the greater value wins.

    `margins`: the difference is the margin of the pair, else 0. `ties`: pairs of equal values become ties.
    """
    every = [*itertools.combinations([i for i, value in enumerate(values) if math.isfinite(value)], 2)]
    pairs = [(i, j) if values[i] > values[j] else (j, i) for i, j in every if values[i] != values[j]]
    equal = [(i, j) for i, j in every if values[i] == values[j]] if ties else []
    weight = 1.0 / len(every) if every else 0.0
    margin = tuple(values[winner] - values[loser] if margins else 0.0 for winner, loser in pairs)
    return Judgement(
        pairs=tuple(pairs),
        margin=margin,
        weight=(weight,) * len(pairs),
        ties=tuple(equal),
        tie_weight=(weight,) * len(equal),
    )


def soft(first: float, second: float, margin: float) -> Judgement:
    """Both directions of a pair, weighted by the probabilities that the first or the second answer is better.

    `margin`: by how much the first leads.

    A direction of weight 0 is left out. If the two add up to less than 1, the rest is the weight of a tie.
    """
    both = [((0, 1), margin, first), ((1, 0), -margin, second)]
    kept = [entry for entry in both if entry[2] > 0.0]
    pairs, margins, weights = zip(*kept, strict=True) if kept else ((), (), ())
    tie = TIE if first + second < 1.0 - 1e-9 else NOTHING
    return replace(tie, pairs=pairs, margin=margins, weight=weights, tie_weight=(1.0 - first - second,) * len(tie.ties))


def judge(row: Mapping[str, Any], format: RowFormat, where: str) -> tuple[list[tuple[Any, str]], Judgement]:
    """-> (value, name for errors) of each answer of a row, and what the row says of them.

    Raises UserError for a field that cannot be read.
    """
    raw, judgement = _judge(row, format, where)
    if "weight" in format.names:
        judgement = weighted(judgement, fields.number(row, format.names["weight"], where), where)
    if any(format.attributes):
        columns = [attributes_of(row, format, theirs, len(raw), where) for theirs in format.attributes]
        judgement = replace(judgement, attributes=tuple(zip(*columns, strict=True)))
    return raw, judgement


def weighted(judgement: Judgement, weight: float, where: str) -> Judgement:
    """The judgement with the weight of its row: what its pairs and ties add to the loss and to its count."""
    if weight < 0.0:
        raise UserError(f"{where}: the weight of a row must not be negative, but it is {weight}")
    if weight == 0.0:
        return replace(judgement, pairs=(), margin=(), weight=(), ties=(), tie_weight=())
    return replace(
        judgement,
        weight=tuple(weight * one for one in judgement.weight),
        tie_weight=tuple(weight * one for one in judgement.tie_weight),
    )


def attributes_of(row: Mapping[str, Any], format: RowFormat, theirs: str, answers: int, where: str) -> list[float]:
    """The values of one attribute, NaN where it is missing; raises UserError for what is not a number."""
    if not theirs:
        return [math.nan] * answers
    cells = attribute_values(row, format, theirs)
    return [math.nan if cell is None else fields.number_of(cell, theirs, where) for cell in cells]


def _judge(row: Mapping[str, Any], format: RowFormat, where: str) -> tuple[list[tuple[Any, str]], Judgement]:
    names = format.names
    if format.layout == "many":
        return judge_list(row, format, where)
    if format.layout == "single":
        missing = any(format.attributes) and row.get(names["score"]) is None
        judgement = Judgement(scores=(math.nan if missing else fields.number(row, names["score"], where),))
        return [(fields.value(row, names["answer"], where), names["answer"])], judgement
    raw = [(fields.value(row, names.get(side, side), where), names[side]) for side in LAYOUTS[format.layout]]
    judgement = judge_two(row, format, where)
    if not format.scores:
        return raw, judgement
    scores = scores_of_two(row, format, where)
    return raw, replace(judgement, scores=tuple(targets_of(scores, format, where)) if format.targets else scores)


def judge_two(row: Mapping[str, Any], format: RowFormat, where: str) -> Judgement:
    """The judgement of a row with two answers, without their scores."""
    names, by = format.names, format.judged_by
    pair = format.layout == "pair"
    if by in ("score_a", "preference"):
        if by == "score_a":
            values = [fields.number(row, names[name], where) for name in ("score_a", "score_b")]
        else:  # negative: the first answer is better, positive: the second
            values = [-fields.number(row, names[by], where), 0.0]
        judgement = all_pairs(values, margins=format.margin == "scores", ties=format.ties)
        if format.margin != "margin" or not judgement.pairs:
            return judgement
        return replace(judgement, margin=(fields.number(row, names["margin"], where),))
    if pair and format.ties and format.has_scores and len(set(scores_of_two(row, format, where))) == 1:
        return TIE
    if by in ("probability", "votes"):
        first, second = _shares(row, format, where)
        if by == "probability" and format.ties and first == second:
            return TIE
        leader = 0 if pair or first > second else 1 if first < second else None
        return soft(first, second, _lead_of_first(row, format, leader, where))
    winner = 0  # chosen
    if by == "winner":
        verdict = side(fields.value(row, names[by], where), _spellings(format), names[by], where)
        if verdict is None:
            return TIE if format.ties else NOTHING
        winner = verdict
    lead = _lead_of_first(row, format, winner, where)
    return Judgement(pairs=((winner, 1 - winner),), margin=(-lead if winner else lead,), weight=(1.0,))


def scores_of_two(row: Mapping[str, Any], format: RowFormat, where: str) -> tuple[float, float]:
    """The scores of a row's two answers, first those of chosen or answer_a."""
    first, second = SCORES[format.layout]
    return fields.number(row, format.names[first], where), fields.number(row, format.names[second], where)


def judge_list(row: Mapping[str, Any], format: RowFormat, where: str) -> tuple[list[tuple[Any, str]], Judgement]:
    """-> (value, name for errors) of each answer in a row's list, and the judgement that their ranks or scores make."""
    name = format.names["answers"]
    answers = fields.records(fields.value(row, name, where))
    if not isinstance(answers, list):
        raise UserError(f"{where}: {name} must be a list of answers, as in the first rows, not {short(answers)}")
    raw: list[tuple[Any, str]] = []
    values: list[float] = []
    for number, answer in enumerate(answers):
        place = f"{name}[{number}]"
        if format.item_text:
            if not isinstance(answer, Mapping):
                raise UserError(f"{where}: {place} must be a record, as in the first rows, not {short(answer)}")
            raw.append((fields.value(answer, format.item_text, f"{where}: {place}"), f"{place}.{format.item_text}"))
            if format.item_value:
                values.append(fields.number(answer, format.item_value, f"{where}: {place}"))
        else:
            raw.append((answer, place))
    if not format.item_value:
        by = format.names[format.judged_by]
        listed = fields.value(row, by, where)
        if not isinstance(listed, list) or len(listed) != len(raw):
            raise UserError(f"{where}: {by} must be a list of {len(raw)} numbers, one per answer, not {short(listed)}")
        values = [fields.number_of(one, f"{by}[{i}]", where) for i, one in enumerate(listed)]
    if format.judged_by == "ranks":  # 1 is the best
        values = [-value for value in values]
    judgement = all_pairs(values, margins=format.margin == "scores", ties=format.ties)
    scores = targets_of(values, format, where) if format.targets else values
    return raw, replace(judgement, scores=tuple(scores)) if format.scores else judgement


def targets_of(values: Sequence[float], format: RowFormat, where: str) -> list[float]:
    """Probabilities that add up to 1: those of the row, in proportion, or the softmax of its scores (ListNet)."""
    if format.judged_by != "probabilities":
        top = max(values, default=0.0)
        values = [math.exp(value - top) for value in values]
    total = sum(values)
    if min(values, default=0.0) < 0.0 or total <= 0.0:
        raise UserError(f"{where}: probabilities must not be negative, and one must be positive, not {list(values)}")
    return [value / total for value in values]


def side(found: Any, spellings: Sequence[frozenset[str]], name: str, where: str) -> int | None:
    """Which of two answers a judge chose: 0, 1, or None for a tie."""
    verdict = str(found).strip().lower()
    for number, names in enumerate(spellings):
        if verdict in names:
            return number
    if verdict in TIES or verdict.startswith("tie") or (verdict == "0" and "1" in spellings[0]):
        return None
    known = " or ".join("/".join(sorted(names)) for names in spellings)
    raise UserError(f"{where}: {name} must be an answer ({known}) or a tie, not {short(found)}")


def _spellings(format: RowFormat) -> tuple[frozenset[str], frozenset[str]]:
    """The names of the two answers in verdicts: their columns, and the last letter of the columns ("a", "1", ...)."""
    if format.layout == "pair":
        return frozenset({"chosen", "1"}), frozenset({"rejected", "2"})
    columns = [format.names[name].lower() for name in ("answer_a", "answer_b")]
    endings = [column[-1] for column in columns]
    if endings[0] == endings[1] or not all(ending.isalnum() for ending in endings):
        endings = ["a", "b"]
    return tuple(  # type: ignore[return-value]
        frozenset({column, ending, f"model_{ending}", f"response_{ending}", f"answer_{ending}"})
        for column, ending in zip(columns, endings, strict=True)
    )


def _shares(row: Mapping[str, Any], format: RowFormat, where: str) -> tuple[float, float]:
    """The probabilities of the first answer and of the second, or their shares of the votes. If the objective reads no
    ties, a vote for neither counts half for each."""
    name = format.names[format.judged_by]
    if format.judged_by == "probability":
        probability = fields.probability(row, name, where)
        return probability, 1.0 - probability
    votes = fields.value(row, name, where)
    if not isinstance(votes, list) or not votes:
        raise UserError(f"{where}: {name} must be a list of votes, not {short(votes)}")
    spellings = _spellings(format)
    named = [side(vote, spellings, f"{name}[{i}]", where) for i, vote in enumerate(votes)]
    half = 0.0 if format.ties else named.count(None) / 2
    first = (named.count(0) + half) / len(named)
    return first, (named.count(1) + half) / len(named) if format.ties else 1.0 - first


def _lead_of_first(row: Mapping[str, Any], format: RowFormat, winner: int | None, where: str) -> float:
    """By how much the first of two answers leads if `winner` is better (None: neither); 0.0 if margins are not read."""
    if format.margin == "scores":
        first, second = scores_of_two(row, format, where)
        return first - second
    if format.margin != "margin":
        return 0.0
    margin = fields.number(row, format.names["margin"], where)
    return {0: margin, 1: -margin, None: 0.0}[winner]
