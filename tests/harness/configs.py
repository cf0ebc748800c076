"""Configurations for tests: the required keys, loading a text as a file, and the mistakes that loading reports."""

from pathlib import Path

import pytest

from rmcore.config import Config, UserError, load_config

NEEDED = ["model.name=m", "data.train.path=p"]  # what every configuration must set


def load_text(tmp_path: Path, text: str, overrides: list[str] | None = None) -> Config:
    """Load `text` as the file c.yaml."""
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(str(path), overrides or [])


def mistakes(tmp_path: Path, text: str | None, overrides: list[str]) -> list[str]:
    """The lines of the UserError that loading raises, without the first line and the folder of the file."""
    with pytest.raises(UserError) as raised:
        load_config(None, overrides) if text is None else load_text(tmp_path, text, overrides)
    count, *lines = str(raised.value).replace(f"{tmp_path}/", "").splitlines()
    assert count == f"{len(lines)} mistake{'s' if len(lines) > 1 else ''} in the configuration:"
    return [line.strip() for line in lines]
