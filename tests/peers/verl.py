"""verl's reward loop reads rewards of `rmcore serve`: python -m tests.peers.verl WORKDIR PEER_PYTHON.

Input: a folder to write to, and the Python of an environment with verl (tests/peers/verl.txt).
Output: WORKDIR/verl.jsonl; exit code 1 if a reward differs by more than 1e-5, or a failure is handled otherwise.

verl_client.py runs verl's own RewardLoopWorker on batches of rollouts, in two settings: with a discriminative reward
model, whose address is that of rmcore (/classify, as for vLLM), and with a reward function (verl_reward.py), which the
naive reward manager calls (/rewards). Here `rmcore.load` scores the same answers. Failures: a busy service answers 503,
which verl repeats; a text that is too long is a 422, which verl raises at once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import rmcore
from tests.harness.exporting import export
from tests.harness.paths import ROOT
from tests.harness.service import Served
from tests.peers.table import row, write_rows

CLOSE = 1e-5  # fp32, two layers, rewards of order 1
MANY, FEW = 64, 6
CLIENT = "verl RewardLoopWorker"


def main(workdir: str, peer: str) -> int:
    folder = Path(workdir).resolve()
    export(folder / "model")
    model = rmcore.load(folder / "model", precision="fp32")
    rows, right = [], True

    def asked(kind: str, count: int, *arguments: str) -> tuple[dict[str, Any], str]:
        """What verl found for a batch of `count` answers, and the service's metrics."""
        service = Served(*arguments, model=str(folder / "model"), settings=["parallel.precision=fp32"])
        try:
            address = service.address.removeprefix("http://")
            command = [peer, "-m", "tests.peers.verl_client", kind, address, str(folder / "model"), str(count)]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
            metrics = httpx.get(f"{service.address}/metrics", trust_env=False).text
        finally:
            service.end()
        return json.loads(done.stdout.splitlines()[-1]), metrics

    for kind, count, arguments, what in (
        ("model", MANY, (), f"{MANY} answers at once, /classify as of vLLM"),
        ("function", MANY, (), f"{MANY} answers at once, a reward function with /rewards"),
        ("model", FEW, ("--max-connections", "2"), f"{FEW} answers at once, 503 above two, repeated by verl"),
    ):
        found, metrics = asked(kind, count, *arguments)
        expected = np.array(model.score(found["prompts"], found["answers"]), dtype=float)
        difference = float(np.abs(expected - np.array(found["rewards"], dtype=float)).max())
        refused = 'status="503"' in metrics
        right = right and len(expected) == count and difference <= CLOSE and refused == bool(arguments)
        rows.append(row(CLIENT, found["version"], what, difference))

    found, _ = asked("model", 1, "--max-tokens", "8")
    right = right and found["error"] == "ClientResponseError 422"
    rows.append(row(CLIENT, found["version"], "a text beyond --max-tokens: 422, raised without repeating", None))
    write_rows(workdir, "verl", rows)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
