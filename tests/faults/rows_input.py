"""The fault matrix, rows 17 to 27 and 32: what is wrong with data, configuration, tokenizer or model files.

Each row writes the bad thing and runs the command on it in processes: exit code 2, one message, no traceback, and
nothing trained; or the row is dropped and counted, and the run continues.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from rmcore.config import load_config
from rmcore.data.synthetic import byte_tokenizer, synthetic_rows
from tests.harness.crash import Outcome, run
from tests.harness.small_run import arguments

GOOD = synthetic_rows(24, 0, "train")


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def refused(folder: Path, content: str | bytes | None, *more: str, contains: tuple[str, ...], size: int = 2) -> str:
    """Run on a data file with this content (None: the good one): exit 2, one message with all of `contains`."""
    number = len(list(folder.glob("data-*"))) if folder.exists() else 0
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"data-{number}.jsonl"
    data.write_bytes(content if isinstance(content, bytes) else (lines(GOOD) if content is None else content).encode())
    given = {argument.split("=")[0] for argument in more}
    base = [word for word in arguments(folder / "base") if word.split("=")[0] not in {*given, "data.train.path"}]
    path = [] if "data.train.path" in given else [f"data.train.path={data}"]
    outcome = run(folder / f"run-{number}", [*base, *path, *more], size)
    text = outcome.text
    assert outcome.codes == [2] * size, text
    assert "Traceback" not in text and text.count("rmcore.train:") == 1, text
    for part in contains:
        assert part.replace("FILE", str(data)) in text, f"{part!r} is not in:\n{text}"
    assert not (folder / f"run-{number}" / "metrics.jsonl").exists()
    return next(line for line in text.splitlines() if "rmcore.train:" in line).replace(str(folder), "...")[:160]


def trained(folder: Path, content: str, *more: str, size: int = 1) -> Outcome:
    """Run on this data to the end, export included."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "kept.jsonl"
    data.write_text(content, encoding="utf-8")
    given = {argument.split("=")[0] for argument in more}
    base = [word for word in arguments(folder / "base") if word.split("=")[0] not in {*given, "data.train.path"}]
    outcome = run(folder / "kept", [*base, f"data.train.path={data}", *more], size, publish=True)
    assert outcome.codes == [0] * size, outcome.text
    return outcome


def row_17(folder: Path) -> str:
    """a malformed JSON line, a lone surrogate, a binary file"""
    text = lines(GOOD)
    refused(folder, text + "{oops\n", contains=("FILE:25",))
    surrogate = json.dumps({**GOOD[0], "chosen": "X"}).replace('"X"', '"\\ud800"')
    refused(folder, text + surrogate + "\n", contains=("FILE:25", "surrogate"))
    return refused(folder, bytes(range(256)) * 20, contains=("FILE",))


def row_18(folder: Path) -> str:
    """a missing, null or wrong-typed field"""
    for bad in ({"prompt": "a", "chosen": "b"}, {**GOOD[0], "rejected": None}, {**GOOD[0], "chosen": 7}):
        seen = refused(folder, lines([*GOOD, bad]), contains=("FILE:25",))
    return seen


