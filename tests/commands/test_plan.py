"""`rmcore plan`: every config on 8 H100s without a hub, figures against independent ones, refusals, speed of --help."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, GPTNeoXConfig

from rmcore.cost.communication import transfers
from rmcore.cost.data_size import DataFigures
from rmcore.cost.dry_run import DryRun
from rmcore.cost.flops import flops_of_pair
from rmcore.cost.machines import machine
from rmcore.data.batches.batch import build_batch
from rmcore.data.tokens.comparisons import TokenizedComparison
from rmcore.model.reward_model import SHARED, RewardModel
from rmcore.plan import main
from tests.harness.paths import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
KNOWN = {"hh": 2_646_433_280, "zephyr_7b": 7_110_664_192}  # by hand: 12 D^2 L + 2 V D ..., without the output embedding


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_planned_on_eight_gpus_without_a_hub(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [] if path.stem == "quickstart" else ["--pairs", "100000", "--tokens-a-pair", "300"]
    how = [] if path.stem == "zephyr_7b" else ["parallel.recompute=none"]  # only 7b needs more; to try all takes longer
    found = planned(capsys, str(path), *how, "--gpus", "8", "--gpu", "h100", *data)
    asked, total = found["asked"], found["model"]["total"]
    assert asked["fits"] is True and asked["recompute"] == ("selective" if path.stem == "zephyr_7b" else "none")
    assert asked["memory"]["weights"] + asked["memory"]["gradients"] in (8 * total, total)  # whole, or an eighth
    assert found["steps"] and asked["hours"] > 0 and asked["most_tokens"] >= found["data"]["longest"]
    assert found["checkpoint_bytes"] == 12 * total
    assert [one["gpus"] for one in found["by_gpus"]] == [1, 8, 64, 512]
    assert found["cheapest"]["step_seconds"] <= 1.02 * min(o["step_seconds"] for o in found["strategies"] if o["fits"])
    assert found["model"]["total"] == KNOWN.get(path.stem, total)
    # what the whole takes is the sum of what is named
    parts = {key: size for key, size in asked["memory"].items() if key != "total"}
    assert sum(parts.values()) == pytest.approx(asked["memory"]["total"])


def test_the_embedded_task_is_read_and_told_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        str(ROOT / "configs/quickstart.yaml"),
        "data.limit=300",
        "--gpus",
        "2",
        "--gpu",
        "cpu",
        "--rate",
        "0.1",
    ]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "300 pairs" in text and "40 steps" in text  # 4 epochs of 10 steps
    assert "assumed a longest" not in text and "runtime" in text
    assert "all-reduce gradients: 0.00145 + 0 GB, behind backward" in text  # 2 (2 - 1)/2 of 4 x 361,472 bytes


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["model.name=nobody/nothing", "data.train.path=x.jsonl"], "--model-config FILE"),
        (["configs/hh.yaml", "--gpu", "h1000"], "--gpu h1000 is not known; there are a100"),
        (["configs/hh.yaml", "--gpus", "9", "--nodes", "2"], "do not divide"),
        (["configs/hh.yaml", "--mfu", "40", "--pairs", "0"], "--pairs must be more than 0; --mfu is a share"),
        (["configs/hh.yaml", "--model-config", "no.json"], "--model-config no.json cannot be read"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_message(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error and error.startswith("rmcore plan: ")


def test_unknown_data_leave_the_hours_open_and_name_the_flags(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(GPTNeoXConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=128,
                                          num_attention_heads=2, vocab_size=128).to_json_string())  # fmt: skip
    arguments = ["model.name=nobody/nothing", "data.train.path=nobody/rows", "--model-config", str(tmp_path)]
    found = planned(capsys, *arguments)
    assert found["steps"] is None and found["asked"]["hours"] is None and found["asked"]["fits"] is True
    assert "give --pairs N and --tokens-a-pair T" in found["data"]["notes"][0]
    found = planned(capsys, *arguments, "--pairs", "640", "--tokens-a-pair", "100", "--sharing", "1.5")
    assert found["steps"] == 10
    # [P | C | R] = 50, 25, 25: P sees 1275 pairs of tokens, each tail 25 * 50 + 325
    assert found["data"]["visible"] == 1275 + 2 * (25 * 50 + 325)


def test_flops_are_those_that_torch_counts() -> None:
    """Products exactly but for the scored rows of the last layer (one in 400); attention is no op that torch counts."""
    shape = GPTNeoXConfig(vocab_size=64, hidden_size=96, num_hidden_layers=3, num_attention_heads=4,
                          intermediate_size=384, num_labels=1, pad_token_id=1)  # fmt: skip
    hf_model = AutoModelForSequenceClassification.from_config(shape, dtype=torch.float32)
    model = RewardModel(hf_model.base_model, hf_model.score, pad_token_id=1)
    model.use(SHARED, pruned=True)

    class Rows:
        def comparison(self, number: int) -> TokenizedComparison:
            one = np.ones(1, dtype=np.float32)
            tail = np.full(200, 3, dtype=np.int32)
            return TokenizedComparison(np.full(400, 2, dtype=np.int32), [tail, tail], np.array([[0, 1]]), 0 * one, one,
                                       np.zeros((0, 2), dtype=np.int64), one[:0], np.zeros(2))  # fmt: skip

    counter = FlopCounterMode(display=False)
    with counter:
        model(build_batch(Rows(), range(2))).loss_sum.backward()
    data = DataFigures(1, 800.0, 1200.0, visible=0.0, longest=800, rows=None, notes=())
    assert 2 * flops_of_pair(DryRun(shape), data) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_a_ring_sends_what_rings_send() -> None:
    sizes = DryRun(GPTNeoXConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=2,
                                 vocab_size=128)).sizes  # fmt: skip
    n = sizes.total

    def total(strategy: str, ranks: int, hosts: int, micro: int = 1) -> tuple[float, float]:
        sent = transfers(strategy, "bf16", sizes, ranks, hosts, micro)
        return sum(t.within * t.times for t in sent) / n, sum(t.between * t.times for t in sent) / n

    assert total("ddp", 1, 1) == (0, 0)
    assert total("ddp", 4, 1) == (pytest.approx(2 * 4 * 3 / 4), 0)
    assert total("zero2", 4, 1, 5) == (pytest.approx((2 + 4) * 3 / 4), 0)
    assert total("zero3", 4, 1, 5) == (pytest.approx(5 * (2 + 2 + 4) * 3 / 4), 0)
    within, between = total("ddp", 16, 2)
    assert (within + between, between) == (pytest.approx(8 * 15 / 16), pytest.approx(8 * 15 / 16 / 8))
    # hsdp: rings within a host of 8, and an eighth of the gradients all-reduced between 2 hosts
    assert total("hsdp", 16, 2) == (pytest.approx((2 + 2 + 4) * 7 / 8), pytest.approx(2 * 4 / 8 / 2))
    slow = transfers("ddp", "bf16", sizes, 16, 2, 1)[0]
    assert slow.seconds(machine("h100")) == pytest.approx(8 * n * 15 / 16 / 8 / 50e9 / 0.8)


def test_help_answers_at_once_and_names_the_flags() -> None:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "rmcore.plan", "--help"], capture_output=True, text=True, cwd=ROOT)
    seconds = time.perf_counter() - started
    assert done.returncode == 0 and all(flag in done.stdout for flag in ("--gpus", "--tokens-a-pair", "--model-config"))
    assert seconds < 5, "it takes some 0.3 s; a machine that others use is given more"
