"""Compares `rmcore evaluate MODEL DATA` on an exported model with plain transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rmcore.evaluate import main
from rmcore.evaluation.trained import evaluation_config
from tests.harness.exporting import export


def test_the_evaluate_command_reads_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(tmp_path / "model")
    rows = [{"prompt": f"What is {i}?", "chosen": "A number.", "rejected": "No" * i} for i in range(1, 12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(tmp_path / "model"), str(tmp_path / "rows.jsonl"), "--json"]
    config = evaluation_config(arguments[0], arguments[1], ["data.split=train[:5]"])
    assert (config.data.template, config.data.max_tokens, config.data.train[0].split) == (
        "simple_chat",
        90,
        "train[:5]",
    )
    assert main([*arguments, f"data.cache={tmp_path / 'cache'}"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert {
        "accuracy",
        "loss",
        "chosen_rewards",
        "rejected_rewards",
        "reward_margin",
        "count",
        "sources",
    } <= metrics.keys()
    assert metrics["count"] == 11
    model, tokenizer = (
        kind.from_pretrained(tmp_path / "model") for kind in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    margins = []
    for row in rows:
        conversations = [
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[k]}]
            for k in ("chosen", "rejected")
        ]
        ids = [tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False) for turns in conversations]
        chosen, rejected = (model(input_ids=one).logits[0, 0].item() for one in ids)
        margins.append(chosen - rejected)
    assert metrics["accuracy"] == np.mean(np.array(margins) > 0)
    assert metrics["reward_margin"] == pytest.approx(np.mean(margins), abs=1e-5)


def test_the_evaluate_command_refuses_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path / "none.jsonl")]) == 2
    assert "rmcore evaluate: " in capsys.readouterr().err