def row_19(folder: Path) -> str:
    """wrong columns"""
    renamed = [{"prompt": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in GOOD]
    seen = refused(folder, lines(renamed), contains=("chosen", "rejected", "good", "bad", "data.train.columns"))
    trained(folder, lines(renamed), "data.train.columns={chosen: good, rejected: bad}")
    return seen


def row_20(folder: Path) -> str:
    """an empty file, an empty split"""
    refused(folder, "", contains=("FILE",))
    return refused(folder, None, "data.train.split=train[:0]", contains=("FILE",))


def row_21(folder: Path) -> str:
    """every pair filtered"""
    return refused(folder, None, "data.max_tokens=10", contains=("no row is left", "too long", "24"))


def row_22(folder: Path) -> str:
    """chosen equals rejected, also after truncation; one answer a prefix of the other"""
    same = {**GOOD[0], "rejected": GOOD[0]["chosen"]}
    starts = {**GOOD[1], "rejected": GOOD[1]["chosen"] + " And more."}
    outcome = trained(folder, lines([*GOOD, same, starts]))
    assert "1 dropped: identical answers" in flat(outcome.text) or "identical answers" in outcome.text, outcome.text
    assert "25 kept" in flat(outcome.text), outcome.text
    refused(folder, lines([same] * 3), contains=("no row is left", "identical answers"))
    return "26 rows read, 25 kept, 1 identical; the prefix case trained and exported"


def flat(text: str) -> str:
    return " ".join(text.split())


def row_23(folder: Path) -> str:
    """a prompt longer than the limit"""
    long = {**GOOD[0], "prompt": "word " * 60 + GOOD[0]["prompt"]}
    dropped = trained(folder / "drop", lines([*GOOD, long]))
    assert "24 kept" in flat(dropped.text) and "too long" in dropped.text, dropped.text
    cut = trained(folder / "cut", lines([*GOOD, long]), "data.length_policy=truncate_left")
    assert "25 kept" in flat(cut.text), cut.text
    return "dropped and counted; with truncate_left kept, its oldest tokens cut"


def model_directory(folder: Path, **tokenizer_changes: Any) -> Path:
    """The embedded model and tokenizer as a Hugging Face directory on disk, the tokenizer changed."""
    from transformers import LlamaForCausalLM

    from rmcore.model.synthetic_model import synthetic_model_config

    tokenizer = byte_tokenizer()
    for name, value in tokenizer_changes.items():
        setattr(tokenizer, name, value)
    config = synthetic_model_config()
    config.pad_token_id = None
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def row_24(folder: Path) -> str:
    """no padding token; padding equal to EOS"""
    seen = []
    for name, changes in {"none": {"pad_token": None}, "eos": {"pad_token": "<eos>"}}.items():
        model = model_directory(folder / name, **changes)
        trained(folder / f"run-{name}", lines(GOOD), f"model.name={model}", "model.init=pretrained")
        exported = folder / f"run-{name}" / "kept" / "model"
        config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
        assert config["pad_token_id"] not in (None, config["eos_token_id"]), config
        seen.append(config["pad_token_id"])
    return f"padding tokens {seen} of their own, EOS is 1; exported and reloaded with equal rewards"


def row_25(folder: Path) -> str:
    """no chat template; doubled BOS; unknown template name"""
    rows = [
        {
            "chosen": [turn("user", "Hi"), turn("assistant", "yes")],
            "rejected": [turn("user", "Hi"), turn("assistant", no)],
        }
        for no in "abcdefgh"
    ]
    refused(folder, lines(rows), "data.template=tokenizer", contains=("data.template", "chat template"))
    seen = refused(folder, None, "data.template=simple_chatt", contains=("data.template", "simple_chat"))
    doubled = trained(folder / "bos", lines([{**row, "prompt": "<bos><bos>" + row["prompt"]} for row in GOOD]))
    assert "bos" in doubled.text.lower() and "warning" in doubled.text, doubled.text
    return seen + "; doubled BOS: warned"


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def row_26(folder: Path) -> str:
    """configuration: a typo, out of range, a duplicate key, 1e-5, no"""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "c.yaml"
    path.write_text(
        "model: {name: synthetic, init: random}\ndata:\n  train: {path: synthetic}\n  tempalte: none\n"
        "optim:\n  lr: 1e-5\n  lr: 2e-5\nrun:\n  epochs: 0\n  resume: no\n",
        encoding="utf-8",
    )
    outcome = run(folder / "run", [str(path)], 2)
    assert outcome.codes == [2, 2] and "Traceback" not in outcome.text, outcome.text
    for part in (f"{path}:4", "template", f"{path}:7", f"{path}:9", f"{path}:10"):
        assert part in outcome.text, f"{part} is not in:\n{outcome.text}"
    assert outcome.output[1].strip() == "", "rank 0 speaks"
    path.write_text(
        "data: {train: {path: synthetic}}\nmodel: {name: synthetic}\noptim:\n  lr: 1e-5\n", encoding="utf-8"
    )
    assert load_config(str(path), []).optim.lr == 1e-5
    return "all mistakes at once with file:line; 1e-5 is a number"


def row_27(folder: Path) -> str:
    """the hub is offline and model or data are not in its cache"""
    refused(
        folder,
        None,
        "model.name=someone/never-downloaded",
        "model.init=pretrained",
        contains=("someone/never-downloaded",),
    )
    return refused(folder, None, "data.train.path=someone/never-downloaded", contains=("someone/never-downloaded",))


def row_32(folder: Path) -> str:
    """model or tokenizer files truncated or of another architecture"""
    good = model_directory(folder / "good")

    def variant(name: str) -> Path:
        return Path(shutil.copytree(good, folder / name))

    cut = variant("cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    refused(folder / "a", None, f"model.name={cut}", "model.init=pretrained", contains=(str(cut),))
    other = variant("other")
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    for key, value in {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}.items():
        config[key] = value
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    seen = refused(folder / "b", None, f"model.name={other}", "model.init=pretrained", contains=("lacks weights",))
    broken = variant("broken")
    (broken / "tokenizer.json").write_text('{"version": ', encoding="utf-8")
    refused(folder / "c", None, f"model.name={broken}", "model.init=pretrained", contains=(str(broken),))
    return seen


ROWS = [row_17, row_18, row_19, row_20, row_21, row_22, row_23, row_24, row_25, row_26, row_27, row_32]
