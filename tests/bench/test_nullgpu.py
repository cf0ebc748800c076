"""`rmcore.bench nullgpu`: its bounds, and its recorded runs, which PyTorch's real allocator made."""

import json
import sysconfig

import pytest

from rmcore.bench import nullgpu
from rmcore.bench.measure import RESULTS
from rmcore.bench.nullgpu.child import shape_of
from rmcore.config import Config
from rmcore.cost.dry_run import DryRun
from rmcore.cost.memory import memory_of_step, token_bytes

RECORD = json.loads((RESULTS / "nullgpu.json").read_text(encoding="utf-8"))
RUNS = RECORD["runs"] + [run for run in RECORD["tiles"] if run["attention"] == "tiles"]


def test_the_recorded_runs_hold_every_bound():
    assert {(run["model"], run["strategy"]) for run in RUNS} >= {("1.4b", "ddp"), ("1.4b", "zero2"), ("7b", "zero2")}
    assert any(run["compiled"] for run in RUNS)
    assert [run["broken"] for run in RUNS if run["broken"] or nullgpu.complaints(run)] == []


def test_a_broken_bound_is_a_complaint():
    good = next(run for run in RUNS if run["compiled"] and run["strategy"] == "ddp")
    for change, words in (
        ({"waits": 2}, "the host waits: 2"),
        ({"launches_per_layer": 99.0}, "99 launches per layer and micro batch, compiled: 70"),
        ({"peak_gb": 1.2 * good["predicted_gb"]}, "(+20%)"),
        ({"peak_gb": 0.8 * good["predicted_gb"]}, "(-20%)"),
        ({"launches_per_layer": 86.0, "strategy": "zero3"}, "86 launches per layer and micro batch, compiled: 85"),
        ({"copies_in_line": 21.0}, "21 copies to the device behind the kernels of a step"),
        ({"graph_breaks": 1}, "1 graph breaks"),
        ({"late_compilations": 3}, "3 late compilations"),
    ):
        (complaint,) = nullgpu.complaints(good | change)
        assert words in complaint


@pytest.mark.parametrize(
    ("model", "strategy", "compiled"),
    [
        ("1.4b", "ddp", False),
        ("7b", "zero2", False),
        ("gemma2", "zero2", False),
        pytest.param("7b", "zero3", True, marks=pytest.mark.slow),
        pytest.param("2.8b", "ddp", True, marks=pytest.mark.slow),
    ],
)
def test_the_plan_predicts_the_allocators_peak(model, strategy, compiled):
    """The peak of the CUDA build's allocator over real steps, by today's prediction; see nullgpu.PEAK."""
    of = [run for run in RUNS if (run["model"], run["strategy"], run["compiled"]) == (model, strategy, compiled)]
    run = next((run for run in of if run["recompute"] == "selective"), of[0])
    parallel = {"strategy": strategy, "precision": run["precision"], "compile": compiled}
    config = Config.model_validate({"model": {"name": "m"}, "data": {"train": {"path": "p"}}, "parallel": parallel})
    dry = DryRun(shape_of(model))
    per_token = token_bytes(config, dry, run["recompute"])
    deferred = run["micro_batches"] > 1
    memory = memory_of_step(
        config, dry.sizes, per_token, tokens=run["most_tokens"], ranks=run["ranks"], deferred=deferred
    )
    assert memory.total / 1e9 == pytest.approx(run["peak_gb"], rel=nullgpu.PEAK)


def test_without_a_cuda_build_one_message_says_what_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert nullgpu.main(["--out", str(tmp_path / "out.json")]) == 1
    assert "no CUDA headers: install a CUDA build of torch" in capsys.readouterr().err
