"""A few cases of the two random campaigns in tests/faults/campaign.py; `python -m tests.faults` runs many."""

from pathlib import Path

import pytest

from rmcore.config import load_config
from tests.faults.campaign import EMA, ENDS, SFT, SPLIT_ROWS, STRATEGIES, damages, draw_case, kills
from tests.harness.seed import random_seed
from tests.harness.small_run import arguments

pytestmark = pytest.mark.distributed


def test_killed_anywhere_and_resumed_on_1_2_and_4_ranks(tmp_path: Path) -> None:
    kills(tmp_path, cases=1, seed=random_seed())


@pytest.mark.slow
def test_killed_anywhere_more_often(tmp_path: Path) -> None:
    assert kills(tmp_path, cases=12, seed=random_seed()) > 0


def test_damaged_files_never_resume_wrongly(tmp_path: Path) -> None:
    seen = damages(tmp_path, cases=60, seed=random_seed())
    assert set(seen) == {"step 6", "step 4", "refused"}, "all three kinds of outcome were met"


def test_the_seed_comes_from_the_environment_and_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RMCORE_TEST_SEED", "7")
    assert random_seed() == 7
    assert capsys.readouterr().out == "RMCORE_TEST_SEED=7\n"


def test_the_cases_cover_all_settings() -> None:
    """Every value of every setting, and every pair of strategy and precision, within 100 cases of a seed."""
    cases = [draw_case(1, number) for number in range(100)]
    assert cases == [draw_case(1, number) for number in range(100)], "the seed decides"
    assert len({(case.strategy, case.precision) for case in cases}) == 10
    assert len({(case.evals, case.recompute, case.background_save) for case in cases}) == 12
    assert {case.kill.action for case in cases} == set(ENDS)
    assert {case.strategy for case in cases if case.lora} == set(STRATEGIES)
    assert {case.extra for case in cases} == {"", EMA, SFT, SPLIT_ROWS} and any(case.continues for case in cases)
    stored = {case.strategy for case in cases if "model.lora.base=nf4" in case.formats}
    assert stored & {"zero2", "zero3"}


def test_every_case_is_a_valid_configuration(tmp_path: Path) -> None:
    for number in range(300):
        load_config(None, arguments(tmp_path, *draw_case(2, number).settings(tmp_path)))
