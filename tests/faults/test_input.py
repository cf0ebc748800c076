"""The fault matrix on data, configuration, tokenizer and model files: one test per row of the matrix."""

from pathlib import Path

import pytest

from tests.faults.rows_input import ROWS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.__name__}: {row.__doc__}")
def test_row(row, tmp_path: Path) -> None:
    row(tmp_path)
