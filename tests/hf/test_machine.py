"""Whatever was done to memories, they answer as the oracle does for each row's own text alone.

One history: a model of random settings, a memory, and steps drawn from the rules of
``memory_machine.py`` and ``memory_generation.py``. ``machine.py`` keeps in plain lists what each
row ought to have read. A step that is refused leaves the memory as it was: the next steps show it.
What histories found is kept, shrunk, in ``test_found_histories.py``.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis.stateful import run_state_machine_as_test as run
from memory_machine import Machine
from memory_state import SHORT

from landmark import LandmarkCache
from landmark.hf.attention import CachedPass
from landmark.hf.causal import LandmarkCausalLMMixin
from landmark.hf.columns import TextColumns
from landmark.hf.compat import CACHE
from landmark.hf.model import LandmarkDecoderMixin
from landmark.memory.layer import LayerMemory

pytestmark = pytest.mark.usefixtures("wide_norms")

GROUPS = 15
HISTORIES = 10
FULL_GROUPS = 60
FULL_HISTORIES = 50
STEPS = 10


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


# Faults that were there once, put in again: one of each kind that the machine has to find.


def drop_at_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generation forgets the memory where the text passes a length."""
    prepare = LandmarkCausalLMMixin.prepare_inputs_for_generation

    def short(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        inputs = prepare(self, input_ids, *args, **kwargs)
        if input_ids.shape[1] > SHORT:
            inputs.pop(CACHE, None)
            inputs.update(input_ids=input_ids)
        return inputs

    monkeypatch.setattr(LandmarkCausalLMMixin, "prepare_inputs_for_generation", short)


def leave_the_first_assisted_step_uncut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Assisted decoding reads the remembered text once more."""
    prepare = LandmarkCausalLMMixin.prepare_inputs_for_generation

    def uncut(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        inputs = prepare(self, input_ids, *args, **kwargs)
        if kwargs.get("is_first_iteration") and "_assisted_decoding" in {
            frame.name for frame in traceback.extract_stack()
        }:
            inputs.update(input_ids=input_ids, attention_mask=None)
        return inputs

    monkeypatch.setattr(LandmarkCausalLMMixin, "prepare_inputs_for_generation", uncut)


def ignore_the_mask_of_the_past(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LandmarkCache, "hide", lambda self, attention_mask: None)


def write_as_autocast_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values come in bfloat16, keys as RoPE leaves them."""
    called = CachedPass.attend
    attend = LayerMemory.attend
    under = []

    def noting(self: Any, *args: Any) -> Any:
        under.append(torch.is_autocast_enabled("cpu"))
        try:
            return called(self, *args)
        finally:
            under.pop()

    def uncast(self: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        value = value.bfloat16() if under[-1] else value
        return attend(self, query, key, value, *args, **kwargs)

    monkeypatch.setattr(CachedPass, "attend", noting)
    monkeypatch.setattr(LayerMemory, "attend", uncast)


def keep_what_inference_mode_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing leaves inference mode where a memory is written."""
    monkeypatch.setattr(LandmarkDecoderMixin, "extend", LandmarkDecoderMixin.extend.__wrapped__)


def compare_no_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextColumns, "check_beginning", lambda *args: None)


def repeat_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams and answers find as many rows in the memory as were read."""
    begin = LandmarkCache.begin_with

    def unrepeated(self: Any, *args: Any, **more: Any) -> None:
        with monkeypatch.context() as inside:
            inside.setattr(LandmarkCache, "_select_rows", lambda self, rows: None)
            begin(self, *args, **more)

    monkeypatch.setattr(LandmarkCache, "begin_with", unrepeated)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "1": drop_at_a_length,
    "2": leave_the_first_assisted_step_uncut,
    "3": ignore_the_mask_of_the_past,
    "4, autocast": write_as_autocast_computes,
    "4, inference mode": keep_what_inference_mode_made,
    "7": compare_no_ids,
    "10": repeat_no_rows,
}
AT_MOST = 300


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 10))]
)
def test_a_planted_fault_is_found(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first failure the search stops."""
    FAULTS[kind](monkeypatch)
    first = settings(AT_MOST, phases=[hypothesis.Phase.generate], report_multiple_bugs=False)
    kinds = (AssertionError, AttributeError, ValueError, RuntimeError, pytest.fail.Exception)
    with pytest.raises(kinds):
        run(hypothesis.seed(seed)(machine_of(seed)), settings=first)
