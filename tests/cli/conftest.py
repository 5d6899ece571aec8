"""What all tests of commands share."""

import pytest


@pytest.fixture(autouse=True)
def no_progress():
    """Nothing is said of how far a command is, however slow the machine: tests compare what is on
    stderr.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("landmark.cli.progress.FIRST", 3600.0)
        yield
