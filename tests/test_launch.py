"""launch/: the commands that the scripts run, the manifest, and Slurm's requeue with a real torchrun and stand-ins for
Slurm's own tools.
"""

import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from rmcore.config import load_config
from tests.harness.paths import ROOT
from tests.harness.small_run import arguments

LAUNCH = ROOT / "launch"


def dry(script: str, *given: str, **environment: str) -> list[str]:
    """The words of the command that the script prints instead of running it, without the threads in front."""
    return dry_with_threads(script, *given, **environment)[1:]


def dry_with_threads(script: str, *given: str, **environment: str) -> list[str]:
    """The words of the printed command; the first is OMP_NUM_THREADS=N."""
    unset = {"OMP_NUM_THREADS", "HEAD", "NODES"}
    inherited = {key: value for key, value in os.environ.items() if key not in unset}
    settings = {**inherited, "DRY_RUN": "1", "RMCORE_PYTHON": sys.executable, **environment}
    done = subprocess.run(
        ["bash", str(LAUNCH / script), *given], cwd=ROOT, env=settings, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[0].startswith("OMP_NUM_THREADS=")
    return words


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def accepted_by_torchrun(words: list[str]) -> Any:
    """torchrun's own parser takes the options."""
    from torch.distributed.run import get_args_parser

    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
    return get_args_parser().parse_args(words[3:])


def test_one_machine() -> None:
    words = dry("node.sh", "configs/hh.yaml", "optim.lr=1e-5", RANKS="8")
    parsed = accepted_by_torchrun(words)
    assert parsed.standalone and parsed.nproc_per_node == "8" and parsed.shutdown_timeout >= 60
    assert words[-4:] == ["-m", "rmcore.train", "configs/hh.yaml", "optim.lr=1e-5"]
    load_config(str(ROOT / words[-2]), words[-1:])


def test_the_cores_are_shared_out_to_the_ranks_as_threads() -> None:
    """torchrun would set one thread, and the check of an exported model on rank 0 would take minutes."""
    cores = len(os.sched_getaffinity(0))
    several = {"NODES": "2", "HEAD": "10.0.0.1"}
    for script, more in (("node.sh", {}), ("multinode.sh", several), ("slurm.sbatch", {"SLURM_JOB_NUM_NODES": "2"})):
        assert dry_with_threads(script, RANKS="1", **more)[0] == f"OMP_NUM_THREADS={cores}"
        assert dry_with_threads(script, RANKS=str(cores + 1), **more)[0] == "OMP_NUM_THREADS=1"
        assert dry_with_threads(script, RANKS="1", OMP_NUM_THREADS="7", **more)[0] == "OMP_NUM_THREADS=7"


def test_several_machines_meet_by_c10d() -> None:
    given = {"NODES": "4", "HEAD": "10.0.0.1", "RANKS": "8", "LOCAL": "10.0.0.2", "JOB": "a b"}
    words = dry("multinode.sh", "configs/hh.yaml", "run.dir=/shared/runs/a b", **given)
    parsed = accepted_by_torchrun(words)
    assert (parsed.nnodes, parsed.rdzv_backend, parsed.rdzv_endpoint) == ("4", "c10d", "10.0.0.1:29400")
    assert (parsed.local_addr, parsed.rdzv_id) == ("10.0.0.2", "a b")
    assert words[-1] == "run.dir=/shared/runs/a b"


def test_a_missing_meeting_point_is_an_error() -> None:
    settings = {key: value for key, value in os.environ.items() if key not in ("NODES", "HEAD")}
    settings |= {"RMCORE_PYTHON": sys.executable, "RANKS": "1"}
    for more, message in (({}, "how many machines"), ({"NODES": "2"}, "name or address of the machine")):
        command = ["bash", str(LAUNCH / "multinode.sh")]
        done = subprocess.run(command, env={**settings, **more}, capture_output=True, text=True)
        assert done.returncode != 0 and message in done.stderr


def test_slurm_prints_what_it_would_run() -> None:
    words = dry("slurm.sbatch", "configs/hh.yaml", SLURM_JOB_NUM_NODES="2", SLURM_JOB_ID="4711", RANKS="8")
    assert option(words, "--rdzv-endpoint") == "FIRST_NODE:30111" and option(words, "--nnodes") == "2"
    assert words[words.index("then,") :][2] == "runs/hh/run_status.json" and words[-1] == "4711"
    directives = [line.split()[1] for line in (LAUNCH / "slurm.sbatch").read_text().splitlines() if "#SBATCH" in line]
    signals = next(line for line in directives if line.startswith("--signal"))
    name, seconds = signals.removeprefix("--signal=B:").split("@")
    assert name == "TERM" and int(seconds) > int(option(words, "--shutdown-timeout")), "a save fits before the end"
    assert "--requeue" in directives and "--ntasks-per-node=1" in directives


SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in show) echo 127.0.0.1 ;; requeue) echo "$2" >>"$REQUEUED" ;; esac
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_slurm_saves_before_the_limit_and_requeues(tmp_path: Path) -> None:
    """Slurm's tools are stand-ins. The script, torchrun, the signal, the checkpoint and the resume are real."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    run_dir, requeued = tmp_path / "run", tmp_path / "requeued"
    given = [*arguments(tmp_path, rows=600), f"run.dir={run_dir}"]
    settings = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "RMCORE_PYTHON": sys.executable,
        "RANKS": "2",
        "REQUEUED": str(requeued),
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "n1",
        "CUDA_VISIBLE_DEVICES": "",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(LAUNCH / "slurm.sbatch"), *given],
            env=settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    job = start()
    end = time.monotonic() + 120
    while not list((run_dir / "checkpoints").glob("step-*")):
        assert job.poll() is None and time.monotonic() < end, job.communicate()[0]
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)  # only to the batch shell, as --signal=B: does
    output, _ = job.communicate(timeout=120)
    status = json.loads((run_dir / "run_status.json").read_text())
    assert job.returncode == 0 and status["status"] == "preempted", output
    assert requeued.read_text().split() == [settings["SLURM_JOB_ID"]]
    job = start()
    output, _ = job.communicate(timeout=240)
    assert job.returncode == 0 and f"continuing at step {status['step']}" in output, output
    assert json.loads((run_dir / "run_status.json").read_text())["status"] == "completed"
    assert len(requeued.read_text().split()) == 1, "a completed run is not requeued"


def manifest() -> tuple[dict[str, Any], dict[str, Any]]:
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    return service, job


def test_the_manifest_holds_together() -> None:
    service, job = manifest()
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {item["name"]: item["value"] for item in container["env"]}
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    assert environment["NODES"] == str(spec["completions"])
    assert service["spec"]["clusterIP"] == "None" and pod["subdomain"] == service["metadata"]["name"]
    labels = spec["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert environment["HEAD"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["terminationGracePeriodSeconds"] > int(environment["SAVE_SECONDS"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert any(option.removeprefix("run.dir=").startswith(tuple(mounts)) for option in container["args"])
    assert (ROOT / container["command"][1]).exists()
    load_config(str(ROOT / container["args"][0]), container["args"][1:])
    ports = [port["port"] for port in service["spec"]["ports"]]
    words = dry("multinode.sh", *container["args"], RANKS="8", **environment)
    assert option(words, "--rdzv-endpoint") == f"{environment['HEAD']}:{ports[0]}"


def test_the_manifest_fits_the_schema_of_kubernetes() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate has the schemas")
    for part in manifest():
        validate.validate(part, "1.30", strict=True)


# --- set-up

PYTHON_STAND_IN = """#!/usr/bin/env bash
case $1 in
    -) exec {python} "$@" ;;  # the hash of the stamp, the requirements of extras
    -m) case "$2 $3" in "pip install") shift 3; echo "$*" >>installs ;; esac ;;
    -c) echo "ops: built" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What setup.sh needs of a checkout, with a Python that notes what pip would install in the file `installs`."""
    for name in ("launch/setup.sh", "setup.py", "constraints.txt", "CMakeLists.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(PYTHON_STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    return tmp_path


def set_up(checkout: Path, *extras: str) -> list[str]:
    """Run setup.sh; the lines of pip's arguments, from the first package on."""
    (checkout / "installs").write_text("")
    command = ["bash", str(checkout / "launch" / "setup.sh"), *extras]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = (checkout / "installs").read_text().splitlines()
    return [line.split("constraints.txt ")[1] for line in lines]


