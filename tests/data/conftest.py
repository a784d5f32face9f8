"""The real data, where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def data_folder() -> Path:
    """The folder METAFAST_DATA names."""
    if "METAFAST_DATA" not in os.environ:
        pytest.skip("needs the real data: METAFAST_DATA is not set")
    return Path(os.environ["METAFAST_DATA"])
