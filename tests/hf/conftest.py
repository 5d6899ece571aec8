"""What the tests of the models share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models


@pytest.fixture(scope="module")
def wide_norms() -> Iterator[None]:
    """Norms of float64 models compute in float64."""
    with models.wide_norms():
        yield
