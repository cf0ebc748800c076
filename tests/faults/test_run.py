"""The fault matrix on running jobs: killed, stopped, hanging, slow, full, damaged, changed. One test per row.

Rows that take more than a few seconds are marked slow: `pytest -m slow`, or `python -m tests.faults --table`.
"""

from pathlib import Path

import pytest

from tests.faults import rows_run as rows

pytestmark = pytest.mark.distributed


@pytest.mark.slow
def test_row_01_kill_of_any_rank_while_computing(tmp_path: Path) -> None:
    rows.row_01(tmp_path)


@pytest.mark.slow
def test_row_02_kill_in_any_phase_of_a_save(tmp_path: Path) -> None:
    rows.row_02(tmp_path)


def test_row_03_signals(tmp_path: Path) -> None:
    rows.row_03(tmp_path)


@pytest.mark.slow
def test_row_04_a_rank_hangs(tmp_path: Path) -> None:
    rows.row_04(tmp_path)


def test_row_05_a_slow_rank(tmp_path: Path) -> None:
    rows.row_05(tmp_path)


def test_row_06_an_exception_on_one_rank(tmp_path: Path) -> None:
    rows.row_06(tmp_path)


def test_row_07_disk_full(tmp_path: Path) -> None:
    rows.row_07(tmp_path)


def test_row_08_newest_checkpoint_damaged(tmp_path: Path) -> None:
    rows.row_08(tmp_path)


def test_row_09_all_checkpoints_bad(tmp_path: Path) -> None:
    rows.row_09(tmp_path)


def test_row_10_leftover_partial_directory(tmp_path: Path) -> None:
    rows.row_10(tmp_path)


def test_row_11_directory_not_writable(tmp_path: Path) -> None:
    rows.row_11(tmp_path)


@pytest.mark.slow
def test_row_12_two_runs_in_one_directory(tmp_path: Path) -> None:
    rows.row_12(tmp_path)


@pytest.mark.slow
def test_row_13_another_world_size_or_strategy(tmp_path: Path) -> None:
    rows.row_13(tmp_path)


def test_row_14_configuration_changed(tmp_path: Path) -> None:
    rows.row_14(tmp_path)


def test_row_15_data_changed(tmp_path: Path) -> None:
    rows.row_15(tmp_path)


@pytest.mark.slow
def test_row_16_nan_and_inf(tmp_path: Path) -> None:
    rows.row_16(tmp_path)


@pytest.mark.slow
def test_row_28_rows_do_not_divide(tmp_path: Path) -> None:
    rows.row_28(tmp_path)


@pytest.mark.slow
def test_row_29_torchrun_restarts(tmp_path: Path) -> None:
    rows.row_29(tmp_path)


@pytest.mark.slow
def test_row_30_cache_raced(tmp_path: Path) -> None:
    rows.row_30(tmp_path)


def test_row_31_out_of_memory(tmp_path: Path) -> None:
    rows.row_31(tmp_path)
