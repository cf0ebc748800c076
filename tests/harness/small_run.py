"""A run of eight small steps that tests start, disturb, resume and compare.

`arguments` are the command line; `reference` is the run that nothing happens to; `same`, `furthest`, `metrics` compare
two outcomes. Example: `same(run(folder / "resumed", arguments(folder), 2), reference(folder))`.
"""

import functools
import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import safe_open

from rmcore.data.synthetic import synthetic_rows
from tests.harness.crash import Outcome, run

STEPS = 8


# Two world sizes add the same fp32 numbers in another order: a gradient differs by some 1e-7 of the largest terms of
# its sum. AdamW moves a weight by lr * m / (sqrt(v) + eps), so a difference d of the gradient moves it by at most
# lr * d / eps = 1e-3 * 1e-7 / 1e-5 = 1e-5 per step, less than 1e-4 in eight steps (2e-6 was measured). A pair that was
# lost, repeated or swapped moves weights by about lr = 1e-3 per step.
ROUNDING = 1e-4


def arguments(folder: Path, *more: str, rows: int = 48) -> list[str]:
    """The command line of a run of eight steps on the embedded model; the first call writes the data into `folder`."""
    data = folder / "pairs.jsonl"
    if not data.exists():
        folder.mkdir(parents=True, exist_ok=True)
        data.write_text("".join(json.dumps(row) + "\n" for row in synthetic_rows(rows, 0, "train")), encoding="utf-8")
    base = ["model.name=synthetic", "model.init=random", f"data.train.path={data}", "data.template=none"]
    base += ["data.max_tokens=256", "batch.pairs=6", "optim.lr=1e-3", "parallel.precision=fp32", "run.evals=0"]
    base += ["run.save_every=2", "log.every=2", "log.tensorboard=false"]
    given = {argument.split("=")[0] for argument in more}
    return [argument for argument in base if argument.split("=")[0] not in given] + list(more)


def same(first: Outcome, second: Outcome) -> bool:
    """Whether both have final weights, and these are equal to the last bit."""
    return bool(first.weights) and all(
        np.array_equal(first.weights[name].view(np.uint32), second.weights[name].view(np.uint32))
        for name in first.weights.keys() | second.weights.keys()
    )


def furthest(first: Outcome, second: Outcome) -> float:
    """The largest difference of any weight."""
    assert first.weights and first.weights.keys() == second.weights.keys()
    return max(float(np.abs(first.weights[name] - second.weights[name]).max()) for name in first.weights)


@functools.cache
def reference(folder: Path, *more: str, size: int = 2) -> Outcome:
    """The run that nothing happens to."""
    outcome = run(folder / f"reference-{size}", arguments(folder, *more), size)
    assert outcome.codes == [0] * size, outcome.text
    return outcome


def stored_weights(checkpoint: Path, kind: str = "weight") -> dict[str, np.ndarray]:
    """The weights of a checkpoint, flattened, or its averages (`ema`, `exp_avg`), read without rmcore."""
    parts: dict[str, list[tuple[int, np.ndarray]]] = {}
    for path in checkpoint.glob("rank-*"):
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118
                name, _, start = key.partition("@")
                parts.setdefault(name, []).append((int(start), file.get_tensor(key)))
    whole = {
        name: np.concatenate([part for _, part in sorted(found, key=lambda p: p[0])]) for name, found in parts.items()
    }
    return {name.removeprefix(f"{kind}/"): tensor for name, tensor in whole.items() if name.startswith(f"{kind}/")}


def metrics(outcome: Outcome) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without those that depend on the clock."""
    lines = (outcome.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    clocks = re.compile("second")
    return [{key: value for key, value in json.loads(line).items() if not clocks.search(key)} for line in lines]


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], limit: float = 60.0) -> None:
    """Wait until the condition holds; fails if the process ends first."""
    end = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
