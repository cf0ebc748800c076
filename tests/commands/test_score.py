"""Checks `rmcore score`: the rewards of padded transformers, rows in order, stopped runs that are resumed."""

import datetime
import gzip
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rmcore.host.faults
import rmcore.scoring.files
from rmcore.config import UserError
from rmcore.parallel.world import running_world
from rmcore.score import main
from rmcore.scoring.score import score
from tests.harness.paths import ROOT, SHARED, needs_shared
from tests.harness.ranks import run_ranks

pytestmark = needs_shared  # a real tokenizer and a small model: Pythia's, with random weights
MODEL = str(SHARED / "oracle" / "model")
FP32 = ["data.template=none", "parallel.precision=fp32"]
# Six layers in fp32: sums of hundreds of terms of order 1, each rounded at 6e-8.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def plain():
    model = AutoModelForSequenceClassification.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def rewards(*texts):
        """One padded batch of transformers."""
        inputs = tokenizer([text + tokenizer.eos_token for text in texts], return_tensors="pt", padding=True)
        with torch.inference_mode():
            return model(**inputs, use_cache=False).logits[:, 0].tolist()

    return rewards


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(source, out, overrides=FP32, **how):
    with running_world() as world:
        return score(world, MODEL, str(source), str(out), list(overrides), **how)


def scored(tmp_path, rows, overrides=FP32):
    out = tmp_path / "out.jsonl"
    run(written(tmp_path / "in.jsonl", rows), out, overrides)
    return [json.loads(line) for line in out.read_text().splitlines()]


def questions(count):
    """Rows of one to five answers, of unequal lengths; every third has the prompt of the row before."""
    rows = []
    for number in range(count):
        asked = number - 1 if number % 3 == 2 else number
        answers = [f" Answer {number} {k}" + " so" * (7 * k + number % 5) for k in range(1 + number % 5)]
        rows.append({"id": number, "prompt": f"Question {asked}: " + "why " * (asked % 7), "answers": answers})
    return rows


def test_every_form_of_row_has_the_rewards_of_plain_transformers(tmp_path, plain):
    rows = [
        {"id": 7, "prompt": "The sky is", "answers": [" blue.", " green and wide.", "", " blue."]},
        {"prompt": "The sky is", "answer": " blue."},
        {"prompt": "Two and two", "chosen": " is four", "rejected": " is five", "margin": 0.5},
        {"text": "A whole text, as it stands."},
        {"texts": ["One.", "Another one, longer."], "note": "\u00e4\u4f60"},
        {"prompt": "One answer", "completions": [" in a list"], "text": None},
    ]
    found = scored(tmp_path, rows)
    for row, given in zip(found, rows, strict=True):
        prompt = given.get("prompt", "")
        texts = given.get("texts") or [prompt + text for text in given.get("answers") or given.get("completions") or []]
        texts = texts or [prompt + given[name] for name in ("answer", "chosen", "rejected", "text") if name in given]
        expected = plain(*texts)
        single = "answer" in given or given.get("text") is not None
        assert row.get("rewards", [row.get("reward")]) == pytest.approx(expected, abs=CLOSE)
        assert ("reward" in row) == single and ("best" in row) == (not single)
        if not single:
            assert row["best"] == max(range(len(expected)), key=row["rewards"].__getitem__)
        assert {key: row[key] for key in given} == given
    assert found[0]["rewards"][0] == found[0]["rewards"][3]
    assert found[1]["reward"] == found[0]["rewards"][0], "computed once"


@pytest.mark.parametrize("budget", [16, 200, 4096])
def test_rewards_equal_the_padded_forward_whatever_the_batch(tmp_path, plain, budget):
    """16 tokens: each text alone; 200: groups are cut; 4096: all in one row. The oracle pads all texts to the longest.

    One of the prompts has 200 answers, far more than a micro batch of 200 tokens holds.
    """
    rows = [*questions(12), {"prompt": "Many:", "answers": [f" {k} apples" + " and" * (k % 9) for k in range(200)]}]
    found = scored(tmp_path, rows, [*FP32, f"batch.tokens={budget}"])
    texts = [row["prompt"] + answer for row in rows for answer in row["answers"]]
    rewards = [reward for row in found for reward in row["rewards"]]
    expected = np.concatenate([plain(*texts[start : start + 60]) for start in range(0, len(texts), 60)])
    assert np.std(expected) > 1e-2, "the rewards differ by more than the tolerance"
    np.testing.assert_allclose(rewards, expected, atol=CLOSE, rtol=0)


def test_turns_are_rendered_with_the_template(tmp_path, plain):
    rows = [
        {"prompt": [{"role": "user", "content": "Hi"}], "answers": [[{"role": "assistant", "content": "Yes"}]] * 2},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]},
        {"prompt": "Hi", "answers": ["Yes", "No"]},
    ]
    found = scored(tmp_path, rows, ["data.template=simple_chat", "parallel.precision=fp32"])
    yes, no = plain("User: Hi\n\nAssistant: Yes", "User: Hi\n\nAssistant: No")
    assert found[0]["rewards"] == pytest.approx([yes, yes], abs=CLOSE)
    assert found[1]["reward"] == pytest.approx(yes, abs=CLOSE)
    assert found[2]["rewards"] == pytest.approx([yes, no], abs=CLOSE)


