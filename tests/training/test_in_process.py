"""`rmcore.fit`: the run of the command, in a program: the same weights, errors as exceptions, nothing left behind."""

import json
import random
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file

import rmcore
import rmcore.train
from rmcore.config import load_config
from rmcore.parallel.world import seed_everything
from tests.harness.small_run import STEPS, arguments


def values(folder: Path, name: str, **run: Any) -> dict[str, dict[str, Any]]:
    """The small run of the harness as a nested dict."""
    nested: dict[str, dict[str, Any]] = {"run": {"dir": str(folder / name), "evals": 2, **run}}
    for argument in arguments(folder, "data.template=simple_chat", "data.eval_fraction=0.25", "log.report=none"):
        key, _, value = argument.partition("=")
        section, *inside = key.split(".")
        if section == "run" and inside[0] in nested["run"]:
            continue
        place = nested.setdefault(section, {})
        for part in inside[:-1]:
            place = place.setdefault(part, {})
        place[inside[-1]] = yaml.safe_load(value) if value != "1e-3" else 1e-3
    return nested


def weights(run: rmcore.FinishedRun) -> dict[str, torch.Tensor]:
    return load_file(run.model_dir / "model.safetensors")


def generators() -> tuple[Any, ...]:
    """The states of the random generators of this process."""
    _, keys, place, *_ = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), keys.tolist(), place


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def by_command(tmp_path_factory: pytest.TempPathFactory) -> rmcore.FinishedRun:
    """The run of the command line."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "run.yaml").write_text(yaml.safe_dump(values(folder, "run")))
    assert rmcore.train.main(load_config(str(folder / "run.yaml"), [])) == 0
    return rmcore.FinishedRun(folder / "run")


def test_a_dict_a_path_and_a_config_train_what_the_command_trains(
    by_command: rmcore.FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed_everything(12345)  # not the seed of the run, and some way into each sequence
    torch.rand(1), random.random(), np.random.rand()
    before = generators()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    (tmp_path / "pairs.jsonl").write_bytes((by_command.dir.parent / "pairs.jsonl").read_bytes())
    found = rmcore.fit(values(tmp_path, "dict"))
    assert_equal(weights(found), weights(by_command))
    assert generators() == before and not dist.is_initialized()
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))

    (tmp_path / "path.yaml").write_text(yaml.safe_dump(values(tmp_path, "unused", max_steps=1)))
    by_path = rmcore.fit(tmp_path / "path.yaml", [f"run.dir={tmp_path / 'path'}", "run.max_steps=2"])
    config = load_config(str(by_path.dir / "config.yaml"), [])
    by_config = rmcore.fit(config, [f"run.dir={tmp_path / 'config'}"])
    assert by_path.status["step"] == by_config.status["step"] == 2
    assert_equal(weights(by_path), weights(by_config))
    assert "step 2/2" in capsys.readouterr().out, "progress is printed"


def test_the_result_holds_the_evaluations_and_loads_the_model(by_command: rmcore.FinishedRun) -> None:
    assert [row["step"] for row in by_command.evaluations] == [STEPS // 2 - 1, STEPS - 2]
    last = by_command.evaluations[-1]
    assert last["eval/rm/accuracy"] == by_command.metrics["accuracy"] and "FinishedRun" in repr(by_command)
    model = by_command.load(device="cpu")
    samples = [json.loads(line) for line in (by_command.dir / "samples.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (by_command.dir.parent / "pairs.jsonl").read_text().splitlines()]
    last_samples = [row for row in samples if row["step"] == last["step"]]
    assert last_samples and rows
    by_texts = {(row["prompt"], row["chosen"].strip(), row["rejected"].strip()): row for row in rows}
    for sample in last_samples:
        row = next(
            row
            for (prompt, *answers), row in by_texts.items()
            if prompt in sample["prompt"] and answers[0] in sample["chosen"] and answers[1] in sample["rejected"]
        )
        found = model.score(row["prompt"], [row["chosen"], row["rejected"]])
        assert found == pytest.approx([sample["chosen_reward"], sample["rejected_reward"]], abs=1e-5)


def test_mistakes_are_user_errors_and_a_failure_has_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(rmcore.UserError, match=r"2 mistakes in the configuration:\n  the dict: .*lr"):
        rmcore.fit({**values(tmp_path, "a"), "optim": {"lr": -1.0}, "lost": {}})
    with pytest.raises(rmcore.UserError, match="no such file"):
        rmcore.fit(tmp_path / "none.yaml")
    for wrong in (None, 3, ["run.yaml"]):
        with pytest.raises(rmcore.UserError, match="config must be a path, a dict or a Config, not "):
            rmcore.fit(wrong)  # type: ignore[arg-type]
    for unlisted in (None, "optim.lr=1e-5", {"optim.lr": 1e-5}, [1e-5]):
        with pytest.raises(rmcore.UserError, match="overrides must be a list of texts"):
            rmcore.fit({}, unlisted)  # type: ignore[arg-type]
    with pytest.raises(rmcore.UserError, match="directory must be the path of a run, not NoneType"):
        rmcore.FinishedRun(None)  # type: ignore[arg-type]
    with pytest.raises(rmcore.UserError, match="no such file or directory"):
        rmcore.fit(values(tmp_path, "b"), [f"data.train.path={tmp_path / 'none.jsonl'}"])
    with pytest.raises(rmcore.UserError, match="not the directory of a completed run: it is failed"):
        rmcore.FinishedRun(tmp_path / "b")

    real, calls = rmcore.train.set_learning_rates, []

    def fails(*arguments: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:
            raise ArithmeticError("planted")
        return real(*arguments)

    monkeypatch.setattr(rmcore.train, "set_learning_rates", fails)
    capsys.readouterr()
    with pytest.raises(rmcore.RunError, match=r"failed at step 2, phase (.|\n)*planted") as caught:
        rmcore.fit(values(tmp_path, "c"))
    assert isinstance(caught.value.__cause__, ArithmeticError)
    assert "planted" not in capsys.readouterr().err, "the exception holds it; the program decides what to print"


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_saves_and_the_same_call_resumes(
    by_command: rmcore.FinishedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    raised: type[BaseException],
) -> None:
    (tmp_path / "pairs.jsonl").write_bytes((by_command.dir.parent / "pairs.jsonl").read_bytes())
    real, calls = rmcore.train.set_learning_rates, []

    def interrupted(*arguments: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(number)
        return real(*arguments)

    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background commands ignore SIGINT
    try:
        with monkeypatch.context() as patch, pytest.raises(raised):
            patch.setattr(rmcore.train, "set_learning_rates", interrupted)
            rmcore.fit(values(tmp_path, "run"))
    finally:
        signal.signal(signal.SIGINT, former)
    assert len(calls) == 3 and (tmp_path / "run" / "checkpoints" / "step-3").is_dir()
    if number == signal.SIGINT:
        assert_equal(weights(rmcore.fit(values(tmp_path, "run"))), weights(by_command))


def test_the_handlers_of_the_program_stay_and_a_thread_can_train(tmp_path: Path) -> None:
    found: list[rmcore.FinishedRun] = []
    thread = threading.Thread(target=lambda: found.append(rmcore.fit(values(tmp_path, "thread", max_steps=1))))
    thread.start()
    thread.join()
    assert found[0].status["step"] == 1

    seen: list[int] = []
    former = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        rmcore.fit(values(tmp_path, "own", max_steps=1))
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, former)
    assert seen == [signal.SIGTERM]


def test_one_process_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(rmcore.UserError, match="torchrun --nproc_per_node"):
            rmcore.fit(values(tmp_path, "two"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(rmcore.UserError, match="has started it already"):
            rmcore.fit(values(tmp_path, "used"))
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
