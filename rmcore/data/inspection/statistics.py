"""What the tokenised data look like: lengths, sharing, length bias, sources.

In: `TokenizedComparisons`. Out: a dict of plain numbers (for --json and the tables), lines of text.
Example: chosen answers of 10 and 6 tokens against rejected ones of 4 and 6 -> {"longer": 0.5, "shorter": 0.0,
"equal": 0.5}: whoever always prefers the longer answer is right in 75 % of these pairs (an equal length counts half).

Lengths of answers are the tokens behind the prompt, what the template writes around an answer among them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rmcore.config import UserError
from rmcore.data.tokens.comparisons import TokenizedComparisons

PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
PADDED_PAIRS = 8  # the batch that padding is compared with: pairs, in random order


def statistics(part: TokenizedComparisons, seed: int = 0) -> dict[str, Any]:
    """The report of the preparation, and figures of what was kept; every value can be written as JSON.

    Raises UserError where there is no pair.
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
    longest = np.maximum(chosen_P, rejected_P)[np.random.Generator(np.random.PCG64(seed)).permutation(len(chosen_P))]
    starts = np.arange(0, len(longest), PADDED_PAIRS)
    rows = 2 * np.diff(np.append(starts, len(longest)))
    padded = int((np.maximum.reduceat(longest, starts) * rows).sum())
    separate, computed = int((chosen_P + rejected_P).sum()), len(part.tokens)
    return {
        "padded": padded, "padded_batch": PADDED_PAIRS, "separate": separate, "computed": computed,
        "saved_by_packing": 1 - separate / padded, "saved_by_sharing": 1 - computed / separate,
        "saved": 1 - computed / padded, "sharing_ratio": separate / computed,
    }  # fmt: skip


def length_bias(chosen_P: np.ndarray, rejected_P: np.ndarray) -> dict[str, float]:
    """How often the chosen text is the longer one, the shorter one, or neither."""
    longer, shorter = float((chosen_P > rejected_P).mean()), float((chosen_P < rejected_P).mean())
    return {"longer": longer, "shorter": shorter, "equal": float((chosen_P == rejected_P).mean())}


def lines(figures: dict[str, Any], most_sources: int = 20) -> list[str]:
    """The figures as text: lengths, tokens, length bias, sources."""
    heads = " ".join(f"{head:>7}" for head in ("5 %", "25 %", "median", "75 %", "95 %", "99 %", "longest"))
    told = [f"  lengths in tokens   {'mean':>8} {heads}"]
    for name, label in (("prompt", "prompt"), ("chosen", "chosen answer"), ("rejected", "rejected answer"),
                        ("text", "prompt and answer")):  # fmt: skip
        row = figures["lengths"][name]
        told.append(f"    {label:<17} {row['mean']:>8.1f} " + " ".join(f"{row[str(p)]:>7,.0f}" for p in PERCENTILES))
    use, bias = figures["tokens"], figures["length_bias"]
    told += [
        f"  tokens computed     {use['padded']:,} in padded batches of {use['padded_batch']} pairs, "
        f"{use['separate']:,} packed, {use['computed']:,} with each prompt once",
        f"    saved             {use['saved']:.1%}: packing saves {use['saved_by_packing']:.1%} of the padded, sharing "
        f"{use['saved_by_sharing']:.1%} of the packed (sharing ratio {use['sharing_ratio']:.2f})",
        f"  length bias         the chosen answer is longer in {bias['longer']:.1%} of the pairs, shorter in "
        f"{bias['shorter']:.1%}: always preferring the longer one is right in {bias['longer'] + bias['equal'] / 2:.1%}",
        f"  prompts             {figures['prompts']:,} different ones in {figures['comparisons']:,} comparisons, "
        f"at most {figures['most_answers']} answers each",
        f"  repeated rows       {figures['repeated']:,}; contradicted {figures['contradicted']:,}",
    ]
    told.append(f"  sources             {'pairs':>12} {'longer chosen':>14}")
    for name, row in list(figures["sources"].items())[:most_sources]:
        told.append(f"    {name[:40]:<17} {row['pairs']:>12,} {row['length_bias']['longer']:>14.1%}")
    if len(figures["sources"]) > most_sources:
        told.append(f"    ... and {len(figures['sources']) - most_sources} more")
    return told


def _percentiles(values: np.ndarray) -> dict[str, float]:
    found = np.percentile(values, PERCENTILES)
    return {"mean": float(values.mean()), **{str(p): float(v) for p, v in zip(PERCENTILES, found, strict=True)}}
