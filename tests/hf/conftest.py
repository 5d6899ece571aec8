"""What the tests of the models share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import models


@pytest.fixture(scope="module")
def wide_norms() -> Iterator[None]:
    """Norms of float64 models compute in float64."""
    with models.wide_norms():
        yield
