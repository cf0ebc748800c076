"""`rmcore export`: a checkpoint of any strategy gives the directory that the end of the training wrote."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import minimize_scalar
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from rmcore.config import UserError
from rmcore.data.synthetic import synthetic_rows
from rmcore.export import main
from rmcore.hf_export.from_checkpoint import export
from rmcore.parallel.world import running_world
from rmcore.scoring.score import score
from rmcore.scoring.scorer import Scored, Scorer
from tests.harness.crash import run
from tests.harness.small_run import arguments

pytestmark = pytest.mark.distributed
HELD_OUT = ("data.eval_fraction=0.25", "run.evals=1", "run.max_steps=3", "run.save_every=1", "run.keep=3")


def trained(folder: Path, size: int, *more: str) -> Path:
    outcome = run(folder / "run", arguments(folder, *HELD_OUT, *more), size, publish=True)
    assert outcome.codes == [0] * size, outcome.text
    return folder / "run"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank, which tests only read."""
    return trained(tmp_path_factory.mktemp("plain"), 1)


@pytest.mark.parametrize("strategy, size", [("ddp", 1), ("zero1", 2), ("zero2", 2), ("zero3", 3)])
def test_a_checkpoint_of_any_strategy_exports_what_the_run_published(tmp_path: Path, strategy: str, size: int) -> None:
    """Bit-identical weights, and the same config, tokenizer and template as the model directory of the run."""
    folder = trained(tmp_path, size, f"parallel.strategy={strategy}")
    lines = export(str(folder), str(tmp_path / "out"))
    assert lines[-1].startswith(f"{tmp_path / 'out'}: step 3; rewards reloaded by transformers differ by")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "rmcore_config.yaml"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / "model" / name).read_bytes(), name
    earlier = export(str(folder / "checkpoints" / "step-1"), str(tmp_path / "earlier"))
    assert "step 1" in earlier[-1]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("earlier", "out"))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)


def test_the_card_has_data_metrics_command_and_config(plain: Path, tmp_path: Path) -> None:
    export(str(plain), str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "rows were kept" in card and "Fingerprint of the tokenised data" in card
    assert "| all |" in card and "rmcore.train rmcore_config.yaml" in card and "template: none" in card
    assert "Limits" in card and 'LLM(model="path/to/this/directory", runner="pooling", dtype="float32")' in card
    own = (plain / "model" / "README.md").read_text().splitlines()  # it also has a line per source
    assert [line for line in own if line in card.splitlines()] == card.splitlines()


def test_normalisation_is_measured_stored_and_changes_no_weight(plain: Path, tmp_path: Path) -> None:
    """Plain transformers gives raw rewards, `rmcore score --normalise` rewards of mean 0 and deviation 1."""
    export(str(plain), str(tmp_path / "raw"))
    export(str(plain), str(tmp_path / "normalised"), normalise=True, max_shard_size="1MB")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("raw", "normalised")]
    stored = configs[1].pop("pooler_config")
    assert configs[0] == configs[1], "nothing else differs"
    weights = {
        name: tensor
        for shard in (tmp_path / "normalised").glob("*.safetensors")
        for name, tensor in load_file(shard).items()
    }
    assert len(list((tmp_path / "normalised").glob("*.safetensors"))) > 1
    raw = load_file(tmp_path / "raw" / "model.safetensors")
    assert weights.keys() == raw.keys() and all(torch.equal(weights[name], raw[name]) for name in raw)

    rows = [{"chosen": row["chosen"], "rejected": row["rejected"]} for row in synthetic_rows(40, 5, "test")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for normalise in (False, True):
        with running_world() as world:
            score(world, str(tmp_path / "normalised"), str(tmp_path / "rows.jsonl"), str(tmp_path / "s"), [], normalise)
        found[normalise] = np.array([json.loads(line)["rewards"] for line in (tmp_path / "s").read_text().splitlines()])
    expected = (found[False] - stored["logit_mean"]) / stored["logit_sigma"]
    np.testing.assert_allclose(found[True], expected, rtol=1e-12)

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "normalised").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "normalised")
    text = rows[0]["chosen"] + tokenizer.eos_token
    with torch.no_grad():
        alone = model(**tokenizer(text, return_tensors="pt")).logits.item()
    assert alone == pytest.approx(found[False][0, 0], abs=1e-5)  # fp32, two layers
    piped = pipeline("text-classification", str(tmp_path / "normalised"), device="cpu")(text)[0]
    assert piped["score"] == pytest.approx(alone, abs=1e-6)


