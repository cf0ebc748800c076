"""Two commands select pairs by a reward model and train on them, as the README of rmcore/scoring shows."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rmcore.data.synthetic import byte_tokenizer, synthetic_rows
from rmcore.parallel.world import running_world
from rmcore.scoring.score import score
from tests.harness.crash import run
from tests.harness.exporting import export
from tests.harness.small_run import arguments


@pytest.mark.parametrize("kind", [pytest.param("jsonl", marks=pytest.mark.slow), "parquet"])
def test_score_and_then_train_on_what_the_model_agrees_with(tmp_path: Path, kind: str) -> None:
    pool, scored = tmp_path / "pool.jsonl", tmp_path / f"scored.{kind}"
    rows = [{**row, "prompt": row["prompt"][-30:]} for row in synthetic_rows(24, 3, "train")]
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    export(tmp_path / "gold", template="none")
    with running_world() as world:
        assert score(world, str(tmp_path / "gold"), str(pool), str(scored), ["data.template=none"]) == (24, 0)
    if kind == "jsonl":
        found = [json.loads(line) for line in scored.read_text().splitlines()]
    else:
        found = pyarrow.parquet.read_table(scored).to_pylist()

    # The margin is that of plain transformers.
    tokenizer, model = byte_tokenizer(), AutoModelForSequenceClassification.from_pretrained(tmp_path / "gold")
    for row, out in zip(rows[:4], found, strict=False):
        texts = [row["prompt"] + row[name] + tokenizer.eos_token for name in ("chosen", "rejected")]
        with torch.no_grad():
            pair = [model(input_ids=torch.tensor([tokenizer.encode(t)])).logits.item() for t in texts]
        assert out["reward_margin"] == pytest.approx(pair[0] - pair[1], abs=1e-4)
    agreed = [row for row in found if row["reward_margin"] > 0]
    assert 0 < len(agreed) < 24

    more = [f"data.train={{path: {scored}, keep: reward_margin > 0}}", "batch.pairs=100", "log.every=1"]
    base = [one for one in arguments(tmp_path, *more) if not one.startswith("data.train.path")]
    outcome = run(tmp_path / "next", base, 1)
    assert outcome.codes == [0], outcome.text
    assert f"{24 - len(agreed):,} dropped: not wanted by keep" in outcome.text
    assert json.loads((outcome.directory / "run_status.json").read_text())["episode"] == len(agreed)
