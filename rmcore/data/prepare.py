"""Prepares the data of a run: sources -> comparisons -> rendered texts -> token ids, cached on disk.

Input: the `Config`, the tokenizer, the number of positions of the model.
Output: `PreparedData(train, eval)`, memory-mapped.
Example: 1,900 rows with eval_fraction 0.1 give a train part of some 1,710 rows and an eval part of some 190, which have
no prompt in common. The second start reads both from the cache.

All ranks may call `prepare_data` at the same time: one builds, the others wait (rmcore.data.tokens.cache). There are no
collectives.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from rmcore.config import Config, UserError
from rmcore.data.inspection.summary import describe_part
from rmcore.data.pipeline import Part, Progress
from rmcore.data.reading.sources import load_sources
from rmcore.data.tokens.comparisons import TokenizedComparisons
from rmcore.data.tokens.end_tokens import answer_ends, ending_warning
from rmcore.data.tokens.templates import Template, template_of
from rmcore.data.tokens.tokenizer import tokenizer_fingerprint


@dataclass(frozen=True)
class PreparedData:
    """The tokenised data of a run."""

    train: TokenizedComparisons
    eval: TokenizedComparisons | None  # None if the run does not evaluate
    template: Template  # with which the texts were rendered
    warnings: list[str]
    notes: tuple[str, ...] = ()  # choices that were made for the user (a padding token, a date)


def prepare_data(
    config: Config,
    tokenizer: PreTrainedTokenizerFast,
    model_max_length: int | None,
    progress: Progress | None = None,
) -> PreparedData:
    """Reads, renders, tokenises and caches the data of `config.data`. All ranks may call it at the same time.

    `tokenizer`: from load_tokenizer. `model_max_length`: the positions of the model, None if it has no limit.
    `progress(done, total, what)` is called now and then by the process that builds.
    Raises UserError for limits beyond the model's positions, sources or rows that cannot be read, or if no row is kept.
    """
    limit = config.data.max_tokens
    if model_max_length is not None and limit > model_max_length:
        raise UserError(
            f"data.max_tokens={limit} is more than the {model_max_length} positions of model.name={config.model.name}; "
            f"set data.max_tokens={model_max_length} or lower"
        )
    template = template_of(config, tokenizer)
    root = cache_directory(config)
    reading: dict[str, Any] = {"seed": config.run.seed, "limit": config.data.limit, "cache_dir": root}
    reading["also"] = template.reads.variables or ()
    sources = load_sources(config.data.train, key="data.train", **reading)
    part = Part(
        key="data.train",
        sources=sources,
        config=config,
        tokenizer=tokenizer,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        template=template,
        ends=answer_ends(tokenizer),
        progress=progress,
    )
    warnings = [*template.warnings, *ending_warning(template, tokenizer)]
    wants_eval = config.run.evals > 0
    if not config.data.eval:
        fraction = config.data.eval_fraction
        train = replace(part, holdout="train").tokenized(root) if fraction else part.tokenized(root)
        evaluation = replace(part, holdout="eval").tokenized(root) if fraction and wants_eval else None
        return PreparedData(train, evaluation, template, [*warnings, *_warnings(train, evaluation)], template.notes)
    train, evaluation = part.tokenized(root), None
    if wants_eval:
        sources = load_sources(config.data.eval, key="data.eval", **reading)
        evaluation = replace(part, key="data.eval", sources=sources).tokenized(root)
    warnings += [*_warnings(train, evaluation), *_overlap(train, evaluation)]
    return PreparedData(train, evaluation, template, warnings, template.notes)


def cache_directory(config: Config) -> Path:
    """data.cache if it is set, else $RMCORE_CACHE, else ~/.cache/rmcore. Raises UserError without a home directory."""
    path = os.path.expanduser(config.data.cache or os.environ.get("RMCORE_CACHE") or "~/.cache/rmcore")
    if path.startswith("~"):
        raise UserError("this user has no home directory for the token cache: set data.cache or RMCORE_CACHE")
    return Path(path).resolve()


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
    """The data summary, printed before a run: a paragraph for train and one for eval, then notes and warnings."""
    lines = [describe_part(part, config) for part in (prepared.train, prepared.eval) if part is not None]
    lines += [f"note: {note}" for note in prepared.notes]
    lines += [f"warning: {warning}" for warning in prepared.warnings]
    return "\n".join(lines)