def test_a_text_beyond_the_positions_has_no_reward_and_costs_no_other(tmp_path, plain):
    found = scored(tmp_path, [{"prompt": "Short.", "answers": [" yes", " word" * 3000]}, {"text": " word" * 3000}])
    assert found[0]["rewards"][1] is None and found[1]["reward"] is None
    assert found[0]["rewards"][0] == pytest.approx(plain("Short. yes")[0], abs=CLOSE)
    assert found[0]["best"] == 0


def score_chunks_of_four(rendezvous, source, out, kill_at):
    """In a process of its own, which kills itself before it writes the chunk of that number."""
    torch.set_num_threads(1)
    rmcore.scoring.files.CHUNK_ROWS = 4
    passed = []

    def hook(point):
        passed.append(point)
        if point == "score.part" and passed.count(point) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    rmcore.host.faults.hook = hook
    with running_world(init_method=rendezvous) as world:
        return score(world, MODEL, source, out, FP32)


@pytest.mark.distributed
def test_a_killed_run_resumes_and_writes_the_same_bytes_at_any_number_of_ranks(tmp_path):
    """Six chunks of at most 4 rows: uninterrupted; on three ranks; killed at the third chunk, finished by two ranks."""
    source = written(tmp_path / "in.jsonl", questions(22))
    whole, three, again = (tmp_path / f"{name}.jsonl" for name in ("whole", "three", "again"))
    [done] = run_ranks(score_chunks_of_four, 1, tmp_path / "a", source, str(whole), 0)
    assert done.value == [22, 0]
    run_ranks(score_chunks_of_four, 3, tmp_path / "b", source, str(three), 0)
    assert three.read_bytes() == whole.read_bytes()
    [killed] = run_ranks(score_chunks_of_four, 1, tmp_path / "c", source, str(again), 3, check=False)
    assert killed.exit_code == -signal.SIGKILL
    parts = tmp_path / "again.jsonl.parts"
    assert not again.exists() and sorted(part.name for part in parts.glob("0*")) == ["00000000.jsonl", "00000001.jsonl"]
    spoilt = json.loads((parts / "00000000.jsonl").read_text().splitlines()[0])
    before = (parts / "00000000.jsonl").read_text()
    (parts / "00000000.jsonl").write_text(before.replace(str(spoilt["rewards"][0]), "123.5", 1))
    run_ranks(score_chunks_of_four, 2, tmp_path / "d", source, str(again), 0)
    assert not parts.exists()
    assert json.loads(again.read_text().splitlines()[0])["rewards"][0] == 123.5, "a finished chunk is not scored again"
    assert again.read_bytes().split(b"\n")[1:] == whole.read_bytes().split(b"\n")[1:]


@pytest.mark.slow
def test_under_torchrun(tmp_path):
    source = written(tmp_path / "in.jsonl", questions(22))
    [_] = run_ranks(score_chunks_of_four, 1, tmp_path / "a", source, str(tmp_path / "whole.jsonl"), 0)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["rmcore.score", MODEL, source, "-o", str(tmp_path / "two.jsonl"), *FP32]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.count("22 rows written") == 1, done.stderr[-2000:]
    rows = [
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("two.jsonl", "whole.jsonl")
    ]
    for one, other in zip(*rows, strict=True):  # in chunks of 1024 a text has other company
        assert one["rewards"] == pytest.approx(other["rewards"], abs=CLOSE) and one["id"] == other["id"]
    written(tmp_path / "in.jsonl", [{"text": "a"}] * 1030 + [{"no": "row"}])
    refused = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert refused.returncode == 1 and refused.stderr.count("in.jsonl:1031: a row needs") == 1, refused.stderr[-2000:]


def test_another_model_or_file_starts_from_the_first_chunk(tmp_path):
    parts = tmp_path / "out.jsonl.parts"
    parts.mkdir()
    (parts / "of.json").write_text('{"model": "another"}')
    (parts / "00000000.jsonl").write_text('{"rewards": [7.0], "single": true}\n')
    assert scored(tmp_path, [{"text": "One."}])[0]["reward"] != 7.0


def test_parquet_in_and_out_keeps_columns_types_and_order(tmp_path, monkeypatch):
    monkeypatch.setattr(rmcore.scoring.files, "TABLE_ROWS", 5)
    rows = [{**row, "when": datetime.date(2026, 1, 1 + n), "chosen": None} for n, row in enumerate(questions(12))]
    table = pyarrow.table({name: [row[name] for row in rows] for name in rows[0]})
    table = table.append_column("rewards", pyarrow.array(["old"] * 12))
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    expected = [row["rewards"] for row in scored(tmp_path, questions(12))]
    assert run(tmp_path / "in.parquet", tmp_path / "out.parquet") == (12, 0)
    out = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert out.drop_columns(["rewards", "best"]).equals(table.drop_columns(["rewards"]))
    assert out["rewards"].to_pylist() == expected
    assert out["best"].to_pylist() == [int(np.argmax(rewards)) for rewards in expected]
    run(tmp_path / "in.parquet", tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["rewards"] for line in lines] == expected and lines[3]["when"] == "2026-01-04"


