"""parallel.precision=auto: one choice on all ranks, stored with the run, and kept by a resumed run."""

import json
from pathlib import Path

import pytest
import yaml

from rmcore.config import load_config
from rmcore.parallel import precision
from rmcore.parallel.precision import Bf16, bf16_of_all, with_precision
from rmcore.parallel.world import running_world
from tests.harness.configs import NEEDED
from tests.harness.crash import Fault, Outcome, run
from tests.harness.ranks import run_ranks
from tests.harness.small_run import arguments, same

WITHOUT_BF16 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}  # any CPU as one with AVX2 only


def choose(rendezvous: str, instructions: list[str]) -> list[str]:
    precision.bf16_instructions = lambda device: instructions[world.rank]  # type: ignore[assignment]
    with running_world(60, init_method=rendezvous) as world:
        config, lines = with_precision(load_config(None, NEEDED), bf16_of_all(world))
    return [config.parallel.precision, *lines]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        (["AMX", "AVX512-BF16"], ["bf16", "parallel.precision=auto: bf16, multiplied by AMX, AVX512-BF16"]),
        (
            ["AMX", ""],
            ["fp32", "parallel.precision=auto: fp32, because the CPU of rank 1 has no instructions for bf16"],
        ),
    ],
)
def test_all_ranks_take_the_same_precision(tmp_path: Path, instructions: list[str], expected: list[str]) -> None:
    assert [rank.value for rank in run_ranks(choose, 2, tmp_path, instructions)] == [expected, expected]


@pytest.mark.parametrize(
    ("given", "instructions", "stored", "expected", "line"),
    [
        ("auto", "", None, "fp32", "because this CPU has no instructions for bf16"),
        ("auto", "", "bf16", "bf16", "bf16, as in the checkpoint"),
        ("auto", "AMX", "fp32", "fp32", "fp32, as in the checkpoint"),
        ("fp32", "AMX", "bf16", "fp32", ""),
        ("bf16", "AMX", None, "bf16", ""),
        ("bf16", "", None, "bf16", "warning: parallel.precision=bf16, but this CPU has no instructions"),
    ],
)
def test_the_choice(given: str, instructions: str, stored: str | None, expected: str, line: str) -> None:
    config = load_config(None, [*NEEDED, f"parallel.precision={given}"])
    config, lines = with_precision(config, Bf16(instructions, "this CPU"), stored)
    assert config.parallel.precision == expected and config.parallel.bf16 == (expected == "bf16")
    assert line in "\n".join(lines) and bool(line) == bool(lines)


def test_fp8_needs_bf16_and_auto_is_enough() -> None:
    config, _ = with_precision(load_config(None, [*NEEDED, "parallel.fp8=true"]), Bf16("", "this CPU"))
    assert config.parallel.precision == "bf16"


def test_a_precision_that_was_not_resolved_is_never_used() -> None:
    with pytest.raises(ValueError, match="not resolved"):
        _ = load_config(None, NEEDED).parallel.bf16


def stored(outcome: Outcome) -> set[str]:
    """The precision in config.yaml and in every checkpoint."""
    manifests = [json.loads(path.read_text()) for path in outcome.directory.glob("checkpoints/*/manifest.json")]
    found = {manifest["manifest"]["config"]["parallel"]["precision"] for manifest in manifests}
    assert manifests
    return found | {yaml.safe_load((outcome.directory / "config.yaml").read_text())["parallel"]["precision"]}


@pytest.mark.distributed
def test_a_run_keeps_its_precision_on_a_machine_that_would_choose_another(tmp_path: Path) -> None:
    """A run in bf16 that continues with `auto`, where `auto` means fp32 for a new run: equal to the last bit."""
    bf16, auto = (arguments(tmp_path, f"parallel.precision={value}") for value in ("bf16", "auto"))
    whole = run(tmp_path / "whole", bf16, 1, environment=WITHOUT_BF16)
    run(tmp_path / "killed", bf16, 1, [Fault("compute", "kill", 0, 5)], environment=WITHOUT_BF16)
    resumed = run(tmp_path / "killed", auto, 1, environment=WITHOUT_BF16)
    assert resumed.codes == [0] and "parallel.precision=auto: bf16, as in the checkpoint" in resumed.text
    assert "warning: parallel.precision=bf16, but this CPU has no instructions for bf16" in resumed.text
    assert same(resumed, whole) and stored(resumed) == {"bf16"}
    fresh = run(tmp_path / "fresh", auto, 1, environment=WITHOUT_BF16)
    assert fresh.codes == [0] and stored(fresh) == {"fp32"} and not same(fresh, whole)
    assert "no instructions for bf16 products" in fresh.text, "the line about the kernels"
