"""The benchmarks run, and their results are consistent. The rates of a busy test machine mean nothing, so no test reads
a clock.
"""

import json
import os
import re
import subprocess
import sys
from argparse import Namespace

import pytest

from rmcore.bench import scaling
from rmcore.bench.__main__ import COMMANDS, main
from rmcore.bench.measure import RESULTS, add_up, undisturbed
from rmcore.bench.profile import kind_of, medians
from rmcore.bench.train import ratios
from tests.harness.paths import ROOT, SHARED, needs_shared


def test_the_gpu_script_runs_every_section_without_a_gpu(tmp_path):
    out = tmp_path / "gpu.json"
    command = ["bash", str(ROOT / "launch" / "bench_gpu.sh"), "--tiny", "--out", str(out)]
    environment = os.environ | {"RMCORE_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    sections = json.loads(out.read_text())["sections"]
    lines = [json.loads(line)["what"] for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert lines[0] == "machine" and {"section ops", "tiny hh zero2", "section profile"} <= set(lines)
    for name, off in sections["ops"].items():
        bound = 2e-2 if "bfloat16" in name else 1e-5
        assert name == "seconds" or max(off.values()) < bound, (name, off)
    assert "rmcore" in sections["profile"]["table"]
    assert all(sections["exactness"][family]["within_twice_bf16"] for family in ("gpt_neox", "llama"))
    for name, run in sections["train"].items():
        if name.startswith("tiny"):
            assert "error" not in run, run
            assert run["pairs_per_s"] > 0
    # The same pairs: a padded trainer computes the logical tokens and padding, rmcore fewer than the logical tokens.
    assert (
        sections["train"]["tiny hh ddp"]["logical_over_computed"]
        > 1
        > sections["train"]["tiny hh padded"]["logical_over_computed"]
    )


@pytest.mark.slow
@pytest.mark.skipif("RMCORE_TRL" not in os.environ, reason="RMCORE_TRL is not set to an environment with TRL")
def test_the_gpu_script_runs_trl_on_the_same_shapes_and_rows(tmp_path):
    out = tmp_path / "gpu.json"
    assert main(["gpu", "--tiny", "--peers", os.environ["RMCORE_TRL"], "--sections", "train", "--out", str(out)]) == 0
    train = json.loads(out.read_text())["sections"]["train"]
    for arm in ("best", "default"):
        run = train[f"tiny hh trl {arm}"]
        assert run["steps"] == 4 and run["pairs_at_once"] == 4 and run["pairs_per_s"] > 0


def test_the_gpu_script_needs_no_datasets_package():
    """On a GPU machine without network there are torch and transformers; the script needs no more."""
    code = "import sys; sys.modules['datasets'] = None; sys.modules['tensorboard'] = None; import rmcore.bench.gpu"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_train_measures_the_real_loop_and_the_tables_show_it(tmp_path, capsys):
    out = tmp_path / "train.json"
    arguments = ["train", "--model", "synthetic", "--data", "synthetic", "--precision", "fp32", "--repeat", "1"]
    arguments += ["--threads", "1", "--limit", "64", "--max-steps", "6", "--out", str(out)]
    assert main(arguments) == 0
    run = json.loads(out.read_text())["runs"][0]
    assert run["steps"] == 6 and run["warm"] == 4
    assert run["pairs_per_s"] == 8 * 2 / run["wall_s"]
    assert run["logical_tokens_per_s"] >= run["computed_tokens_per_s"] > 0
    assert run["share_of_matrix_rate"] > 0
    capsys.readouterr()
    assert main(["tables", "--results", str(tmp_path)]) == 0
    assert f"| synthetic | synthetic | rmcore | fp32 | {run['pairs_per_s']:.2f} " in capsys.readouterr().out


@needs_shared
def test_data_prepares_the_same_rows_each_way_and_the_table_shows_it(tmp_path, capsys):
    out = tmp_path / "data.json"
    arguments = ["data", "--tokenizer", str(SHARED / "data/20B_tokenizer.json"), "--out", str(out), "--repeat", "1"]
    arguments += ["--rows", str(SHARED / "data/ci/hh_helpful_64.jsonl"), "--pairs", "80", "--longest", "900"]
    assert main([*arguments, "--arms", "again", "map", "plan", "--plan-pairs", "3000"]) == 0
    text = out.read_text()
    found = json.loads(text)["figures"]
    assert found["rmcore_kept"] == found["map_kept"] == 80
    rates = [found[f"{arm}_pairs_per_cpu_s"]["median"] for arm in ("rmcore", "map")]
    assert found["times_map"] == rates[0] / rates[1] and found["second_start_cpu_s"]["median"] > 0
    assert found["plan"]["steps"] == found["plan_every_step_cut"]["steps"] == -(-3000 // 256)
    assert str(tmp_path) not in text and str(SHARED) not in text and "rmcore-bench-" not in text
    capsys.readouterr()
    assert main(["tables", "--results", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert f"| datasets.map | {rates[1]:,.0f} " in table and "planning 3,000 pairs, 12 steps, every step cut" in table


@pytest.mark.slow
@needs_shared
def test_curves_trains_each_arm_on_the_same_pairs(tmp_path, capsys):
    out = tmp_path / "curves.json"
    arguments = ["curves", "--model", str(SHARED / "data/stories260k"), "--out", str(out), "--held-out", "0.5"]
    arguments += ["--data", str(SHARED / "data/ci/hh_helpful_64.jsonl"), "--arms", "fp32", "bf16 states"]
    assert main([*arguments, "--set", "data.template=none", "batch.pairs=8", "run.max_steps=2", "log.every=1"]) == 0
    record = json.loads(out.read_text())
    assert record["train"] + record["eval"] == 64
    assert [step for step, _ in record["runs"]["bf16 states"]["loss"]] == [1, 2]
    assert set(record["runs"]["bf16 states"]["difference"]) == {"difference", "low", "high", "p"}
    assert "| bf16 states | " in capsys.readouterr().out


def test_bf16_is_compared_with_the_better_precision_of_the_peer():
    def run(arm, precision, rate, epoch, others=0.0):
        return {
            "arm": arm,
            "precision": precision,
            "pairs_per_s": rate,
            "epoch_pairs_per_s": epoch,
            "others_share": others,
        }

    runs = [
        run("rmcore", "fp32", 40.0, 30.0),
        run("rmcore", "fp32", 10.0, 10.0, others=0.5),
        run("rmcore", "bf16", 60.0, 50.0),
        run("trl best", "fp32", 10.0, 10.0),
        run("trl best", "bf16", 8.0, 8.0),
        run("trl grouped", "fp32", 20.0, 15.0),
    ]
    lines = ratios(runs)
    assert "fp32 rmcore 40.00 / trl best 10.00 = 4.00" in lines  # without the disturbed run
    assert "bf16 rmcore 60.00 / trl best 10.00 = 6.00" in lines
    assert "fp32 rmcore 30.00 / trl grouped 15.00 = 2.00" in lines


def test_scaling_is_compared_with_the_ideal_and_the_machine_within_a_repetition():
    rates = {"one": [10.0, 20.0, 5.0], "ranks": [19.0, 36.0, 10.0], "apart": [20.0, 40.0, 10.0]}
    runs = [
        {
            "arm": arm,
            "repetition": n,
            "pairs_per_s": rate,
            "others_share": 0.5 if n == 2 else 0.0,
            "all_reduce_s": 0.1,
            "wall_s": 6.0,
            "steps": 4,
            "warm": 1,
            "busiest": 1.0,
        }
        for arm, given in rates.items()
        for n, rate in enumerate(given)
    ]
    found = scaling.summary(runs, Namespace(ranks=2, repeat=3))
    assert found["efficiency"] == {"median": 0.925, "least": 0.9, "most": 0.95, "runs": 2}  # without the disturbed one
    assert found["of_ceiling"]["least"] == 0.9 and found["ceiling"]["median"] == 1.0
    assert found["step_s"] == 2.0


@pytest.mark.slow
def test_scaling_runs_its_arms_over_the_same_pairs(tmp_path):
    out = tmp_path / "scaling.json"
    arguments = ["scaling", "--model", "synthetic", "--data", "synthetic", "--pairs", "16", "--repeat", "1"]
    assert main([*arguments, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert {run["arm"]: run["steps"] for run in record["runs"]} == {"one": 8, "ranks": 4, "apart": 8}
    tokens = {run["arm"]: run["wall_s"] * run["computed_tokens_per_s"] for run in record["runs"]}
    assert tokens["one"] == pytest.approx(tokens["ranks"]) == pytest.approx(tokens["apart"])
    assert main(["tables", "--results", str(tmp_path)]) == 0


def test_sums_and_kinds():
    laps = [{"wall_s": 1.0, "cpu_s": 0.5, "others_cpu_s": 0.1}] * 3
    assert add_up(laps)["wall_s"] == 3.0
    assert [run["n"] for run in undisturbed([{"others_share": 0.5, "n": 0}, {"others_share": 0.01, "n": 1}])] == [1]
    assert len(undisturbed([{"others_share": 0.5}])) == 1
    assert kind_of("aten::addmm") == "matrix products" and kind_of("rmcore::ragged_attention_backward") == "attention"


def test_an_unknown_command_is_refused(capsys):
    assert main(["trian"]) == 2
    assert "unknown command `trian`" in capsys.readouterr().err


def test_the_readme_has_every_command_and_only_results_that_exist():
    readme = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    assert [command for command in COMMANDS if f"| `{command}` |" not in readme] == []
    names = set(re.findall(r"`([\w*-]+\.(?:json|png))`", readme)) - {"lengths.json"}
    assert len(names) > 10 and [name for name in sorted(names) if not [*RESULTS.glob(name)]] == []


def test_a_profile_compares_each_step_with_the_products_around_it():
    """Not the medians of both with each other: a machine that halves its speed halves both."""
    found = medians([(30e9, 100e9), (50e9, 100e9), (20e9, 50e9), (10e9, 50e9)])  # 0.3, 0.5, 0.4, 0.2
    assert found["ratio"] == pytest.approx(0.35) and (found["useful_gflops"], found["matrix_gflops"]) == (25.0, 75.0)
    assert found["ratio_q1"] < 0.3 and found["ratio_q3"] > 0.4 and medians([]) == {}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_explains_the_benchmark(command, capsys):
    """What goes in and what comes out, and what a ratio means where there is one."""
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "Input: " in text and "Output: " in text
    if command in ("train", "score", "scaling", "serve", "kernels", "data", "checkpoint", "profile"):
        assert "Ratio: " in text
