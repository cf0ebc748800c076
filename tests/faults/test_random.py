"""A few cases of the two campaigns at random (tests/faults/campaign.py); `python -m tests.faults` runs them whole."""

import time
from pathlib import Path

import pytest

from tests.faults.campaign import damages, kills

pytestmark = pytest.mark.distributed


def test_killed_anywhere_and_resumed_on_1_2_and_4_ranks(tmp_path: Path) -> None:
    assert kills(tmp_path, cases=2, seed=int(time.time())) >= 2


@pytest.mark.slow
def test_killed_anywhere_more_often(tmp_path: Path) -> None:
    assert kills(tmp_path, cases=12, seed=int(time.time())) >= 12


def test_damaged_files_never_resume_wrongly(tmp_path: Path) -> None:
    seen = damages(tmp_path, cases=60, seed=int(time.time()))
    assert set(seen) == {"step 6", "step 4", "refused"}, "all three kinds of outcome were met"
