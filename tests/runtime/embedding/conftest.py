"""A folder of pictures."""

from pathlib import Path

import pytest

from tests.pictures import fill


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with ten pictures."""
    fill(tmp_path / "photos", range(10))
    return tmp_path / "photos"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path
