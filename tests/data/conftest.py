"""Folders of data files: real ones where they exist, empty ones to write small files into."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def data_dir(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of real data sets: FEDMP_DATA_DIR, or one beside the checkout."""
    chosen = os.environ.get("FEDMP_DATA_DIR")
    folder = Path(chosen) if chosen else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs real data sets: set FEDMP_DATA_DIR to a folder that has them")
    monkeypatch.setenv("FEDMP_DATA_DIR", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that data sets are loaded from."""
    monkeypatch.setenv("FEDMP_DATA_DIR", str(tmp_path))
    return tmp_path
