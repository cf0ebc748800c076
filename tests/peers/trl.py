"""TRL's GRPOTrainer trains with rmcore's reward function: python -m tests.peers.trl WORKDIR PEER_PYTHON.

Input: a folder to write to, and the Python of an environment with TRL (tests/peers/trl.txt).
Output: WORKDIR/trl.jsonl; exit code 1 if a reward differs by more than 1e-5 from that of `rmcore score`.

trl_client.py trains a tiny policy for three steps in its environment, with
`reward_funcs=[rmcore.load(...).as_reward_function()]`: once on prompts as text, once on prompts as turns. It records
the completions. Here the function behind `rmcore score` computes their rewards again. They are compared one by one, and
their means with those that TRL logs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from rmcore.parallel.world import running_world
from rmcore.scoring.score import score
from tests.harness.exporting import export
from tests.harness.paths import ROOT
from tests.peers.table import row, write_rows

CLOSE = 1e-5  # fp32, two layers, rewards of order 1
STEPS, COMPLETIONS = 3, 8  # per step


def main(workdir: str, peer: str) -> int:
    folder = Path(workdir).resolve()
    export(folder / "model")
    client = [peer, "-m", "tests.peers.trl_client", str(folder), str(STEPS), str(COMPLETIONS)]
    subprocess.run(client, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}, check=True)
    found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    rows, right = [], True
    for kind, run in found["runs"].items():
        expected = rewards_of(folder, kind, run["rows"])
        differences = [abs(a - b) for a, b in zip(run["rewards"], expected, strict=True)]
        steps = [expected[n : n + COMPLETIONS] for n in range(0, len(expected), COMPLETIONS)]
        means = [sum(step) / len(step) for step in steps]
        differences += [abs(a - b) for a, b in zip(run["logged"], means, strict=True)]
        right = right and len(expected) == STEPS * COMPLETIONS and max(differences) <= CLOSE and run["moved"] > 0
        compared = f"{STEPS} steps on prompts as {kind}: {len(expected)} rewards, logged means"
        rows.append(row("TRL GRPOTrainer", found["version"], compared, max(differences)))
    write_rows(workdir, "trl", rows)
    return 0 if right else 1


def rewards_of(folder: Path, kind: str, rows: list[dict[str, object]]) -> list[float]:
    """The rewards that `rmcore score` writes for the completions."""
    source, out = folder / f"{kind}.jsonl", folder / f"{kind}-scored.jsonl"
    source.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    with running_world() as world:
        score(world, str(folder / "model"), str(source), str(out), ["parallel.precision=fp32"])
    return [json.loads(line)["reward"] for line in out.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