def test_json_lines_to_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(rmcore.scoring.files, "TABLE_ROWS", 2)
    rows = [{"text": "One.", "n": 1}, {"text": "Two.", "n": None}, {"texts": ["A.", "B."], "late": {"x": [1.5]}}]
    run(written(tmp_path / "in.jsonl", rows), tmp_path / "out.parquet")
    out = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["n"] for row in out] == [1, None, None] and out[2]["late"] == {"x": [1.5]}
    assert out[0]["reward"] is not None and out[0]["rewards"] is None and out[2]["reward"] is None
    mixed = written(tmp_path / "mixed.jsonl", [{"text": "One.", "n": 1}, {"text": "Two.", "n": "two"}])
    with pytest.raises(UserError, match=r"cannot be a Parquet table .*write JSON lines"):
        run(mixed, tmp_path / "mixed.parquet")


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files(tmp_path, ending):
    rows = questions(3)
    source = tmp_path / f"in.jsonl{ending}"
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    source.write_bytes(gzip.compress(text) if ending == ".gz" else pyarrow.Codec("zstd").compress(text, asbytes=True))
    run(source, tmp_path / f"out.jsonl{ending}")
    with pyarrow.input_stream(
        str(tmp_path / f"out.jsonl{ending}"), compression={".gz": "gzip", ".zst": "zstd"}[ending]
    ) as stream:
        lines = stream.read().decode().splitlines()
    assert [json.loads(line) for line in lines] == scored(tmp_path, rows)


def test_standard_input_and_output(tmp_path, monkeypatch, capsysbinary):
    rows = questions(3)
    text = "\n".join(json.dumps(row) for row in rows).encode()
    expected = scored(tmp_path, rows)
    for out in ("-", str(tmp_path / "piped.jsonl")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
        capsysbinary.readouterr()
        assert main([MODEL, "-", "-o", out, *FP32]) == 0
        captured = capsysbinary.readouterr()
        lines = captured.out if out == "-" else Path(out).read_bytes()
        assert [json.loads(line) for line in lines.splitlines()] == expected
        assert b"3 rows written" in (captured.err if out == "-" else captured.out)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a"}\nno\n')))
    assert main([MODEL, "-", "-o", "-", *FP32]) == 2
    assert b"standard input:2: not JSON" in capsysbinary.readouterr().err


def test_normalised_rewards(tmp_path, monkeypatch):
    rows = questions(3)
    raw = [reward for row in scored(tmp_path, rows) for reward in row["rewards"]]
    with pytest.raises(UserError, match="contains no pooler_config"):
        run(tmp_path / "in.jsonl", tmp_path / "n.jsonl", normalise=True)
    model = tmp_path / "model"
    model.mkdir()
    for file in Path(MODEL).iterdir():
        (model / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps({**config, "pooler_config": {"logit_mean": 0.5, "logit_sigma": 4.0}}))
    for how, expected in (({"normalise": True}, [(r - 0.5) / 4.0 for r in raw]), ({}, raw)):
        with running_world() as world:
            score(world, str(model), str(tmp_path / "in.jsonl"), str(tmp_path / "n.jsonl"), FP32, **how)
        found = [r for line in (tmp_path / "n.jsonl").read_text().splitlines() for r in json.loads(line)["rewards"]]
        assert found == expected


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a"}, "in.jsonl:1: a row needs prompt and answers"),
        ({"prompt": "a", "answers": []}, "in.jsonl:1: answers must be a list of answers"),
        ({"prompt": "a", "answers": ["b", 3]}, "in.jsonl:1: answers[1] must be text, as answers[0] is, not 3"),
        ({"text": 3}, "in.jsonl:1: text must be text"),
    ],
)
def test_the_place_of_a_bad_row_is_reported(tmp_path, row, message):
    with pytest.raises(UserError) as caught:
        scored(tmp_path, [row])
    assert message in str(caught.value)


def test_the_command_reports_why_it_refuses(tmp_path, capsys):
    same = written(tmp_path / "in.jsonl", [{"text": "a"}])
    for rows, out, message in (
        (str(tmp_path / "none.jsonl"), str(tmp_path / "out"), "no such file"),
        (same, same, "is the input"),
        (same, str(tmp_path / "out.csv"), "writes JSON lines"),
        (same, str(tmp_path), "is a directory"),
        (str(tmp_path / "in.txt"), str(tmp_path / "out"), "rmcore score reads"),
        (same, "/proc/self/out.jsonl", "cannot be read or written"),  # as on a read-only disk
    ):
        assert main([MODEL, rows, "-o", out, "data.template=none"]) == 2
        assert message in capsys.readouterr().err
