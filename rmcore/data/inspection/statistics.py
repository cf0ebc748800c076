"""Computes statistics of the tokenised data: lengths, sharing, length bias, sources.

Input: `TokenizedComparisons`.
Output: a dict of plain numbers (for --json), and lines of text.
Example: chosen answers of 10 and 6 tokens and rejected ones of 4 and 6 give {"longer": 0.5, "shorter": 0.0,
"equal": 0.5}: always preferring the longer answer is right in 75 % of these pairs (an equal length counts half).

The length of an answer is `TokenizedComparisons.answer_length_A`.
"""

from typing import Any

import numpy as np

from rmcore.config import UserError
from rmcore.data.tokens.comparisons import TokenizedComparisons

PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
PADDED_PAIRS = 8  # pairs of a padded batch, for the comparison with padding
MOST_SOURCES = 20  # sources that `lines` shows


def statistics(part: TokenizedComparisons, seed: int = 0) -> dict[str, Any]:
    """The report of the preparation and the statistics of the kept rows. Every value can be written as JSON.

    `seed`: of the order in which padded batches are formed. Raises UserError if there are no pairs.
    """
    chosen_P, rejected_P = of_pairs(part, part.text_length_A)
    chosen_answer_P, rejected_answer_P = of_pairs(part, part.answer_length_A)
    if not len(chosen_P):
        raise UserError(
            f"{part.report['key']}: no row prefers one answer, so there is no chosen and rejected to compare"
        )
    source_P = np.repeat(part.source_index, part.pairs_N)
    lengths = {
        "prompt": part.prompt_length,
        "chosen": chosen_answer_P,
        "rejected": rejected_answer_P,
        "text": part.text_length_A,
    }
    by_source: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(part.sources):
        members = source_P == index
        if members.any():
            comparisons = int((part.source_index == index).sum())
            bias = length_bias(chosen_P[members], rejected_P[members])
            by_source[name] = {"comparisons": comparisons, "pairs": int(members.sum()), "length_bias": bias}
    return {
        **part.report,
        "prompts": len(np.unique(part.prompt_hash)),
        "most_answers": int(np.diff(part.answer_offset).max()),
        "lengths": {name: _percentiles(values) for name, values in lengths.items()},
        "tokens": tokens(part, chosen_P, rejected_P, seed),
        "length_bias": length_bias(chosen_P, rejected_P),
        "sources": dict(sorted(by_source.items(), key=lambda item: -int(item[1]["pairs"]))),
        "fingerprint": part.fingerprint,
    }


def of_pairs(part: TokenizedComparisons, values_A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[P] each: a value of each answer, for the winner and for the loser of every pair."""
    first_P = np.repeat(part.answer_offset[:-1], part.pairs_N)
    return values_A[first_P + part.winner], values_A[first_P + part.loser]


def tokens(part: TokenizedComparisons, chosen_P: np.ndarray, rejected_P: np.ndarray, seed: int) -> dict[str, Any]:
    """Tokens that an epoch computes: in padded batches, pair by pair without padding, and with each prompt once."""
    # A padded batch takes 2 rows per pair, each as long as its longest text. The pairs are in random order.
    longest = np.maximum(chosen_P, rejected_P)[np.random.Generator(np.random.PCG64(seed)).permutation(len(chosen_P))]
    starts = np.arange(0, len(longest), PADDED_PAIRS)
    rows = 2 * np.diff(np.append(starts, len(longest)))
    padded = int((np.maximum.reduceat(longest, starts) * rows).sum())
    separate, computed = int((chosen_P + rejected_P).sum()), len(part.tokens)
    return {
        "padded": padded,
        "padded_batch": PADDED_PAIRS,
        "separate": separate,
        "computed": computed,
        "saved_by_packing": 1 - separate / padded,
        "saved_by_sharing": 1 - computed / separate,
        "saved": 1 - computed / padded,
        "sharing_ratio": separate / computed,
    }


def length_bias(chosen_P: np.ndarray, rejected_P: np.ndarray) -> dict[str, float]:
    """The shares of pairs in which the chosen text is longer, shorter, or equally long."""
    longer, shorter = float((chosen_P > rejected_P).mean()), float((chosen_P < rejected_P).mean())
    return {"longer": longer, "shorter": shorter, "equal": float((chosen_P == rejected_P).mean())}


def lines(statistics: dict[str, Any]) -> list[str]:
    """The statistics as text: lengths, tokens, length bias, sources."""
    heads = " ".join(f"{head:>7}" for head in ("5 %", "25 %", "median", "75 %", "95 %", "99 %", "longest"))
    text = [f"  lengths in tokens   {'mean':>8} {heads}"]
    labels = {"prompt": "prompt", "chosen": "chosen answer", "rejected": "rejected answer", "text": "prompt and answer"}
    for name, label in labels.items():
        row = statistics["lengths"][name]
        text.append(f"    {label:<17} {row['mean']:>8.1f} " + " ".join(f"{row[str(p)]:>7,.0f}" for p in PERCENTILES))
    use, bias = statistics["tokens"], statistics["length_bias"]
    text += [
        f"  tokens computed     {use['padded']:,} in padded batches of {use['padded_batch']} pairs, "
        f"{use['separate']:,} packed, {use['computed']:,} with each prompt once",
        f"    saved             {use['saved']:.1%}: packing saves {use['saved_by_packing']:.1%} of the padded, sharing "
        f"{use['saved_by_sharing']:.1%} of the packed (sharing ratio {use['sharing_ratio']:.2f})",
        f"  length bias         the chosen answer is longer in {bias['longer']:.1%} of the pairs, shorter in "
        f"{bias['shorter']:.1%}: always preferring the longer one is right in {bias['longer'] + bias['equal'] / 2:.1%}",
        f"  prompts             {statistics['prompts']:,} different ones in {statistics['comparisons']:,} comparisons, "
        f"at most {statistics['most_answers']} answers each",
        f"  repeated rows       {statistics['repeated']:,}; contradicted {statistics['contradicted']:,}",
    ]
    text.append(f"  sources             {'pairs':>12} {'longer chosen':>14}")
    for name, row in list(statistics["sources"].items())[:MOST_SOURCES]:
        text.append(f"    {name[:40]:<17} {row['pairs']:>12,} {row['length_bias']['longer']:>14.1%}")
    if len(statistics["sources"]) > MOST_SOURCES:
        text.append(f"    ... and {len(statistics['sources']) - MOST_SOURCES} more")
    return text


def _percentiles(values: np.ndarray) -> dict[str, float]:
    found = np.percentile(values, PERCENTILES)
    return {"mean": float(values.mean()), **{str(p): float(v) for p, v in zip(PERCENTILES, found, strict=True)}}
