"""The peers whose environments exist (`bash launch/peers.sh` makes them), and the table of their results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.paths import ROOT
from tests.peers.table import as_table, difference_of, row, write_rows

PEERS = sorted(path.stem for path in (ROOT / "tests" / "peers").glob("*.txt"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
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
