"""validate, inspect and prepare: output, JSON and exit codes, with real files and the real command line."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import GPTNeoXConfig, PreTrainedTokenizerFast

import rmcore
from rmcore import inspect_data as inspect
from rmcore import prepare, validate
from rmcore.config import load_config
from rmcore.data.inspection.statistics import length_bias, of_pairs, statistics, tokens
from rmcore.data.synthetic import byte_tokenizer
from rmcore.data.tokens.comparisons import EncodedRow
from rmcore.data.tokens.end_tokens import answer_ends, ending_warning
from rmcore.data.tokens.limits import LengthLimits, in_memory
from rmcore.data.tokens.templates import load_template
from rmcore.tracking.data_progress import DataProgress
from tests.harness.paths import ROOT, SHARED, needs_shared

PAIRS = SHARED / "data/pairs"
ROWS = [
    {"prompt": f"Question {i}?", "chosen": f" yes {i}" * (1 + i % 3), "rejected": " no", "source": f"s{i % 2}"}
    for i in range(40)
]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return [
        "model.name=synthetic",
        "model.init=random",
        "data.template=none",
        f"data.train.path={file}",
        f"data.cache={tmp_path / 'cache'}",
        f"run.dir={tmp_path / 'run'}",
        "batch.pairs=4",
        "data.max_tokens=512",
    ]


def test_validate_passes_and_creates_no_run(arguments, tmp_path, capsys):
    assert validate.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and {check["name"]: check["status"] for check in found["checks"]} == {
        "config": "ok",
        "tokenizer": "ok",
        "model": "ok",
        "template": "ok",
        "data": "ok",
        "plan": "ok",
        "export": "ok",
        "run.dir": "ok",
    }
    assert not (tmp_path / "run").exists()
    assert validate.main(arguments) == 0
    out = capsys.readouterr().out
    assert "10 steps of 4 pairs" in out and "40 kept" in out and out.splitlines()[0].startswith("ok       config")


def test_validate_reports_every_mistake_at_once(arguments, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    broken = [*arguments, "data.template=zephir", f"run.dir={tmp_path}/file/run"]
    assert validate.main(broken) == 2
    printed = capsys.readouterr()
    assert "2 of 8 checks failed" in printed.err and "did you mean zephyr?" in printed.err
    assert "is a file" in printed.err
    assert "skipped  data       needs the template" in printed.out and "skipped  plan" in printed.out
    assert validate.main([*arguments, "batch.tokens=8"]) == 2
    assert "batch.tokens=8 is less than the longest comparison" in capsys.readouterr().err


def test_validate_reports_a_run_that_train_would_not_continue(arguments, tmp_path, capsys):
    given = [*arguments, "run.max_steps=2", "log.report=none", "log.tensorboard=false"]
    rmcore.fit(load_config(None, given))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for changed, code, message in [
        ([], 0, "run; the run in it is completed"),
        (["optim.lr=1e-5"], 2, "holds a completed run with other settings (optim.lr: 3e-06 -> 1e-05)"),
        (["loss.name=hinge"], 2, "step-2 belongs to a run with other settings:"),
        (["run.max_steps=1"], 2, "step 2, and with these settings and data the run ends after step 1: set"),
        (["run.max_steps=3"], 0, "the run continues at step 2 from"),
        (["run.max_steps=1", "run.resume=never"], 0, f"run.dir    {tmp_path / 'run'}"),
        (["run.resume=nowhere/step-1"], 2, "run.resume: nowhere/step-1 is not a good checkpoint"),
    ]:
        assert validate.main([*given, *changed]) == code, changed
        printed = capsys.readouterr()
        assert message in printed.out, printed
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]))
    assert validate.main([*given, "run.max_steps=3"]) == 2
    assert "the train data have changed since" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_inspect_draws_and_counts(arguments, tmp_path, capsys):
    assert inspect.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (part,) = found["parts"].values()
    assert part["rows"] == part["kept"] + sum(part["dropped"].values()) == 40
    assert part["sources"]["s0"]["pairs"] == part["sources"]["s1"]["pairs"] == 20 and part["prompts"] == 40
    assert part["length_bias"]["longer"] == 1.0
    picture = tmp_path / "run" / "lengths.png"
    assert found["plot"] == str(picture) and picture.read_bytes().startswith(b"\x89PNG")
    other = tmp_path / "x" / "other.png"
    assert inspect.main([*arguments, "--examples", "2", "--plot", str(other)]) == 0
    out = capsys.readouterr().out
    assert other.exists() and "comparison 1 of data.train" in out and out.count("scored tokens:") == 2
    assert "always preferring the longer one is right in 100.0%" in out
    (tmp_path / "file").write_text("")
    assert inspect.main([*arguments, "--plot", str(tmp_path / "file" / "x.png")]) == 2
    assert "cannot write the picture" in capsys.readouterr().err
    assert inspect.main([*arguments, "--plot", str(tmp_path / "x.xyz")]) == 2
    assert "x.xyz: Format 'xyz' is not supported" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        inspect.main([*arguments, "--examples", "-1"])


def test_prepare_fills_the_cache(arguments, tmp_path, capsys):
    assert prepare.main(arguments) == 0
    assert "40 kept" in (out := capsys.readouterr().out) and f"ready in {tmp_path / 'cache'}" in out
    entries = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache/tokens").iterdir() if path.is_dir()}
    assert prepare.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"]["data.train"]["kept"] == 40
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache/tokens").iterdir() if path.is_dir()}
    assert entries == again and len(again) == 1


@pytest.mark.parametrize("module", ["validate", "inspect_data", "prepare"])
def test_help_answers_at_once_and_mistakes_are_refused(module, tmp_path):
    command = module.removesuffix("_data")

    def run(*words):
        line = [sys.executable, "-m", "rmcore", command, *words]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)

    heavy = "import sys; from rmcore.{0} import main; print({{'torch', 'datasets', 'transformers'}} & set(sys.modules))"
    imported = subprocess.check_output([sys.executable, "-c", heavy.format(module)], cwd=ROOT, text=True)
    assert imported.strip() == "set()"
    before = os.times()
    done = run("--help")
    seconds = sum(os.times()[2:4]) - sum(before[2:4])  # CPU time of the child: a busy machine does not count
    assert done.returncode == 0 and "--json" in done.stdout and "data.train.path" in done.stdout
    assert seconds < 1.0, f"{seconds:.2f} s of CPU time"
    for words in (["data.trian=x"], ["--jsno"], ["nothing.yaml"]):
        done = run(*words)
        assert done.returncode == 2 and "Traceback" not in done.stderr and f"rmcore {command}: " in done.stderr


# ---- statistics against plain loops


def some_data():
    rng = np.random.default_rng(0)
    rows = []
    for number in range(30):
        prompt = rng.integers(5, 9, rng.integers(0, 9)).astype(np.int32)
        answers = [np.append(prompt, [n, *rng.integers(5, 9, rng.integers(0, 12))]).astype(np.int32) for n in range(3)]
        pairs = [(0, 1)] if number % 2 else [(0, 1), (2, 0), (1, 2)]
        used = answers[: 2 if number % 2 else 3]
        rows.append(EncodedRow(prompt, used, pairs, [0.0] * len(pairs), [1.0] * len(pairs), number % 3, number))
    return rows, in_memory(rows, LengthLimits(99), ["a", "b", "c"])


def test_statistics_equal_plain_loops():
    rows, data = some_data()
    pairs = [(row, winner, loser) for row in rows for winner, loser in row.pairs]
    chosen, rejected = ([len(row.answers[which]) for row, *both in pairs for which in [both[i]]] for i in (0, 1))
    assert [a.tolist() for a in of_pairs(data, data.text_length_A)] == [chosen, rejected]
    figures = statistics(data)
    assert figures["length_bias"]["longer"] == sum(c > r for c, r in zip(chosen, rejected, strict=True)) / len(pairs)
    assert figures["lengths"]["chosen"]["100"] == max(
        c - len(r.prompt) for c, (r, *_) in zip(chosen, pairs, strict=True)
    )
    assert sum(source["pairs"] for source in figures["sources"].values()) == len(pairs)
    use = figures["tokens"]
    assert use["separate"] == sum(chosen) + sum(rejected) and use["computed"] == len(data.tokens)
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(pairs))
    batches = [[max(chosen[i], rejected[i]) for i in order[at : at + 8]] for at in range(0, len(pairs), 8)]
    assert use["padded"] == sum(2 * len(batch) * max(batch) for batch in batches)
    assert use["saved"] == pytest.approx(1 - (1 - use["saved_by_packing"]) * (1 - use["saved_by_sharing"]))
    json.dumps(figures)  # plain numbers only
    assert length_bias(np.array([10, 6]), np.array([4, 6])) == {"longer": 0.5, "shorter": 0.0, "equal": 0.5}
    assert tokens(data, np.array([3]), np.array([5]), 0)["padded"] == 10


# ---- where answers end


def chat_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    return tokenizer


def test_a_template_that_ends_differently_from_the_model_is_reported():
    tokenizer = chat_tokenizer()
    assert answer_ends(tokenizer) == ("<|im_end|>",)
    (line,) = ending_warning(load_template("tulu", tokenizer), tokenizer)
    assert "data.template=tulu ends answers with <eos>" in line and "<|im_end|>" in line
    assert "without a special token" in ending_warning(load_template("assistant_message_only", tokenizer), tokenizer)[0]
    assert "<eos>" in ending_warning(load_template("none", tokenizer), tokenizer)[0]
    assert ending_warning(load_template("tokenizer", tokenizer), tokenizer) == []
    assert ending_warning(load_template("tulu", byte_tokenizer()), byte_tokenizer()) == []
    refusing = chat_tokenizer()
    refusing.chat_template = "{{ raise_exception('no') }}"
    assert answer_ends(refusing) == ()


# ---- progress


def test_progress_in_a_log_file_is_a_line_every_ten_seconds(capsys, monkeypatch):
    clock = iter([100.0, 104.0, 110.0, 111.0, 120.5])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with DataProgress(10.0) as progress:
        for done in (0, 400, 1000, 1100, 2050):
            progress(done, 4100, "data.train")
    assert capsys.readouterr().err.splitlines() == [
        "data.train: 1,000 of 4,100 rows, 100 rows/s, eta 0:00:31",
        "data.train: 2,050 of 4,100 rows, 100 rows/s, eta 0:00:20",
    ]


# ---- all the real data

FILES = sorted(path.name for path in PAIRS.glob("*.jsonl.gz")) if PAIRS.is_dir() else []


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> list[str]:
    """Arguments for the real Pythia tokenizer and a small model with its vocabulary."""
    model = tmp_path_factory.mktemp("model")
    PreTrainedTokenizerFast(
        tokenizer_file=str(SHARED / "data/20B_tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|padding|>"
    ).save_pretrained(model)
    GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
    ).save_pretrained(model)
    return [f"model.name={model}", "model.init=random", "data.max_tokens=512", "data.template=simple_chat"]


def sources_of(files, amount=None):
    return "data.train=" + json.dumps([{"path": str(PAIRS / file), "amount": amount} for file in files])


@needs_shared
@pytest.mark.parametrize("name", [*FILES, "all mixed"])
def test_all_real_pairs_go_through_inspect_and_the_counts_add_up(name, real, tmp_path, capsys):
    chosen = FILES if name == "all mixed" else [name]
    words = [*real, sources_of(chosen, 100), f"data.cache={tmp_path}", f"run.dir={tmp_path}", "--json"]
    assert inspect.main(words) == 0
    (part,) = json.loads(capsys.readouterr().out)["parts"].values()
    assert part["rows"] == 100 * len(chosen) == part["kept"] + sum(part["dropped"].values())
    assert part["kept"] == part["pairs"] == sum(source["pairs"] for source in part["sources"].values()) > 0
    assert 0 < part["tokens"]["saved_by_sharing"] < 1 and part["tokens"]["saved_by_packing"] > 0


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("name", [*FILES, "all mixed"])
def test_all_real_pairs_in_full(name, real, tmp_path, capsys):
    chosen = FILES if name == "all mixed" else [name]
    assert inspect.main([*real, sources_of(chosen), f"data.cache={tmp_path}", f"run.dir={tmp_path}", "--json"]) == 0
    (part,) = json.loads(capsys.readouterr().out)["parts"].values()
    rows = 0
    for file in chosen:
        with gzip.open(PAIRS / file, "rt", encoding="utf-8") as lines:
            rows += sum(1 for _ in lines)
    assert part["rows"] == rows == part["kept"] + sum(part["dropped"].values())


@needs_shared
@pytest.mark.parametrize("name", ["all mixed", *(pytest.param(file, marks=pytest.mark.slow) for file in FILES)])
def test_real_pairs_train(name, real, tmp_path):
    """Train a few steps by the command line, on all sources mixed and (slow) on each of them."""
    run = tmp_path / "run"
    words = [
        *real,
        sources_of(FILES if name == "all mixed" else [name], 100),
        f"data.cache={tmp_path}",
        f"run.dir={run}",
        "run.max_steps=2",
        "batch.pairs=8",
        "run.evals=0",
        "log.every=1",
        "log.tensorboard=false",
        "parallel.precision=fp32",
        "run.save_minutes=null",
    ]
    done = subprocess.run([sys.executable, "-m", "rmcore.train", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [step["train/rm/loss"] for step in steps if "train/rm/loss" in step]
    assert len(losses) == 2 and all(0 < loss < 5 for loss in losses)


@pytest.mark.parametrize("start", [["-m", "rmcore.inspect"], ["-m", "rmcore", "inspect"], ["rmcore/inspect_data.py"]])
def test_inspect_starts_in_every_way(start: list[str]) -> None:
    """A module named inspect would hide the standard library's from the third."""
    done = subprocess.run([sys.executable, *start, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("usage: rmcore inspect [CONFIG]"), done.stderr
