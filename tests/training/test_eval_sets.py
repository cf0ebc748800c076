"""Several evaluation sets in one run: each with its own metrics, the same as alone and as from `rmcore evaluate`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rmcore.config import UserError, load_config
from rmcore.data.prepare import prepare_data
from rmcore.data.tokens.tokenizer import load_tokenizer
from rmcore.evaluate import main
from rmcore.hf_export.from_checkpoint import export
from rmcore.parallel.world import running_world
from rmcore.tracking.tracker import Tracker
from rmcore.training.assembly import assemble
from rmcore.training.held_out import evaluate_run
from rmcore.training.signals import Signals
from tests.evaluation.test_rewardbench import rows_1, rows_2, write
from tests.harness.crash import Outcome, run
from tests.harness.small_run import arguments, metrics
from tests.harness.walks import STEPS_OF_SEVEN

# A fixed budget: the longest texts of the sets must not change how the training is cut into micro batches.
SHORT = ["run.max_steps=2", "run.evals=2", "batch.tokens=2000", "log.samples=2", "run.save_every=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    generator = np.random.Generator(np.random.PCG64(5))
    write(folder / "bench1.jsonl", rows_1(generator))
    write(folder / "bench2.jsonl", rows_2(generator))
    return folder


def sets(folder: Path, *more: str) -> str:
    """data.eval: `half`, made of two sources; RewardBench 1 and 2; and more."""
    pairs = f"path: {folder}/pairs.jsonl"
    halves = [f"{{{pairs}, split: 'train[:25%]', set: half}}", f"{{{pairs}, split: 'train[25%:50%]', set: half}}"]
    benches = [f"{{path: {folder}/bench{version}.jsonl, set: bench{version}}}" for version in (1, 2)]
    return f"data.eval=[{', '.join([halves[0], *benches, halves[1], *more])}]"


@pytest.fixture(scope="module")
def several(folder: Path) -> Outcome:
    """Held-out rows of train and three sets, on two ranks, with an export."""
    given = arguments(folder, *SHORT, sets(folder), "data.eval_fraction=0.25")
    outcome = run(folder / "several", given, 2, publish=True)
    assert outcome.codes == [0, 0], outcome.text
    return outcome


def evaluations(outcome: Outcome) -> list[dict[str, float]]:
    return [line for line in metrics(outcome) if any(key.startswith("eval/") for key in line)]


def of_set(line: dict[str, float], name: str) -> dict[str, float]:
    return {key.removeprefix(f"eval/{name}/"): line[key] for key in line if key.startswith(f"eval/{name}/")}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_held_out_pairs_are_computed_in_the_precision_of_the_run(tmp_path: Path, precision: str) -> None:
    keys = ["model.name=synthetic", *STEPS_OF_SEVEN, f"parallel.precision={precision}", f"run.dir={tmp_path}"]
    seen: list[bool] = []
    with running_world(60, 1) as world:
        assembled = assemble(load_config(None, keys), world)
        model = assembled.strategy.model
        model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        assert evaluate_run(assembled, Tracker(), assembled.plan.step(0), Signals())
    assert set(seen) == {precision == "bf16"}


@pytest.mark.distributed
def test_each_set_has_its_metrics_everywhere(several: Outcome) -> None:
    lines = evaluations(several)
    assert [line["step"] for line in lines] == [1, 2], "one line for all sets"
    names = ["rm", "half", "bench1", "bench2"]
    for line in lines:
        assert list(dict.fromkeys(key.split("/")[1] for key in line if "/" in key)) == names
        assert of_set(line, "half")["count"] == 24
    found = several.status["eval"]
    assert list(found["sets"]) == names and found["accuracy"] == found["sets"]["rm"]["accuracy"]
    for name in names:
        assert {key: found["sets"][name][key] for key in of_set(lines[-1], name)} == of_set(lines[-1], name)
    assert "evaluation of half at step 2: accuracy" in several.text and "evaluation at step 2: acc" in several.text
    assert "rewardbench 0." in several.text and "samples of bench2 at step 2" in several.text
    rows = [json.loads(line) for line in (several.directory / "samples.jsonl").read_text().splitlines()]
    assert [row.get("set") for row in rows if row["step"] == 2] == [n for n in (None, *names[1:]) for _ in range(2)]
    page = (several.directory / "report.html").read_text()
    assert all(f"<td>eval/{name}</td>" in page for name in names)
    assert "RewardBench 2 of eval/bench2" in page and "those of eval/rm, the main" in page
    card = (several.directory / "model" / "README.md").read_text()
    assert all(f"### eval/{name}\n" in card for name in names)


@pytest.mark.distributed
def test_a_set_has_the_metrics_that_it_has_alone(folder: Path, several: Outcome) -> None:
    """On one rank, bit for bit; and on two ranks the same, but for the rounding of the training itself."""
    given = arguments(folder, *SHORT, sets(folder), "run.dir=" + str(folder / "together"))
    together = run(folder / "together", given, 1)
    pairs = f"{{path: {folder}/pairs.jsonl, split: "
    alone = f"data.eval=[{pairs}'train[:25%]'}}, {pairs}'train[25%:50%]'}}]"
    single = run(folder / "single", arguments(folder, *SHORT, alone), 1)
    assert together.codes == single.codes == [0], together.text + single.text
    for ours, theirs in zip(evaluations(together), evaluations(single), strict=True):
        assert of_set(ours, "half") == of_set(theirs, "rm")
    assert list(single.status["eval"]) == [key for key in together.status["eval"] if key != "sets"]
    held_out = run(folder / "one-rank", arguments(folder, *SHORT, sets(folder), "data.eval_fraction=0.25"), 1)
    for ours, theirs in zip(evaluations(held_out), evaluations(several), strict=True):
        # See ROUNDING in tests/harness/small_run.py: a weight differs by less than 1e-4, a reward by some ten of that.
        assert {key: theirs[key] for key in ours if "loss" in key} == pytest.approx(
            {key: ours[key] for key in ours if "loss" in key}, abs=1e-3
        )
        counts = [key for key in ours if key.endswith("/count")]
        assert len(counts) == 4 and [ours[key] for key in counts] == [theirs[key] for key in counts]


@pytest.mark.distributed
def test_rewardbench_in_a_run_is_what_rmcore_evaluate_computes(
    folder: Path, several: Outcome, capsys: pytest.CaptureFixture[str]
) -> None:
    for version in (1, 2):
        words = [str(several.directory / "model"), str(folder / f"bench{version}.jsonl")]
        assert main([*words, f"data.cache={folder}/cache", "parallel.precision=fp32", "--json"]) == 0
        expected = json.loads(capsys.readouterr().out)
        found = several.status["eval"]["sets"][f"bench{version}"]
        assert found["rewardbench"] == expected["rewardbench"] and found["rewardbench"]["version"] == version
        assert found["sources"].keys() == expected["sources"].keys()
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        logged = of_set(evaluations(several)[-1], f"bench{version}")
        assert logged["rewardbench_score"] == expected["rewardbench"]["score"]
        sections = {key for key in logged if key.startswith("rewardbench_")} - {"rewardbench_score"}
        assert sections == {
            f"rewardbench_{name.lower().replace(' ', '_')}" for name in expected["rewardbench"]["sections"]
        }


@pytest.mark.distributed
def test_an_export_of_a_checkpoint_has_the_metrics_of_all_sets(several: Outcome, tmp_path: Path) -> None:
    export(str(several.directory), str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"### eval/{name}\n" in card for name in ("rm", "half", "bench1", "bench2"))


def test_rows_that_only_begin_like_rewardbench(folder: Path, tmp_path: Path) -> None:
    """Looking at the first rows decides; a later row that differs is an error with its line, never a traceback."""
    good: list[dict[str, Any]] = rows_2(np.random.Generator(np.random.PCG64(6)))[:21]
    for key, value in (("prompt", None), ("chosen", "text"), ("subset", 3), ("rejected", [])):
        path = write(tmp_path / f"{key}.jsonl", [*good, {**good[0], key: value}])
        with pytest.raises(UserError, match=r"jsonl:22|row 22"):
            prepared(folder, f"data.eval=[{{path: {path}, set: bench}}]")
    odd = rows_1(np.random.Generator(np.random.PCG64(6)))
    path = write(tmp_path / "odd.jsonl", [{**row, "subset": ["a", "list"]} for row in odd])
    other = write(tmp_path / "other.jsonl", [{**row, "subset": "mine"} for row in odd])
    assert len(prepared(folder, f"data.eval={{path: {folder}/bench2.jsonl}}", "data.group_by_prompt=true").eval) == 21
    for plain in (path, other):
        assert prepared(folder, f"data.eval=[{{path: {plain}, set: mine}}]").rewardbench == {}


def prepared(folder: Path, *more: str) -> Any:
    config = load_config(None, arguments(folder, "run.evals=1", f"data.cache={folder}/cache", *more))
    return prepare_data(config, load_tokenizer(config), 512)
