"""Whatever was done to memories, they answer as the oracle does for each row's own text alone.

One history: a model of random settings, a memory, and steps drawn from the rules of ``memory_machine.py`` and
``memory_generation.py``. ``machine.py`` keeps in plain lists what each row ought to have read. A step that is refused
leaves the memory as it was: the next steps show it. What histories found is kept, shrunk, in
``test_found_histories.py``.
"""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
from hypothesis.stateful import run_state_machine_as_test as run
from memory_machine import Machine

pytestmark = pytest.mark.usefixtures("wide_norms")

GROUPS, HISTORIES, FULL_GROUPS, FULL_HISTORIES, STEPS = 15, 10, 60, 50, 8


def settings(histories: int, **changes: Any) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=histories,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        **changes,
    )


def machine_of(group: int) -> type[Machine]:
    return type("Machine", (Machine,), {"group": group})


@pytest.mark.parametrize("group", range(GROUPS))
def test_any_history(group: int) -> None:
    run(hypothesis.seed(group)(machine_of(group)), settings=settings(HISTORIES))


@pytest.mark.full
@pytest.mark.parametrize("group", range(FULL_GROUPS))
def test_any_history_of_fresh_seeds(group: int) -> None:
    run(machine_of(group), settings=settings(FULL_HISTORIES, print_blob=True))
