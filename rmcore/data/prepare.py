"""From the configuration to tokenised comparisons: sources -> comparisons -> rendered texts -> ids, cached on disk.

In: `Config`, the tokenizer, the model's positions. Out: `PreparedData(train, eval)`, memory-mapped. Example: 1,900 rows
with eval_fraction 0.1 give a train part and an eval part of some 1,710 and 190 rows that have no prompt in common; the
second start reads both from the cache.

Every rank may call `prepare_data` at once: one builds, the others wait for it (rmcore.data.tokens.cache). No
collectives.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rmcore.config import Config, UserError
from rmcore.data.inspection.summary import describe_part
from rmcore.data.pipeline import Part, Progress
from rmcore.data.reading.sources import load_sources
from rmcore.data.tokens.comparisons import TokenizedComparisons
from rmcore.data.tokens.end_tokens import answer_ends, ending_warning
from rmcore.data.tokens.templates import Template, load_template
from rmcore.data.tokens.tokenizer import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class PreparedData:
    """`eval` is None when the run does not evaluate. `template` is what the texts were rendered with. `notes`: what was
    done without being asked (a padding token chosen); `warnings`: what may be wrong."""

    train: TokenizedComparisons
    eval: TokenizedComparisons | None
    template: Template
    warnings: list[str]
    notes: tuple[str, ...] = ()


def prepare_data(
    config: Config,
    tokenizer: PreTrainedTokenizerFast,
    model_max_length: int | None,
    progress: Progress | None = None,
) -> PreparedData:
    """Reads, renders, tokenises and caches the data of `config.data`; safe to call from every rank at once.

    `tokenizer` is load_tokenizer's; `model_max_length` the positions of the model, None if it has no limit.
    `progress(done, total, what)` is called now and then by the process that builds.
    Raises UserError: limits that the model cannot hold, sources that cannot be read, bad rows, no row kept.
    """
    limit = config.data.max_tokens
    if model_max_length is not None and limit > model_max_length:
        raise UserError(
            f"data.max_tokens={limit} is more than the {model_max_length} positions of model.name={config.model.name}; "
            f"set data.max_tokens={model_max_length} or lower"
        )
    template = load_template(config.data.template, tokenizer)
    root = cache_directory(config)
    seed = config.run.seed
    sources = load_sources(config.data.train, seed=seed, limit=config.data.limit, cache_dir=root, key="data.train")
    part = Part(
        "data.train", sources, config, tokenizer, tokenizer_fingerprint(tokenizer), template, answer_ends(tokenizer),
        progress,
    )  # fmt: skip
    told = ending_warning(template, tokenizer)
    wants_eval = config.run.evals > 0
    if not config.data.eval:
        fraction = config.data.eval_fraction
        train = replace(part, holdout="train").tokenized(root) if fraction else part.tokenized(root)
        evaluation = replace(part, holdout="eval").tokenized(root) if fraction and wants_eval else None
        return PreparedData(train, evaluation, template, [*told, *_warnings(train, evaluation)])
    train, evaluation = part.tokenized(root), None
    if wants_eval:
        sources = load_sources(config.data.eval, seed=seed, limit=config.data.limit, cache_dir=root, key="data.eval")
        evaluation = replace(part, key="data.eval", sources=sources).tokenized(root)
    return PreparedData(
        train, evaluation, template, [*told, *_warnings(train, evaluation), *_overlap(train, evaluation)]
    )


def cache_directory(config: Config) -> Path:
    """data.cache, else $RMCORE_CACHE, else ~/.cache/rmcore."""
    return Path(config.data.cache or os.environ.get("RMCORE_CACHE") or "~/.cache/rmcore").expanduser().resolve()


def _warnings(*parts: TokenizedComparisons | None) -> list[str]:
    return [f"{part.report['key']}: {line}" for part in parts if part is not None for line in part.report["warnings"]]


def _overlap(train: TokenizedComparisons, evaluation: TokenizedComparisons | None) -> list[str]:
    if evaluation is None:
        return []
    shared = int(np.isin(evaluation.prompt_hash, train.prompt_hash).sum())
    if not shared:
        return []
    return [f"data.eval: {shared:,} of {len(evaluation):,} comparisons have a prompt that data.train has too"]


def describe(prepared: PreparedData, config: Config) -> str:
    """The data summary, printed before a run: a paragraph for train and one for eval, then the warnings."""
    parts = [part for part in (prepared.train, prepared.eval) if part is not None]
    told = [*(f"note: {note}" for note in prepared.notes), *(f"warning: {warning}" for warning in prepared.warnings)]
    return "\n".join([*(describe_part(part, config) for part in parts), *told])
