"""Compares `rmcore evaluate` on rows of RewardBench 1 and 2 with plain transformers and plain loops."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rmcore.evaluate import main
from rmcore.evaluation.rewardbench import ROWS_2, SECTIONS, SUBSETS, scores_1, scores_2, ties, top_share
from rmcore.evaluation.rewardbench_data import version_of
from rmcore.evaluation.trained import evaluation_config
from tests.harness.exporting import export

# Once more, from the table of the data set's card, so that a slip in one place is not a slip in both.
CHAT_HARD = {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
             "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rewardbench") / "model"
    export(directory)
    return directory


def rewards_of(model: Path, rows: list[tuple[Any, str]]) -> list[float]:
    """Plain transformers, one text at a time; a prompt is a text or turns."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForSequenceClassification.from_pretrained(model)
    found = []
    for prompt, answer in rows:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        turns = [*turns, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
        found.append(network(input_ids=ids).logits[0, 0].item())
    return found


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def metrics_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def words(generator: np.random.Generator, most: int = 4) -> str:
    return " ".join(generator.choice(["red", "cat", "8", "no", "tall", "ink"], generator.integers(1, most + 1)))


def rows_1(generator: np.random.Generator) -> list[dict[str, Any]]:
    """Two or three rows per subset, with all the columns of the published set."""
    rows = []
    for subset in SUBSETS:
        for _ in range(generator.integers(2, 4)):
            chosen, rejected = words(generator), words(generator) + "."
            rows.append({"prompt": words(generator), "chosen": chosen, "chosen_model": "a", "rejected": rejected,
                         "rejected_model": "b", "subset": subset, "id": len(rows)})  # fmt: skip
    return rows


def test_version_1_against_plain_transformers(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.Generator(np.random.PCG64(11))
    rows = rows_1(generator)
    prior = [
        {"prompt": [{"role": "user", "content": words(generator)}], "chosen": words(generator),
         "rejected": words(generator) + "!", "subset": name, "id": n}
        for n, name in enumerate(["anthropic_helpful", "anthropic_hhh", "shp", "summarize", "mtbench_gpt4"] * 2)
    ]  # fmt: skip
    texts = [(row["prompt"], row[side]) for row in rows + prior for side in ("chosen", "rejected")]
    rewards = np.array(rewards_of(model, texts)).reshape(-1, 2)
    right = defaultdict(list)
    for row, (chosen, rejected) in zip(rows + prior, rewards.tolist(), strict=True):
        right[row["subset"]].append(chosen > rejected)
    accuracy = {subset: sum(found) / len(found) for subset, found in right.items()}
    hard = np.average([accuracy[name] for name in CHAT_HARD], weights=list(CHAT_HARD.values()))
    code = [name for name in accuracy if name.startswith("hep-")]
    reasoning = accuracy["math-prm"] / 2 + sum(accuracy[name] for name in code) / 12  # math as much as all code
    sizes = {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
             "xstest-should-respond": 250, "donotanswer": 136}  # fmt: skip
    safety = np.average([accuracy[name] for name in sizes], weights=list(sizes.values()))

    arguments = [str(model), write(tmp_path / "filtered.jsonl", rows), f"data.cache={tmp_path / 'cache'}"]
    alone = metrics_of(capsys, *arguments)["rewardbench"]
    assert alone["version"] == 1 and not alone["complete"] and alone["other_counts"]["math-prm"][1] == 447
    sections = alone["sections"]
    assert (sections["Chat Hard"], sections["Reasoning"], sections["Safety"]) == pytest.approx(
        (hard, reasoning, safety)
    )
    assert alone["score"] == pytest.approx((sections["Chat"] + hard + reasoning + safety) / 4)

    flags = ["--prior-sets", write(tmp_path / "prior.jsonl", prior)]
    both = metrics_of(capsys, *arguments, *flags)
    sets = sum(accuracy[name] for name in ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")) / 4
    assert both["rewardbench"]["sections"]["Prior Sets"] == pytest.approx(sets)
    assert both["rewardbench"]["score"] == pytest.approx((4 * alone["score"] + sets / 2) / 4.5)
    assert "mtbench_gpt4" not in both["sources"], "not a part of the score"


def rows_2(generator: np.random.Generator) -> list[dict[str, Any]]:
    """Three rows of each section and of each kind of tie, with all the columns of the published set."""
    rows = []
    for subset in ROWS_2:
        for number in range(3):
            for kind in ("ref", "tied") if subset == "Ties" else ("",):
                correct = int(generator.integers(2, 5)) if kind == "tied" else 1
                wrong = 3 if not kind else int(generator.integers(2, 6))
                answers = [f"{words(generator)} {i}" for i in range(correct + wrong)]
                if not kind and number == 0:
                    answers[1] = answers[2]  # two wrong answers alike: nothing to do with the correct one
                rows.append({
                    "id": f"{kind}:{number}" if kind else f"{subset}-{number}", "prompt": words(generator),
                    "chosen": answers[:correct], "rejected": answers[correct:], "num_correct": correct,
                    "num_incorrect": wrong, "total_completions": correct + wrong, "models": ["m"] * (correct + wrong),
                    "subset": subset, "additional_metadata": {"category": None, "index": 1.0},
                })  # fmt: skip
    return rows


def test_version_2_against_plain_transformers(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_2(np.random.Generator(np.random.PCG64(12)))
    texts = [(row["prompt"], answer) for row in rows for answer in row["chosen"] + row["rejected"]]
    rewards = iter(rewards_of(model, texts))
    scored = [[next(rewards) for _ in range(row["total_completions"])] for row in rows]
    sections: dict[str, list[float]] = defaultdict(list)
    tie_rows: dict[str, Any] = {}
    for row, found in zip(rows, scored, strict=True):
        if row["subset"] == "Ties":
            tie_rows[row["id"]] = (found[: row["num_correct"]], found[row["num_correct"] :])
        else:
            sections[row["subset"]].append((found[0] == max(found)) / found.count(max(found)))
    expected = {name: sum(found) / len(found) for name, found in sections.items()}
    expected["Ties"] = tie_score(tie_rows)

    path = write(tmp_path / "test.jsonl", rows)
    metrics = metrics_of(capsys, str(model), path, f"data.cache={tmp_path / 'cache'}")
    assert metrics["rewardbench"]["sections"] == pytest.approx(expected)
    assert metrics["rewardbench"]["score"] == pytest.approx(sum(expected.values()) / 6)
    assert metrics["rewardbench"]["other_counts"]["Focus"] == [3, 495]
    assert metrics["sources"].keys() == ROWS_2.keys(), "the ties are one source"
    assert metrics["sources"]["Math"]["best_of_k_accuracy"] == pytest.approx(expected["Math"])
    assert main([str(model), path, f"data.cache={tmp_path / 'cache'}"]) == 0
    printed = capsys.readouterr().out
    assert f"RewardBench 2: {metrics['rewardbench']['score']:.4f}" in printed and "Factuality 3 of 475" in printed


def tie_score(rows: dict[str, tuple[list[float], list[float]]]) -> float:
    """The paper's formula (arXiv 2506.01937, appendix), over arrays of questions that have both kinds."""
    numbers = sorted({key.split(":")[1] for key in rows})
    ref, tied = ([rows[f"{kind}:{n}"] for n in numbers] for kind in ("ref", "tied"))
    gap_ref, gap_tied = (np.array([min(c) - max(w) for c, w in part]) for part in (ref, tied))
    spread = np.array([np.ptp(correct) for correct, _ in tied])
    both = np.minimum(gap_ref, gap_tied)
    return float(
        0.3 * (gap_tied > 0).mean() + 0.3 * (gap_ref > 0).mean() + 0.2 * (gap_tied > spread).mean()
        + 0.2 * (both > spread).mean() + 0.01 * np.tanh(both / spread - 1).mean()
    )  # fmt: skip


def test_the_parts_of_a_tie() -> None:
    good = [("ref:1", [5.0], [0.0]), ("tied:1", [5.0, 4.0], [0.0, -1.0])]
    assert ties(good) == pytest.approx(1.0 + 0.01 * math.tanh(4 / 1 - 1))
    # The worst correct answer is no more above the wrong one than the correct ones are apart.
    assert ties([good[0], ("tied:1", [5.0, 3.0], [1.0])]) == pytest.approx(0.6 + 0.01 * math.tanh(2 / 2 - 1))
    # The reference fails: its accuracy and the smaller gap go, the gap of the tied answers stays.
    bad = ("ref:1", [0.0], [1.0])
    assert ties([bad, good[1]]) == pytest.approx(0.3 + 0.2 + 0.01 * math.tanh(-1 / 1 - 1))
    assert ties([good[0]]) == pytest.approx(0.3) and ties([good[1]]) == pytest.approx(0.3)
    assert ties([good[0], ("tied:1", [3.0, 3.0], [1.0])]) == pytest.approx(1.0), "no spread, no tanh"
    assert ties([good[0], ("tied:1", [3.0], [1.0])]) == pytest.approx(0.6), "one answer: nothing to be apart from"


def test_shares_of_the_top() -> None:
    assert [top_share([2.0], wrong) for wrong in ([1.0, 0.0], [2.0, 0.0], [2.0, 2.0], [3.0])] == [1, 0.5, 1 / 3, 0]


def test_complete_sets_are_reported_as_complete() -> None:
    full = {name: {"accuracy": 0.5, "count": 447 if name == "math-prm" else rows} for name, rows in SUBSETS.items()}
    assert scores_1(full)["complete"] and scores_1(full)["score"] == 0.5
    assert sum(row["count"] for row in full.values()) == 2985, "the rows of the published filtered split"
    assert scores_1({name: full[name] for name in SECTIONS["Chat"]})["sections"] == {"Chat": 0.5}
    prompts = [(name, f"tied:{i}", [1.0], [0.0]) for name, rows in ROWS_2.items() for i in range(rows)]
    assert scores_2(prompts)["complete"] and sum(ROWS_2.values()) == 1865


def test_which_version_rows_are_of() -> None:
    generator = np.random.Generator(np.random.PCG64(13))
    assert version_of(rows_1(generator)) == 1 and version_of(rows_2(generator)) == 2
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "subset": "of my own"}
    assert version_of([row]) is None and version_of([]) is None
    assert version_of([{**row, "chosen": [{"role": "user", "content": "c"}]}]) is None


def test_mistakes_are_reported(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = write(tmp_path / "own.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r", "subset": "mine"}])
    tie = rows_2(np.random.Generator(np.random.PCG64(14)))[-1]
    broken = write(tmp_path / "broken.jsonl", [{**tie, "id": "7"}])
    cache = f"data.cache={tmp_path / 'cache'}"
    for arguments, message in (
        ([own, "--rewardbench", "1"], "not those of RewardBench 1"),
        ([own, "--prior-sets", own], "a part of RewardBench 1"),
        ([broken], "broken.jsonl:1: the id of a tie is ref:N or tied:N, not '7'"),
    ):
        assert main([str(model), *arguments, cache]) == 2
        assert message in capsys.readouterr().err
    assert main([str(model), own, cache, "--json"]) == 0 and "rewardbench" not in json.loads(capsys.readouterr().out)


def test_the_published_sets_have_their_splits() -> None:
    for name, split in (("allenai/reward-bench", "filtered"), ("allenai/reward-bench-2", "test")):
        assert evaluation_config("m", name, []).data.train[0].split == split
        assert evaluation_config("m", name, ["data.split=raw"]).data.train[0].split == "raw"
