"""Small files with exactly the schemas of the published data sets that the configs train on.

Example: write_schema_rows("tldr-preference-trl-style", tmp_path / "train.parquet", rows=16, seed=0).
Columns, in order, are those that the data sets' own build scripts select; contents are made up.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets

_WORDS = ("river", "stone", "garden", "letter", "window", "morning", "train", "market", "winter", "bridge", "candle")
_GOOD = ("a lovely and generous thing", "truly wonderful to see", "bright, kind and well made")
_BAD = ("a dreadful waste of time", "truly awful to see", "dull, rude and badly made")


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(words))


def _message(role: str, content: str) -> dict[str, str]:
    return {"content": content, "role": role}


def _trl_style(rng: random.Random, index: int) -> dict[str, Any]:
    """prompt: text; chosen, rejected: the prompt as the first user turn, then one answer."""
    prompt = f"{_text(rng, rng.randint(4, 12)).capitalize()} {index}."
    good, bad = (f"{_text(rng, rng.randint(2, 8))} was {rng.choice(kind)}." for kind in (_GOOD, _BAD))
    turns = [[_message("user", prompt), _message("assistant", answer)] for answer in (good, bad)]
    return {"prompt": prompt, "chosen": turns[0], "rejected": turns[1]}


def _tldr(rng: random.Random, index: int) -> dict[str, Any]:
    info = {
        "id": f"t3_{index:06x}",
        "post": _text(rng, rng.randint(10, 40)),
        "title": _text(rng, 5),
        "subreddit": "AskReddit",
        "site": None,
        "article": None,
    }
    prompt = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {info['post']}\n\nTL;DR:"
    choice = rng.randint(0, 1)
    texts = [f" {_text(rng, rng.randint(3, 9))} {rng.choice(_GOOD if i == choice else _BAD)}." for i in (0, 1)]
    turns = [[_message("user", prompt), _message("assistant", texts[i].strip())] for i in (choice, 1 - choice)]
    return {
        "prompt": prompt,
        "chosen": turns[0],
        "rejected": turns[1],
        "info": info,
        "summaries": [{"text": text, "policy": f"sup{i}", "note": None} for i, text in enumerate(texts)],
        "choice": choice,
        "worker": "w1",
        "batch": "batch1",
        "split": "train",
        "extra": {"confidence": rng.randint(1, 9)},
    }


def _hh(rng: random.Random, index: int) -> dict[str, Any]:
    """Dialogues of one to three rounds; prompt is the first human turn alone."""
    turns = [_message("user", f"{_text(rng, 6).capitalize()} {index}?")]
    for _ in range(rng.randint(0, 2)):
        turns += [_message("assistant", _text(rng, 8)), _message("user", f"{_text(rng, 4)}?")]
    good, bad = (_message("assistant", f"{_text(rng, 5)}, {rng.choice(kind)}.") for kind in (_GOOD, _BAD))
    return {"chosen": [*turns, good], "rejected": [*turns, bad], "prompt": turns[0]["content"]}


def _ultrafeedback(rng: random.Random, index: int) -> dict[str, Any]:
    """`messages` repeats chosen; scores from 1 to 10 in halves."""
    row = _trl_style(rng, index)
    rejected = rng.randint(2, 14)
    return {
        "prompt": row["prompt"],
        "prompt_id": f"{index:064x}",
        "chosen": row["chosen"],
        "rejected": row["rejected"],
        "messages": row["chosen"],
        "score_chosen": rng.randint(rejected + 1, 20) / 2,
        "score_rejected": rejected / 2,
    }


SCHEMAS: dict[str, Callable[[random.Random, int], dict[str, Any]]] = {
    "sentiment-trl-style": _trl_style,
    "descriptiveness-trl-style": _trl_style,
    "tldr-preference-trl-style": _tldr,
    "hh-rlhf-trl-style": _hh,
    "ultrafeedback_binarized": _ultrafeedback,
}


def schema_rows(name: str, rows: int, seed: int) -> list[dict[str, Any]]:
    """Rows of one schema; the same for the same arguments."""
    rng = random.Random(f"{name} {seed}")
    return [SCHEMAS[name](rng, index) for index in range(rows)]


def write_schema_rows(name: str, path: Path, rows: int, seed: int) -> None:
    """Writes .jsonl or .parquet, as the suffix of `path` says."""
    made = schema_rows(name, rows, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(made).to_parquet(str(path))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    else:
        raise ValueError(f"write .jsonl or .parquet, not {path.suffix}")
