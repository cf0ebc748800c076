"""`rmcore plan`: every config on 8 H100s without a hub, the embedded task on a CPU, unknown data, refusals, --help."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import GPTNeoXConfig

from rmcore.plan import main
from tests.harness.paths import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
# Parameters by hand: 12 D^2 L + 2 V D ..., without the output embedding.
KNOWN = {"hh": 2_646_433_280, "zephyr_7b": 7_110_664_192}


def predicted(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_planned_on_eight_gpus_without_a_hub(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [] if path.stem == "quickstart" else ["--pairs", "100000", "--tokens-a-pair", "300"]
    how = (
        [] if path.stem == "zephyr_7b" else ["parallel.recompute=none"]
    )  # only 7b needs recompute; trying all takes longer
    found = predicted(capsys, str(path), *how, "--gpus", "8", "--gpu", "h100", *data)
    asked, total = found["asked"], found["model"]["total"]
    assert asked["fits"] is True and asked["recompute"] == ("selective" if path.stem == "zephyr_7b" else "none")
    assert asked["memory"]["weights"] in (4 * total, total / 2)  # whole, or one eighth
    assert found["steps"] and asked["hours"] > 0 and asked["most_tokens"] >= found["data"]["longest"]
    assert found["checkpoint_bytes"] == 12 * total
    assert [one["gpus"] for one in found["by_gpus"]] == [1, 8, 64, 512]
    assert found["cheapest"]["step_seconds"] <= 1.02 * min(o["step_seconds"] for o in found["strategies"] if o["fits"])
    assert found["model"]["total"] == KNOWN.get(path.stem, total)
    parts = {key: size for key, size in asked["memory"].items() if key != "total"}
    assert sum(parts.values()) == pytest.approx(asked["memory"]["total"])


def test_the_embedded_task_is_read_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data.limit=300", "--gpus", "2", "--gpu", "cpu", "--rate", "0.1"]
    assert main([str(ROOT / "configs/quickstart.yaml"), *arguments]) == 0
    text = capsys.readouterr().out
    assert "300 pairs" in text and "40 steps" in text  # 4 epochs of 10 steps
    assert "note: assumed" not in text and "runtime" in text
    assert "all-reduce gradients: 0.00145 + 0 GB, behind backward" in text  # 2 (2 - 1)/2 of 4 x 361,472 bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.name=nobody/nothing", "data.train.path=x.jsonl"], "--model-config FILE"),
        (["configs/hh.yaml", "--gpu", "h1000"], "--gpu h1000 is unknown; known are rtx4090, l40s, a100"),
        (["configs/hh.yaml", "--gpus", "9", "--nodes", "2"], "do not divide"),
        (
            ["configs/hh.yaml", "parallel.context=3", "--gpus", "8"],
            "--gpus 8 cannot form the groups of parallel.context",
        ),
        (["configs/hh.yaml", "--mfu", "40", "--pairs", "0"], "--pairs must be more than 0; --mfu is a share"),
        (["configs/hh.yaml", "--model-config", "no.json"], "--model-config no.json cannot be read"),
    ],
)
def test_what_cannot_be_predicted_is_refused_in_one_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.startswith("rmcore plan: ")


def test_unknown_data_leave_the_hours_open_and_list_the_flags(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shape = GPTNeoXConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=2, vocab_size=128
    )
    (tmp_path / "config.json").write_text(shape.to_json_string())
    arguments = ["model.name=nobody/nothing", "data.train.path=nobody/rows", "--model-config", str(tmp_path)]
    found = predicted(capsys, *arguments)
    assert found["steps"] is None and found["asked"]["hours"] is None and found["asked"]["fits"] is True
    assert "give --pairs N and --tokens-a-pair T" in found["data"]["notes"][0]
    found = predicted(capsys, *arguments, "--pairs", "640", "--tokens-a-pair", "100", "--sharing", "1.5")
    assert found["steps"] == 10
    # [P | C | R] = 50, 25, 25: P sees 1275 pairs of tokens, each tail 25 * 50 + 325
    assert found["data"]["visible"] == 1275 + 2 * (25 * 50 + 325)


def test_help_lists_the_flags_without_importing_torch() -> None:
    code = (
        "import sys\nfrom rmcore.plan import main\n"
        "try:\n    main(['--help'])\nfinally:\n    print('loaded', sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert all(flag in done.stdout for flag in ("--gpus", "--tokens-a-pair", "--model-config"))
    assert done.stdout.endswith("loaded []\n")
