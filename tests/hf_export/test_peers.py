"""The exported directory as others load it: TRL's evaluation and RewardBench's default pipeline, for real, in a Python
environment of their own.

    RMCORE_TRL=/path/to/venv RMCORE_REWARDBENCH=/path/to/venv python -m pytest -m slow tests/hf_export/test_peers.py

Plain transformers (alone, padded on the right, padded on the left, the pipeline) needs nothing and is tried first.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from rmcore.data.synthetic import synthetic_rows
from rmcore.parallel.world import running_world
from rmcore.score import score
from tests.harness.crash import run
from tests.harness.paths import ROOT
from tests.harness.small_run import arguments

CLOSE = 1e-5  # fp32, two layers, rewards of order 1
pytestmark = pytest.mark.distributed  # it trains, in a process of its own


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run's model directory, with a chat template."""
    folder = tmp_path_factory.mktemp("run")
    rows = list(synthetic_rows(48, 0, "train"))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = run(folder / "run", arguments(folder, "data.template=simple_chat"), 1, publish=True)
    assert outcome.codes == [0], outcome.text
    return folder / "run" / "model"


@pytest.fixture(scope="module")
def rewards(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[dict[str, str]]], np.ndarray]:
    """Conversations of unequal lengths, and what `rmcore score` gives them: the reward to be found everywhere."""
    words = ["so", "it", "is", "said", "and", "done", "by", "those", "who", "know", "of", "it"]
    conversations = [
        [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": " ".join(words[: 1 + n % 9])}]
        for n in range(10)
    ]
    folder = tmp_path_factory.mktemp("scored")
    (folder / "in.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in conversations))
    with running_world() as world:
        score(world, str(trained), str(folder / "in.jsonl"), str(folder / "out.jsonl"))
    found = np.array([json.loads(line)["reward"] for line in (folder / "out.jsonl").read_text().splitlines()])
    assert np.std(found) > 100 * CLOSE, "another text's reward would show"
    return conversations, found


def texts_of(trained: Path, conversations: list[list[dict[str, str]]]) -> tuple[Any, list[str]]:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    return tokenizer, [tokenizer.apply_chat_template(turns, tokenize=False) for turns in conversations]


@pytest.mark.parametrize("side", ["right", "left"])
def test_plain_transformers_padded_on_either_side(trained: Path, rewards: Any, side: str) -> None:
    tokenizer, texts = texts_of(trained, rewards[0])
    assert tokenizer.padding_side == "right"
    tokenizer.padding_side = side
    model = AutoModelForSequenceClassification.from_pretrained(trained, dtype=torch.float32).eval()
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    assert (batch.attention_mask == 0).any()
    with torch.no_grad():
        found = model(**batch).logits[:, 0].numpy()
    np.testing.assert_allclose(found, rewards[1], atol=CLOSE, rtol=0)


def test_the_pipeline_and_the_bare_backbone(trained: Path, rewards: Any) -> None:
    """The pipeline one by one and in padded batches; AutoModel gives the backbone, whose last state the head reads."""
    _, texts = texts_of(trained, rewards[0])
    pipe = pipeline("text-classification", str(trained), device="cpu", dtype=torch.float32)
    for size in (1, 4):
        found = [one["score"] for one in pipe(texts, batch_size=size)]
        np.testing.assert_allclose(found, rewards[1], atol=CLOSE, rtol=0)
    backbone = AutoModel.from_pretrained(trained, dtype=torch.float32).eval()
    weight = AutoModelForSequenceClassification.from_pretrained(trained, dtype=torch.float32).score.weight[0]
    ids = AutoTokenizer.from_pretrained(trained)(texts[0], return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        assert float(backbone(input_ids=ids).last_hidden_state[0, -1] @ weight) == pytest.approx(
            rewards[1][0], abs=CLOSE
        )


def by_peer(name: str, script: str, model: Path, rows: Any, folder: Path) -> dict[str, Any]:
    """What tests/SCRIPT prints, run by the environment that the variable names."""
    place = os.environ.get(name)
    python = Path(place or "nowhere") / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"needs the peer in an environment of its own: set {name} to it")
    (folder / "rows.json").write_text(json.dumps(rows))
    command = [str(python), str(ROOT / "tests" / script), str(model), str(folder / "rows.json")]
    surroundings = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=surroundings, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_trl_evaluates_it_with_the_same_rewards(trained: Path, rewards: Any, tmp_path: Path) -> None:
    """Pairs of conversations through RewardTrainer.evaluate, in padded batches of 5 pairs; its figures follow."""
    conversations, expected = rewards
    pairs = [(n, (n + 3) % 10) for n in range(10)]
    rows = [{"chosen": conversations[a], "rejected": conversations[b]} for a, b in pairs]
    found = by_peer("RMCORE_TRL", "peer_trl.py", trained, rows, tmp_path)
    np.testing.assert_allclose(found["rewards"], [[expected[a], expected[b]] for a, b in pairs], atol=CLOSE, rtol=0)
    margins = np.array([expected[a] - expected[b] for a, b in pairs])
    assert found["figures"]["eval_accuracy"] == pytest.approx(np.mean(margins > 0), abs=1e-6)
    assert found["figures"]["eval_loss"] == pytest.approx(np.mean(np.log1p(np.exp(-margins))), abs=CLOSE)


@pytest.mark.slow
def test_rewardbench_s_default_pipeline_gives_the_same_rewards(trained: Path, rewards: Any, tmp_path: Path) -> None:
    found = by_peer("RMCORE_REWARDBENCH", "peer_rewardbench.py", trained, rewards[0], tmp_path)
    np.testing.assert_allclose(found["rewards"], rewards[1], atol=CLOSE, rtol=0)