def test_the_set_up_installs_extras_on_demand_and_once(checkout: Path) -> None:
    if "rmcore" not in {distribution.name for distribution in importlib.metadata.distributions()}:
        pytest.skip("rmcore is not installed: its metadata list the requirements of the extras")
    first = set_up(checkout)
    assert len(first) == 2 and first[0].split()[0] == "torch" and first[1] == "--no-build-isolation -e ."
    assert set_up(checkout) == []
    (extra,) = set_up(checkout, "dev")
    assert {"pytest", "mypy", "scipy", "peft"} <= set(extra.split()) and "torch" not in extra and "-e" not in extra
    assert set_up(checkout, "dev") == set_up(checkout) == []
    (lora,) = set_up(checkout, "lora", "dev")
    assert lora == "peft"
    with open(checkout / "setup.py", "a") as file:
        file.write("# changed\n")
    assert set_up(checkout)[1] == "--no-build-isolation -e .[dev,lora]"  # all that was installed, in the new versions
    assert set_up(checkout, "dev", "lora") == []


def test_an_unknown_extra_is_an_error(checkout: Path) -> None:
    command = ["bash", str(checkout / "launch" / "setup.sh"), "dev", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "setup.py has no extra nonsense" in done.stderr
    assert set(done.stderr.split("it has: ")[1].split()) == {
        "dev",
        "bench",
        "serve",
        "wandb",
        "trackio",
        "mlflow",
        "lora",
        "fp8",
        "bitsandbytes",
        "recurrent",
    }
