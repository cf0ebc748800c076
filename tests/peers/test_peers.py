"""The peers whose environments exist (`bash launch/peers.sh` makes them), and the table of their results."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.harness.paths import ROOT
from tests.peers.table import as_table, difference_of, row, write_rows
from tests.peers.vllm_families import REFUSED, judged
from tests.peers.vllm_families_client import followed

PEERS = sorted(path.stem for path in (ROOT / "tests" / "peers").glob("*.txt"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_computes_the_same_rewards(peer: str, tmp_path: Path) -> None:
    python = ROOT / ".peers" / peer / "bin" / "python"
    if not python.exists():
        pytest.skip(f"bash launch/peers.sh {peer} makes the environment")
    subprocess.run([sys.executable, "-m", f"tests.peers.{peer}", str(tmp_path), str(python)], cwd=ROOT, check=True)
    rows = [json.loads(line) for line in (tmp_path / f"{peer}.jsonl").read_text().splitlines()]
    assert rows
    for one in rows:  # the peer itself decides about gradients
        assert (difference_of(one) or 0.0) <= 1e-5 or one["compared"].endswith("gradients"), one


def test_a_weight_that_vllm_does_not_read_is_found() -> None:
    """A stand-in for vLLM's model: it copies, stacks and transforms weights, and leaves one of each kind out."""
    model = torch.nn.Module()
    for name in ("qkv", "decay", "score", "forgotten"):
        model.register_parameter(name, torch.nn.Parameter(torch.zeros(2, 2)))
    model.pooler = SimpleNamespace(
        poolers_by_task={"classify": SimpleNamespace(head=SimpleNamespace(classifier=model))}
    )
    files = {name: torch.full((1, 2), 0.5) for name in ("q", "k")} | {
        n: torch.ones(2, 2) for n in ("log", "s", "extra")
    }
    loader = SimpleNamespace(get_all_weights=lambda: iter(files.items()))

    def load(loader: Any, model: Any, config: Any) -> None:
        read = dict(loader.get_all_weights())
        model.qkv.data.copy_(torch.cat([read["q"], read["k"].clone()]))
        model.decay.data.copy_(-read["log"].exp())
        model.score.data[:] = read["s"]

    found = followed(load, loader, model, None)
    assert (found["weights"], found["unread"], found["unset"], found["heads"]) == (5, ["extra"], ["forgotten"], [""])


def test_what_became_of_a_family_is_judged() -> None:
    task = {"family": "llama", "dtype": "float32", "outputs": [0.5, 1.0]}
    read = {"weights": 2, "unread": [], "unset": [], "heads": ["score"], "outputs": [0.5, 1.0]}
    assert judged(task, read) == ("all 2 weights read, rewards", 0.0, True)
    assert judged(task, {**read, "outputs": [1.0, 0.5]}) == ("all 2 weights read, rewards", 0.5, False)
    assert judged(task, {**read, "error": "no kernel"})[1:] == (None, True)
    for wrong in ({"unread": ["a"]}, {"unset": ["b"]}, {"heads": []}):
        assert judged(task, {**read, **wrong})[2] is False
    assert judged(task, {"error": "refused"})[2] is False
    family, message = next(iter(REFUSED.items()))
    assert judged({**task, "family": family}, {"error": f"ValueError: {message}"})[2] is True
    halved = {**read, "outputs": [0.5, 1.001]}
    assert judged({**task, "dtype": "bfloat16"}, halved)[0].endswith("rewards in bf16 to 0.2% of their range")


def test_every_peer_has_its_files() -> None:
    folder = ROOT / "tests" / "peers"
    assert PEERS and all((folder / f"{peer}.py").is_file() for peer in PEERS)


def test_the_table_shows_every_row(tmp_path: Path) -> None:
    write_rows(tmp_path, "one", [row("A", "1.0", "64 rewards", 1.5e-7), row("A", "1.0", "a refusal", None)])
    write_rows(tmp_path, "one", [{"client": "B", "version": "2", "compared": "x", "difference": 0.25}])
    command = [sys.executable, "-m", "tests.peers.table", str(tmp_path / "one.jsonl"), str(tmp_path / "none.jsonl")]
    lines = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
    assert [line.split()[0] for line in lines] == ["client", "A", "A", "B"]
    assert [line.split()[-1] for line in lines[1:]] == ["1.5e-07", "-", "2.5e-01"]
    assert as_table([]).split() == ["client", "version", "compared", "largest", "difference"]
