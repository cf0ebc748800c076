"""Measures scoring in texts per second, compared with transformers' padded forward on the same texts.

Input: model directories, a file of rows {"chosen", "rejected"}.
Output: JSON with the texts per second of each arm. Two kinds of work: `pairs` (both texts of each row) and `answers`
(rows of one prompt with 8 answers, made from those rows).
Example: 256 pairs are 512 texts; one pair per second is two texts per second.

Ratio: rmcore's texts per second over those of the padded arm; 4 means that rmcore scores four times as many texts in
the same time. bf16 is compared with the better of transformers' two precisions. `padded` takes batches in the order of
the file, `padded, sorted` sorts the texts by length first. All arms tokenise the texts; they alternate, each in a
process of its own.
"""

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

from rmcore.bench.measure import (
    Clock,
    add_up,
    machine,
    own_child,
    parser,
    report,
    run_child,
    spread,
    undisturbed,
    write_results,
)

ARMS = ("rmcore", "padded", "padded, sorted")
KINDS = ("pairs", "answers")
ANSWERS = 8


def rows_of(data: str, kind: str, limit: int | None) -> list[dict[str, Any]]:
    """Rows {"prompt", "answers"}. For `answers` each prompt also gets the answers of the rows that follow it."""
    with open(data, encoding="utf-8") as lines:
        given = [json.loads(line) for line in lines][:limit]
    rows = []
    for row in given:
        prompt = os.path.commonprefix([row["chosen"], row["rejected"]])  # noqa: RUF071  (of characters, not of path components)
        prompt = prompt[: prompt.rfind(" ") + 1]
        rows.append({"prompt": prompt, "answers": [row[side][len(prompt) :] for side in ("chosen", "rejected")]})
    if kind == "pairs":
        return rows
    tails = [answer for row in rows for answer in row["answers"]]
    return [
        {"prompt": row["prompt"], "answers": [tails[(2 * number + k) % len(tails)] for k in range(ANSWERS)]}
        for number, row in enumerate(rows[: max(1, len(rows) // 4)])
    ]


def measured(settings: dict[str, Any]) -> dict[str, Any]:
    """The child: one arm over the data. Each arm imports what it needs, because its peak memory is recorded."""
    import torch

    torch.set_num_threads(settings["threads"])
    rows = rows_of(settings["data"], settings["kind"], settings.get("limit"))
    run = scorer(settings, rows) if settings["arm"] == "rmcore" else padded(settings, rows)
    run()
    clock, laps = Clock(), []
    for _ in range(settings["passes"]):
        run()
        laps.append(clock.lap())
    total = add_up(laps)
    texts = sum(len(row["answers"]) for row in rows) * len(laps)
    return {"arm": settings["arm"], "texts": texts, "texts_per_s": texts / total["wall_s"], **total}


def scorer(settings: dict[str, Any], rows: list[dict[str, Any]]):  # type: ignore[no-untyped-def]
    """Scores all rows with the code of `rmcore score`."""
    from rmcore.scoring.scorer import Scorer

    precision = f"parallel.precision={settings['precision']}"
    one = Scorer(settings["model"], ["data.template=none", precision])
    placed = [(row, "") for row in rows]
    one.choose_path(placed)
    return lambda: one.rewards(placed)


def padded(settings: dict[str, Any], rows: list[dict[str, Any]]):  # type: ignore[no-untyped-def]
    """Scores all texts with AutoModelForSequenceClassification, in padded batches, in file order or by length."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    dtype = torch.bfloat16 if settings["precision"] == "bf16" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="right")
    model = AutoModelForSequenceClassification.from_pretrained(settings["model"], dtype=dtype).eval()
    texts = [row["prompt"] + answer + tokenizer.eos_token for row in rows for answer in row["answers"]]
    if settings["arm"] == "padded, sorted":
        texts.sort(key=len)

    def run() -> None:
        with torch.inference_mode():
            for start in range(0, len(texts), settings["batch"]):
                inputs = tokenizer(texts[start : start + settings["batch"]], return_tensors="pt", padding=True)
                model(**inputs, use_cache=False)

    return run


def main(arguments: list[str]) -> int:
    p = parser("score", __doc__)
    p.add_argument("--model", nargs="+", required=True, help="directories of sequence-classification models")
    p.add_argument("--data", required=True, help="JSONL file of whole texts: chosen, rejected")
    p.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    p.add_argument("--kind", nargs="+", default=list(KINDS), choices=KINDS)
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--passes", type=int, default=2, help="passes over the data in each run")
    p.add_argument("--batch", type=int, default=8, help="texts per padded batch")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--limit", type=int, help="rows to read")
    p.add_argument("--out", help="result file; default: rmcore/bench/results/score.json")
    options = p.parse_args(arguments)
    runs: list[dict[str, Any]] = []
    work = itertools.product(range(options.repeat), options.model, options.kind, options.precision, ARMS)
    for repetition, model, kind, precision, arm in work:
        settings = {
            "model": model,
            "data": options.data,
            "kind": kind,
            "precision": precision,
            "arm": arm,
            "passes": options.passes,
            "batch": options.batch,
            "threads": options.threads,
            "limit": options.limit,
        }
        record = run_child(own_child("rmcore.bench.score"), options.threads, settings)
        runs.append(
            {"model": Path(model).name, "kind": kind, "precision": precision, "repetition": repetition, **record}
        )
        print(f"{Path(model).name} {kind} {precision} {arm}: {record['texts_per_s']:.1f} texts/s", flush=True)
    print("\n".join(ratios(runs)))
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    settings |= {"model": [Path(model).name for model in options.model], "data": Path(options.data).name}
    record = {"what": "score", "machine": machine(), "settings": settings, "runs": runs}
    print(f"written: {write_results('score', record, options.out)}")
    return 0


def ratios(runs: list[dict[str, Any]]) -> list[str]:
    """rmcore's median over that of each padded arm; bf16 is compared with the better precision of the padded arm."""
    lines = []
    for model, kind, precision in dict.fromkeys((run["model"], run["kind"], run["precision"]) for run in runs):

        def rate(arm: str, precision: str, model: str = model, kind: str = kind) -> float:
            chosen = [
                run
                for run in runs
                if (run["model"], run["kind"], run["precision"], run["arm"]) == (model, kind, precision, arm)
            ]
            return spread([run["texts_per_s"] for run in undisturbed(chosen)])["median"] if chosen else 0.0

        for arm in ARMS[1:]:
            padded_rate = max(rate(arm, other) for other in {"fp32", precision})
            if padded_rate:
                lines.append(f"{model} {kind} {precision}: {rate('rmcore', precision) / padded_rate:.2f} times {arm}")
    return lines


if __name__ == "__main__":
    report(measured(json.loads(sys.argv[-1])))
