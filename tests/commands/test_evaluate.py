"""Compares `rmcore evaluate MODEL DATA` on an exported model with plain transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rmcore.evaluate import main
from rmcore.evaluation.trained import evaluation_config
from tests.harness.exporting import export, run_config


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


def test_several_models_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The metrics of each model are those of its own evaluation; rows that one of them drops do not count."""
    export(tmp_path / "new")
    export(tmp_path / "old", "gpt_neox")
    export(tmp_path / "short", "gpt_neox", config_yaml=run_config("data.max_tokens=50").dump_yaml())
    rows = [{"prompt": f"What is {i}?", "chosen": "A number.", "rejected": "No" * i, "source": "ab"[i % 2]}
            for i in range(1, 13)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def evaluated(first: str, *arguments: str, data: str = "rows.jsonl") -> str:
        common = [str(tmp_path / first), str(tmp_path / data), f"data.cache={tmp_path / 'cache'}"]
        others = [
            part for name in arguments if (tmp_path / name).is_dir() for part in ("--against", str(tmp_path / name))
        ]
        assert main([*common, *others, *(name for name in arguments if not (tmp_path / name).is_dir())]) == 0
        return capsys.readouterr().out

    page = tmp_path / "page.html"
    found = json.loads(evaluated("new", "old", "--json", "--report", str(page), "--png", str(tmp_path / "plots")))
    new, old = str(tmp_path / "new"), str(tmp_path / "old")
    assert found["models"] == {new: json.loads(evaluated("new", "--json")), old: json.loads(evaluated("old", "--json"))}
    [row] = found["comparison"]["differences"]
    assert (row["model"], row["baseline"], row["count"]) == (new, old, 12)
    assert row["difference"] == pytest.approx(found["models"][new]["accuracy"] - found["models"][old]["accuracy"])
    assert found["comparison"]["sources"].keys() == {"a", "b"}

    text = evaluated("new", "old")
    written = page.read_text(encoding="utf-8")
    for cell in (f"{row['difference']:+.4f}", f"{row['low']:+.4f} to {row['high']:+.4f}", f"{row['p']:.2g}"):
        assert cell in text and f"<td>{cell}</td>" in written
    for name in (new, old):
        assert f"{found['models'][name]['ece']:.3f}" in text and f"{found['models'][name]['brier']:.3f}" in text
    assert 'id="picture-differences"' in written and (tmp_path / "plots" / "reliability.png").is_file()

    # The rows that the third model keeps, in a file of their own, give the same comparison.
    part = json.loads(evaluated("new", "short", "--json"))
    short = str(tmp_path / "short")
    kept = part["comparison"]["comparisons"]
    assert 0 < kept < 12 and part["comparison"]["left_out"] == {new: 12 - kept, short: 0}
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:kept]))
    assert json.loads(evaluated("new", "short", "--json", data="kept.jsonl"))["models"] == part["models"]
    assert f"Only the {kept} comparisons that all models have scored count" in evaluated("new", "short")

    assert main([new, str(tmp_path / "rows.jsonl"), "--against", new]) == 2
    assert "is given twice" in capsys.readouterr().err
