"""Commands in odd environments, drawn by a seed: they work, or end with a message; never with a traceback.

`pytest tests/commands/test_environments.py -m slow` draws others each time; RMCORE_TEST_SEED repeats them.
"""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.paths import ROOT
from tests.harness.seed import random_seed

DATA = ["model.name=synthetic", "data.train.path=synthetic", "data.template=none", "data.max_tokens=512"]
RUN = [*DATA, "model.init=random", "data.limit=8", "batch.pairs=4", "run.evals=0", "run.save_minutes=null"]
COMMANDS = {
    "train": [*RUN, "run.dir={out}/run"],
    "validate": [*RUN, "run.dir={out}/run"],
    "inspect": [*DATA, "data.limit=8", "run.dir={out}/run"],
    "prepare": [*DATA, "data.limit=8", "data.cache={out}/cache", "data.workers=2"],
    "evaluate": ["{out}/no-model", "synthetic"],
    "plan": ["--help"],
}
# Values of environment variables; None: unset. {out}: a directory of the test.
VARIABLES: dict[str, list[str | None]] = {
    "HOME": [None, "/nonexistent", "/proc/self", "{out}/file", ""],
    "TMPDIR": ["/nonexistent", "", "{out}/file"],
    "XDG_CACHE_HOME": ["/nonexistent", "{out}/file"],
    "HF_HOME": ["/nonexistent/hf", "{out}/file", ""],
    "RMCORE_CACHE": ["/nonexistent/cache", "{out}/file", "", "~nobody/cache", "{out}/ü"],
    "RMCORE_OPS": ["reference", "fast", ""],
    "LC_ALL": ["C", "POSIX", "xx_YY.bogus", ""],
    "PYTHONIOENCODING": ["ascii", "latin-1", "utf-16", "cp1252:strict"],
    "PYTHONUTF8": ["0", "1"],
    "PYTHONWARNINGS": ["ignore", "always"],
    "TZ": ["Mars/Olympus", "", ":/nonexistent"],
    "COLUMNS": ["1", "0", "x", "100000"],
    "TERM": [None, "dumb", "bogus"],
    "WORLD_SIZE": ["2", "0", "-1", "x", "", "1"],
    "RANK": ["1", "-1", "0x1", "", "0"],
    "LOCAL_RANK": ["3", "x", ""],
    "LOCAL_WORLD_SIZE": ["9", "0", ""],
    "MASTER_ADDR": ["", "nowhere.invalid"],
    "MASTER_PORT": ["0", "x", "99999"],
    "TORCHELASTIC_RESTART_COUNT": ["1", "x", ""],
    "OMP_NUM_THREADS": ["0", "x", "1", "-3"],
    "TOKENIZERS_PARALLELISM": ["maybe", "true"],
    "CUDA_VISIBLE_DEVICES": ["", "7", "x"],
    "ONEDNN_MAX_CPU_ISA": ["AVX2", "bogus"],
    "HF_HUB_OFFLINE": ["1", "bogus"],
    "PATH": ["", "/nonexistent"],
    "USER": [None, ""],
}
SHELL = [  # what is done before the command is started
    *("ulimit -n 24", "ulimit -n 64", "ulimit -c 0", "umask 077", "umask 777", "exec <&-", "exec >&-", "exec 2>&-"),
    *("exec >/dev/full", "exec 2>/dev/full", "cd /", "cd /proc", "exec 0<&- 1>&-", "trap '' HUP INT TERM"),
]


def draw(rng: random.Random, out: Path) -> tuple[list[str], dict[str, str], str]:
    """Arguments, environment and the shell's lines of one case."""
    name = rng.choice([*COMMANDS, "train", "train"])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RMCORE_CACHE": str(out / "cache"), "OMP_NUM_THREADS": "1"}
    for variable in rng.sample(sorted(VARIABLES), rng.randint(1, 4)):
        value = rng.choice(VARIABLES[variable])
        environment.pop(variable, None)
        if value is not None:
            environment[variable] = value.format(out=out)
    lines = rng.sample(SHELL, rng.randint(0, 2))
    return [name, *(argument.format(out=out) for argument in COMMANDS[name])], environment, "\n".join(lines)


def check(number: int, out: Path) -> str:
    """Run one case; returns what happened. Fails with the case for a traceback or an end without a message."""
    (out / "file").write_text("")
    arguments, environment, lines = draw(random.Random(number), out)
    given = {key: value for key, value in environment.items() if os.environ.get(key) != value}
    gone = sorted(set(os.environ) - set(environment))
    case = f"{' '.join(arguments)}\n{given} without {gone}\n{lines}"
    script = f'cd "{out}"\n{lines}\nexec "{sys.executable}" -m rmcore."$0" "$@"'
    done = subprocess.run(
        [shutil.which("bash") or "bash", "-c", script, *arguments],
        env=environment,
        capture_output=True,
        timeout=600,
        start_new_session=True,
    )
    text = (done.stdout + done.stderr).decode("utf-8", "replace").replace("\0", "")
    assert "Traceback" not in text, f"{case}\n{text}"
    assert done.returncode in (0, 1, 2, 3), f"{case}\nexit code {done.returncode}\n{text}"
    mute = any(line.startswith("exec 2>") for line in lines.split("\n")) or given.get("RANK", "0") != "0"
    assert done.returncode == 0 or mute or done.stderr, f"{case}\nno message\n{text}"
    return f"{done.returncode}: {done.stderr.decode('utf-8', 'replace').strip()[-200:]}"


@pytest.mark.parametrize("number", range(2))
def test_odd_environments(number: int, tmp_path: Path) -> None:
    check(number, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(50))
def test_more_odd_environments(number: int, tmp_path: Path) -> None:
    check(random_seed() + 1000 * number, tmp_path)
