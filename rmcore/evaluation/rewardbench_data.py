"""Scores the data of RewardBench by the rules of rmcore/evaluation/rewardbench.py.

Input: a source of `rmcore evaluate`; tokenised data of RewardBench and the reward of each answer. Output: the config
that reads the source (rmcore/data/rewardbench.py) and its prior sets; the metrics with the scores.
Example: a comparison of the source "Ties tied:3" with the rewards [2, 1] correct and [0] incorrect counts for the tie 3
of the section Ties.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rmcore.config import Config, SourceConfig, UserError
from rmcore.data.prepare import cache_directory
from rmcore.data.reading.sources import Source, load_sources
from rmcore.data.rewardbench import TIES, readable_rows, stored, version_of
from rmcore.data.tokens.comparisons import TokenizedComparisons
from rmcore.evaluation.arrays import answer_arrays, pair_arrays
from rmcore.evaluation.pair_metrics import pair_metrics
from rmcore.evaluation.rewardbench import PRIOR_SETS, scores_1, scores_2, section_name


def with_rewardbench(config: Config, wanted: str, prior_sets: str | None) -> tuple[Config, int | None]:
    """The config to evaluate, its data rewritten where needed, and the version of RewardBench (None: another data set).

    Args:
        wanted: auto, 1, 2 or off.
        prior_sets: a hub id or files of the four prior sets, for version 1.
    Raises:
        UserError: the data are not of the wanted version.
    """
    first = config.data.train[0]
    if wanted == "off" or first.path == "synthetic":
        return config, None
    root = cache_directory(config)
    [source] = load_sources([first], seed=config.run.seed, limit=config.data.limit, cache_dir=root, whole=True)
    version = version_of(source.head())
    if wanted != "auto" and version != int(wanted):
        raise UserError(f"{first.path}: the rows are not those of RewardBench {wanted}; leave out --rewardbench")
    if prior_sets is not None and version != 1:
        raise UserError("--prior-sets are a part of RewardBench 1; the data are something else")
    sources: tuple[SourceConfig, ...] = (first,)
    if version == 2:
        sources = (stored(readable_rows(source), root),)
    elif prior_sets is not None:
        sources = (first, stored(prior_rows(prior_sets, config, root), root))
    data = config.data.model_copy(update={"train": sources})
    return config.model_copy(update={"data": data}), version


def prior_rows(path: str, config: Config, root: Path) -> Iterator[dict[str, Any]]:
    """The rows of the four prior sets: a split each, or one file with the name of the set in `subset`."""
    arguments: dict[str, Any] = {"seed": config.run.seed, "limit": None, "cache_dir": root, "key": "--prior-sets"}
    splits: tuple[str | None, ...] = (None,) if Path(path).is_file() else PRIOR_SETS
    parts: list[tuple[str | None, Source]] = []
    for name in splits:
        source = SourceConfig(path=path) if name is None else SourceConfig(path=path, split=name)
        parts += [(name, part) for part in load_sources([source], whole=True, **arguments)]
    for name, rows in parts:
        for row, where in rows:
            subset = name or row.get("subset")
            if name is None and not isinstance(subset, str):
                raise UserError(f"{where}: a row of the prior sets needs a subset: {', '.join(PRIOR_SETS)}")
            if subset in PRIOR_SETS:
                yield {**{key: row.get(key) for key in ("prompt", "chosen", "rejected")}, "source": subset}


def fold_ties(data: TokenizedComparisons) -> TokenizedComparisons:
    """The data with the sources "Ties ref:1", "Ties tied:1", ... merged, so that metrics by source are by section."""
    section = [name.split(" ")[0] if name.startswith(f"{TIES} ") else name for name in data.sources]
    names = list(dict.fromkeys(section))
    place = np.array([names.index(name) for name in section], dtype=np.int32)
    return replace(data, sources=names, source_index=place[data.source_index])


def rewardbench_metrics(version: int, data: TokenizedComparisons, rewards_A: np.ndarray) -> dict[str, Any]:
    """The metrics of the pairs, with the ties as one source, and the scores of `version`.

    `rewardbench` holds all about the scores; `rewardbench_score` and one metric per section are for the log.
    """
    folded = fold_ties(data) if version == 2 else data
    metrics = pair_metrics(pair_arrays(folded, rewards_A), answer_arrays(folded, rewards_A))
    scores = rewardbench_scores(version, data, rewards_A, metrics)
    sections = {section_name(section): value for section, value in scores["sections"].items()}
    return {**metrics, "rewardbench": scores, "rewardbench_score": scores["score"], **sections}


def rewardbench_scores(
    version: int, data: TokenizedComparisons, rewards_A: np.ndarray, metrics: Mapping[str, Any]
) -> dict[str, Any]:
    """The scores of `version` from the rewards and the metrics by source of an evaluation."""
    if version == 1:
        return scores_1({name: row for name, row in metrics["sources"].items() if "accuracy" in row})
    prompts = []
    for number in range(len(data)):
        label = data.sources[data.source_index[number]]
        section, _, key = label.partition(" ") if label.startswith(f"{TIES} ") else (label, "", "")
        rewards = rewards_A[data.answer_offset[number] : data.answer_offset[number + 1]]
        pairs = slice(data.pair_offset[number], data.pair_offset[number + 1])
        correct, wrong = (np.unique(column[pairs]) for column in (data.winner, data.loser))
        if not len(correct):
            continue
        prompts.append((section, key, rewards[correct].tolist(), rewards[wrong].tolist()))
    return scores_2(prompts)
