"""Runs the GPU kernels of recurrent layers on the CPU: python -m tests.peers.kernels WORKDIR PEER_PYTHON [FAMILY ...].

Input: a folder to write to, and the Python of an environment with flash-linear-attention, causal-conv1d and mamba-ssm
(tests/peers/kernels.txt).
Output: WORKDIR/kernels.jsonl, two rows for each family: the largest differences of the rewards and of all gradients,
relative to the largest value where that exceeds 1, between shared prompts on the packages' functions and the padded
forward of transformers' PyTorch functions. Exit code 1 if a reward differs by more than 1e-5 or a gradient by more than
5e-5.
Example: {"client": "causal_conv1d_fn, selective_scan_fn", "compared": "mamba, rewards", "largest_difference": 2.2e-06}.

kernels_client.py computes in that environment, with Triton's interpreter (TRITON_INTERPRET=1), in fp32. It takes about
half a minute of the processor for each family, a minute for Mamba 2, and a minute and a half for Kimi Linear.
"""

import json
import os
import subprocess
import sys

from tests.harness.paths import ROOT
from tests.peers.table import row, write_rows

FAMILIES = ["qwen3_5", "mamba", "mamba2", "lfm2", "kimi_linear"]
ALLOWED = {"rewards": 1e-5, "gradients": 5e-5}  # fp32, three layers, weights three times as large as a fresh model's


def main(workdir: str, peer: str, *families: str) -> int:
    command = [peer, "-m", "tests.peers.kernels_client", *(families or FAMILIES)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    rows = [
        row(", ".join(one["functions"]), one["versions"], f"{one['family']}, {what}", one[what])
        for one in found
        for what in ALLOWED
    ]
    write_rows(workdir, "kernels", rows)
    right = all(one["functions"] and one[what] <= bound for one in found for what, bound in ALLOWED.items())
    return int(done.returncode != 0 or not right)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
