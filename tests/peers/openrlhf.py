"""OpenRLHF's remote reward client reads rewards of `rmcore serve`: python -m tests.peers.openrlhf WORKDIR PEER_PYTHON.

Input: a folder to write to, and the Python of an environment with OpenRLHF (tests/peers/openrlhf.txt).
Output: WORKDIR/openrlhf.jsonl; exit code 1 if a reward differs by more than 1e-5, or a failure is handled otherwise.

openrlhf_client.py runs OpenRLHF's own SingleTurnAgentExecutor, which posts to /get_reward what it has generated. Here
`rmcore.load` scores the same texts. Failures: a busy service answers 503, which the client repeats; a text that is too
long is a 422, and one that is not scored in time a 504, after which the client continues without a reward.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

import rmcore
from tests.harness.exporting import export
from tests.harness.paths import ROOT
from tests.harness.service import Served
from tests.peers.table import row, write_rows

CLOSE = 1e-5  # fp32, two layers, rewards of order 1
MANY, FEW = 64, 6  # requests at once; those to a service that answers two at a time, repeated up to five times
CLIENT = "OpenRLHF SingleTurnAgentExecutor"


def main(workdir: str, peer: str) -> int:
    folder = Path(workdir).resolve()
    export(folder / "model")
    model = rmcore.load(folder / "model", precision="fp32")
    rows, right = [], True

    def asked(count: int, *arguments: str) -> tuple[dict[str, Any], str]:
        """What the client found with `count` requests at once, and the service's metrics."""
        service = Served(*arguments, model=str(folder / "model"), settings=["parallel.precision=fp32"])
        try:
            command = [peer, "-m", "tests.peers.openrlhf_client", f"{service.address}/get_reward", str(count)]
            output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
            metrics = httpx.get(f"{service.address}/metrics", trust_env=False).text
        finally:
            service.end()
        return json.loads(output.splitlines()[-1]), metrics

    for count, arguments, what in (
        (MANY, (), f"{MANY} requests at once to /get_reward"),
        (FEW, ("--max-connections", "2"), f"{FEW} requests at once, 503 above two, repeated by the client"),
    ):
        found, metrics = asked(count, *arguments)
        expected = model.score_texts(found["texts"])
        difference = max(abs(a - b) for a, b in zip(found["rewards"], expected, strict=True))
        refused = 'status="503"' in metrics
        right = right and len(expected) == count and difference <= CLOSE and refused == bool(arguments)
        rows.append(row(CLIENT, found["version"], what, difference))

    for status, arguments, what in (
        (422, ("--max-tokens", "8"), "a text beyond --max-tokens: 422, the client continues without a reward"),
        (504, ("--timeout", "0.001"), "never done in time: 504, repeated, the client continues without a reward"),
    ):
        found, metrics = asked(1, *arguments)
        right = right and found["rewards"] == [None] and f'status="{status}"' in metrics
        rows.append(row(CLIENT, found["version"], what, None))
    write_rows(workdir, "openrlhf", rows)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
