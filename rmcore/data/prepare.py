"""Prepares the data of a run: sources -> comparisons -> rendered texts -> token ids, cached on disk.

Input: the `Config`, the tokenizer, the number of positions of the model.
Output: `PreparedData(train, evals)`, memory-mapped.
Example: 1,900 rows with eval_fraction 0.1 give a train part of some 1,710 rows and an eval part of some 190, which have
no prompt in common. The second start reads both from the cache.

All ranks may call `prepare_data` at the same time: one builds, the others wait (rmcore.data.tokens.cache). There are no
collectives.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from rmcore.config import Config, UserError
from rmcore.config.schema import UNNAMED, SourceConfig
from rmcore.data.formats.row_format import attribute_columns
from rmcore.data.inspection.summary import describe_part
from rmcore.data.pipeline import Part, Progress
from rmcore.data.reading.sources import Source, load_sources
from rmcore.data.rewardbench import readable_rows, stored, version_of
from rmcore.data.tokens.comparisons import TokenizedComparisons
from rmcore.data.tokens.end_tokens import answer_ends, ending_warning
from rmcore.data.tokens.templates import Template, template_of
from rmcore.data.tokens.tokenizer import tokenizer_fingerprint


@dataclass(frozen=True)
class PreparedData:
    """The tokenised data of a run."""

    train: TokenizedComparisons
    evals: Mapping[str, TokenizedComparisons]  # by the name of the set, the main one first; {} without evaluation
    template: Template  # with which the texts were rendered
    warnings: list[str]
    notes: tuple[str, ...] = ()  # choices that were made for the user (a padding token, a date)
    rewardbench: Mapping[str, int] = field(default_factory=dict)  # the version of the sets that are RewardBench

    @property
    def eval(self) -> TokenizedComparisons | None:
        """The main evaluation set: the sources without a set, else the first set. None without evaluation."""
        return next(iter(self.evals.values()), None)

    @property
    def parts(self) -> dict[str, TokenizedComparisons]:
        """All parts by the name under which they are reported: data.train, data.eval, data.eval (SET)."""
        return {part.report["key"]: part for part in (self.train, *self.evals.values())}


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
    mapped = [source.columns for source in (*config.data.train, *config.data.eval)]
    of_attributes = [name for columns in mapped for name in attribute_columns(config.attributes, columns)]
    reading["also"] = {*(template.reads.variables or ()), *of_attributes}
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
    fraction = config.data.eval_fraction
    train = replace(part, holdout="train").tokenized(root) if fraction else part.tokenized(root)
    known = np.isfinite(train.attribute).any(0) if train.width else ()
    if missing := [name for name, some in zip(config.attributes, known, strict=True) if not some]:
        raise UserError(
            f"data.train: no answer has the attribute {missing[0]}, which loss.output lists; set "
            f"data.train.columns={{{missing[0]}: ...}} (our name: theirs)"
        )
    evals, versions = {}, {}
    for name, numbers in config.data.eval_sets.items() if config.run.evals > 0 else ():
        if not numbers:
            evals[name] = replace(part, holdout="eval").tokenized(root)
            continue
        rows, version = _eval_sources(config, numbers, reading)
        key = "data.eval" if name == UNNAMED else f"data.eval ({name})"
        evals[name] = replace(part, key=key, sources=rows, config=_reading(config, version)).tokenized(root)
        if version is not None:
            versions[name] = version
    apart = [evals[name] for name in evals if config.data.eval_sets[name]]
    warnings += [*_warnings(train, *evals.values()), *_overlap(train, apart)]
    return PreparedData(train, evals, template, warnings, template.notes, versions)


def _reading(config: Config, version: int | None) -> Config:
    """The config by which a set is read: the prompts of RewardBench 2 are scored one by one, so none are merged."""
    if version != 2:
        return config
    every_row = {"group_by_prompt": False, "drop_repeated": False, "drop_contradicted": False}
    return config.model_copy(update={"data": config.data.model_copy(update=every_row)})


def _eval_sources(
    config: Config, numbers: Sequence[int], reading: Mapping[str, Any]
) -> tuple[list[Source], int | None]:
    """The sources of one evaluation set, and its version if it is RewardBench."""
    configs = [config.data.eval[number] for number in numbers]
    place = None if len(numbers) == len(config.data.eval) else numbers

    def read(chosen: list[SourceConfig], **more: Any) -> list[Source]:
        return load_sources(chosen, key="data.eval", numbers=place, **reading, **more)

    sources = read(configs)
    version = version_of(sources[0].head()) if len(numbers) == 1 else None
    if version == 2:
        [whole] = read(configs, whole=True)  # with the ids of the ties
        sources = read([stored(readable_rows(whole), reading["cache_dir"])])
    return sources, version


def cache_directory(config: Config) -> Path:
    """data.cache if it is set, else $RMCORE_CACHE, else ~/.cache/rmcore. Raises UserError without a home directory."""
    path = os.path.expanduser(config.data.cache or os.environ.get("RMCORE_CACHE") or "~/.cache/rmcore")
    if path.startswith("~"):
        raise UserError("this user has no home directory for the token cache: set data.cache or RMCORE_CACHE")
    return Path(path).resolve()


def _warnings(*parts: TokenizedComparisons) -> list[str]:
    return [f"{part.report['key']}: {line}" for part in parts for line in part.report["warnings"]]


def _overlap(train: TokenizedComparisons, parts: Sequence[TokenizedComparisons]) -> list[str]:
    """A warning for each part of data.eval that has prompts of data.train."""
    shared = [int(np.isin(part.prompt_hash, train.prompt_hash).sum()) for part in parts]
    return [
        f"{part.report['key']}: {count:,} of {len(part):,} comparisons have a prompt that data.train has too"
        for part, count in zip(parts, shared, strict=True)
        if count
    ]


def describe(prepared: PreparedData, config: Config) -> str:
    """The data summary, printed before a run: a paragraph for train and for each part of eval, notes and warnings."""
    lines = [describe_part(part, config) for part in prepared.parts.values()]
    lines += [f"note: {note}" for note in prepared.notes]
    lines += [f"warning: {warning}" for warning in prepared.warnings]
    return "\n".join(lines)