def test_calibrated_probabilities_belong_to_the_raw_rewards(plain: Path, tmp_path: Path) -> None:
    """softmax(raw rewards / T), with T where SciPy finds the least log loss; normalised rewards change none of them."""

    def scored(directory: Path, rows: list[dict[str, Any]], **options: Any) -> tuple[Scorer, list[Scored]]:
        scorer = Scorer(str(directory), device=torch.device("cpu"), **options)
        placed = [(row, f"row {number}") for number, row in enumerate(rows)]
        scorer.choose_path(placed)
        return scorer, scorer.rewards(placed)

    # Verdicts of the model itself, but for the closest quarter, so that some temperature is the best.
    rows: list[dict[str, Any]] = [*synthetic_rows(24, 5, "test")]
    rewards = np.array([one.rewards for one in scored(plain / "model", rows)[1]], dtype=np.float64)
    gap = rewards[:, 0] - rewards[:, 1]
    gap = np.where(np.argsort(np.argsort(np.abs(gap))) < 6, -1, 1) * np.abs(gap)
    for row, led, agrees in zip(rows, rewards[:, 0] > rewards[:, 1], gap > 0, strict=True):
        if led != agrees:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in rows))
    best = minimize_scalar(lambda log: np.logaddexp(0.0, -gap / math.exp(log)).mean(), (-7.0, 7.0), tol=1e-10)

    out = tmp_path / "calibrated"
    export(str(plain), str(out), ["data.eval_fraction=0", f"data.eval.path={held}"], normalise=True, calibrated=True)
    temperature = json.loads((out / "config.json").read_text())["rmcore"]["temperature"]
    assert temperature == pytest.approx(math.exp(best.x), rel=1e-3)
    asked = [{"prompt": rows[0]["prompt"], "answers": [" Ben was.", " It is red.", " Anna has it."]}]
    (_, [raw]), (scorer, [normalised]) = (scored(out, asked, normalise=normalise) for normalise in (False, True))
    expected = np.exp(np.array(raw.rewards) / temperature) / np.exp(np.array(raw.rewards) / temperature).sum()
    assert np.ptp(expected) > 0.01 and abs(scorer.normalisation.deviation - 1) > 0.1, "both numbers matter"
    assert raw.probabilities == pytest.approx(expected.tolist(), rel=1e-9)
    assert normalised.probabilities == pytest.approx(expected.tolist(), rel=1e-9)


def test_the_measured_mean_and_deviation_are_those_of_all_held_out_answers(tmp_path: Path) -> None:
    """Compared with `rmcore score` on the rows that the run held out."""
    rows = list(synthetic_rows(30, 3, "test"))
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("data.eval_fraction=0.0", f"data.eval.path={held}")
    folder = run(tmp_path / "run", arguments(tmp_path, *HELD_OUT[1:], *more), 1, publish=True).directory
    export(str(folder), str(tmp_path / "out"), normalise=True)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["pooler_config"]
    with running_world() as world:
        score(world, str(tmp_path / "out"), str(held), str(tmp_path / "s"), [])
    rewards = [r for line in (tmp_path / "s").read_text().splitlines() for r in json.loads(line)["rewards"]]
    assert stored["logit_mean"] == pytest.approx(np.mean(rewards), abs=1e-6)
    assert stored["logit_sigma"] == pytest.approx(np.std(rewards), rel=1e-5)
    assert np.std(rewards) > 1e-3


def test_without_its_data_a_checkpoint_still_exports_with_a_note(tmp_path: Path) -> None:
    folder = trained(tmp_path, 1)
    (tmp_path / "pairs.jsonl").unlink()
    lines = export(str(folder), str(tmp_path / "out"), ["data.cache=" + str(tmp_path / "nothing")])
    assert any(line.startswith("note: checked on built-in texts: ") for line in lines)
    assert any("the tokenizer and the template are not compared" in line for line in lines)
    with pytest.raises(UserError, match="--normalise needs the run's held-out data"):
        export(str(folder), str(tmp_path / "n"), ["data.cache=" + str(tmp_path / "nothing")], normalise=True)
    assert "counts were not available" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        folder / "model" / "model.safetensors"
    ).read_bytes()


def test_a_template_that_has_changed_is_refused(tmp_path: Path) -> None:
    """The weights were trained on other token ids than the export would read."""
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{{ eos_token }}")
    folder = run(tmp_path / "run", arguments(tmp_path, *HELD_OUT, f"data.template={template}"), 1).directory
    assert not any("note" in line for line in export(str(folder), str(tmp_path / "same")))
    template.write_text(template.read_text().replace("<", "["))
    words = r"template or the tokenizer have changed since .*step-3 was written \(fingerprint \w{12} then, \w{12} now"
    with pytest.raises(UserError, match=words):
        export(str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    lines = export(str(folder), str(tmp_path / "out"), ["run.allow_changes=[data]"])
    assert re.search(rf"note: .*{words}", lines[0]) and "rewards reloaded by transformers differ" in lines[-1]


def test_damaged_checkpoints_are_skipped_and_never_exported(tmp_path: Path, capsys: Any) -> None:
    folder = trained(tmp_path, 1)
    [shard] = (folder / "checkpoints" / "step-3").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    lines = export(str(folder), str(tmp_path / "out"))
    assert "warning: bad checkpoint" in lines[0] and "step 2" in lines[-1]
    assert main([str(folder / "checkpoints" / "step-3"), "-o", str(tmp_path / "bad")]) == 2
    assert "does not match its hash" in capsys.readouterr().err and not (tmp_path / "bad").exists()
    shutil.rmtree(folder / "checkpoints")
    assert main([str(folder), "-o", str(tmp_path / "none")]) == 2
    assert "neither a checkpoint nor a run directory" in capsys.readouterr().err
