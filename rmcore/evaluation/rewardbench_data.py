"""Detects and reads the data of RewardBench, and scores them by the rules of rmcore/evaluation/rewardbench.py.

Input: a source of `rmcore evaluate` (a local file or a hub id). Output: its version, detected from the columns; for
version 2 and for the prior sets, rows in a format that rmcore reads; the scores, computed from the rewards.
Example, version 2: {"id": "tied:3", "prompt": "A colour?", "chosen": ["red", "blue"], "rejected": ["dog"], "subset":
"Ties", ...} is read as {"prompt": "A colour?", "answers": ["red", "blue", "dog"], "scores": [1, 1, 0], "source": "Ties
tied:3"}. The score of a tie needs its id and its rewards; the name of the source carries the id that far.
Version 1 has one chosen and one rejected text per row, and `subset` is one of 23 names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from rmcore.config import Config, SourceConfig, UserError
from rmcore.data.prepare import cache_directory
from rmcore.data.reading.sources import Source, load_sources
from rmcore.data.tokens.comparisons import TokenizedComparisons
from rmcore.evaluation.rewardbench import PRIOR_SETS, SUBSETS, TIES, scores_1, scores_2
from rmcore.host.files import write_text_atomically


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
        sources = (_stored(readable_rows(source), root),)
    elif prior_sets is not None:
        sources = (first, _stored(prior_rows(prior_sets, config, root), root))
    data = config.data.model_copy(update={"train": sources})
    return config.model_copy(update={"data": data}), version


def version_of(rows: list[dict[str, Any]]) -> int | None:
    """The version of RewardBench that the first rows look like, or None."""
    if not rows or not all({"prompt", "chosen", "rejected", "subset"} <= row.keys() for row in rows):
        return None
    if all(_texts(row["chosen"]) and _texts(row["rejected"]) for row in rows):
        return 2
    texts = all(isinstance(row[name], str) for row in rows for name in ("prompt", "chosen", "rejected"))
    return 1 if texts and all(row["subset"] in SUBSETS for row in rows) else None


def _texts(found: Any) -> bool:
    return isinstance(found, list) and bool(found) and all(isinstance(text, str) for text in found)


def readable_rows(source: Source) -> Iterator[dict[str, Any]]:
    """Version 2's rows as lists of scored answers."""
    for row, where in source:
        if not (_texts(row.get("chosen")) and _texts(row.get("rejected")) and isinstance(row.get("subset"), str)):
            raise UserError(f"{where}: RewardBench 2 needs lists of texts in chosen and rejected, and a subset")
        label = row["subset"]
        if label.lower() == TIES.lower():
            kind, _, number = str(row.get("id")).partition(":")
            if kind not in ("ref", "tied") or not number:
                raise UserError(f"{where}: the id of a tie is ref:N or tied:N, not {row.get('id')!r}")
            label = f"{TIES} {kind}:{number}"
        answers = [*row["chosen"], *row["rejected"]]
        scores = [1] * len(row["chosen"]) + [0] * len(row["rejected"])
        yield {"prompt": row["prompt"], "answers": answers, "scores": scores, "source": label}


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


def _stored(rows: Iterator[dict[str, Any]], root: Path) -> SourceConfig:
    """The rows as a file in the cache, whose name is a hash of its content; any rank may write it."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path = root / "rewardbench" / f"{xxhash.xxh3_128_hexdigest(text.encode())}.jsonl"
    if not path.exists():
        write_text_atomically(path, text)
    return SourceConfig(path=str(path))


def fold_ties(data: TokenizedComparisons) -> TokenizedComparisons:
    """The data with the sources "Ties ref:1", "Ties tied:1", ... merged, so that metrics by source are by section."""
    section = [name.split(" ")[0] if name.startswith(f"{TIES} ") else name for name in data.sources]
    names = list(dict.fromkeys(section))
    place = np.array([names.index(name) for name in section], dtype=np.int32)
    return replace(data, sources=names, source_index=place[data.source_index])


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
