"""A machine that does to memories whatever a user may do, and compares all that they answer with the oracle.

One history: a model of random settings, a memory, and steps drawn from the rules below. ``machine.py`` keeps in plain
lists what each row ought to have read. After any history each row answers as the oracle does for that row's own text
alone, and the memory's counters are those of the lists. A step that is refused leaves the memory as it was: the next
steps show it. What histories found is kept, shrunk, in ``test_found_histories.py``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run
from transformers import DynamicCache

import machine
import models
from landmark import LandmarkCache
from landmark.blocks import slots_for
from landmark.config import GRANULARITIES, POSITIONS, LandmarkConfig
from machine import Column, Row

pytestmark = pytest.mark.usefixtures("wide_norms")

GROUPS, HISTORIES, FULL_GROUPS, FULL_HISTORIES, STEPS = 15, 10, 60, 50, 8
MOST_COLUMNS, MOST_ROWS = 50, 4
BOUNDS = {torch.float64: 1e-8, torch.float32: 1e-3}
SHORT = 24  # lengths that a stock family may act upon, such as Phi3's original_max_position_embeddings
PAD, WIDE = 0, 64

AROUND: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
TIERS: tuple[dict[str, Any], ...] = (
    {},
    {"tier": "host"},
    {"tier": "host", "device_bytes": 50_000},
    {"tier": "disk"},
    {"tier": "disk", "device_bytes": 50_000, "host_bytes": 5_000},
)
POLICIES = st.fixed_dictionaries(
    {
        "top_k": st.sampled_from((2, 1, WIDE)),
        "granularity": st.sampled_from(GRANULARITIES),
        "positions": st.sampled_from(POSITIONS),
        "local_blocks": st.integers(0, 2),
        "max_blocks": st.sampled_from((None, None, 0, 1, 3)),
        "layers": st.sampled_from((None, None, (1,), (0,))),
        "mode": st.sampled_from(("retrieval",) * 5 + ("all",)),
    }
)
CHUNKS = st.sampled_from((1000, 1, 3, 5, 11))
TOKENS, SEEDS, SMALL = st.sampled_from((1, 2, 5, 3, 9, 14)), st.integers(0, 3), st.integers(0, 3)
NEW = st.integers(1, 5)


@functools.cache
def pristine(family: str, kv_heads: int, block_size: int, dtype: torch.dtype, other: bool = False) -> Any:
    """A landmark model that no history touches; ``other`` has other weights."""
    model = copy.deepcopy(
        models.landmark_model(family, LandmarkConfig(block_size=block_size), kv_heads=kv_heads, dtype=dtype)
    )
    for length in ("max_position_embeddings", "original_max_position_embeddings"):
        if hasattr(model.config, length):
            setattr(model.config, length, SHORT)
    with torch.no_grad():
        for parameter in model.parameters() if other else ():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return model


class Machine(RuleBasedStateMachine):
    """A memory and what it ought to hold; a second one, a fork of it, is kept aside."""

    group = 0

    def __init__(self) -> None:
        super().__init__()
        self.folders = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.sound = False

    @initialize(policy=POLICIES, chunk=CHUNKS, rows=st.integers(1, 3), tier=st.sampled_from(TIERS), narrow=st.integers(0, 3))
    def begin(self, policy: dict[str, Any], chunk: int, rows: int, tier: dict[str, Any], narrow: int) -> None:
        """Makes a model and an empty memory; in float32 every block is retrieved, so that rounding chooses nothing."""
        self.dtype = torch.float32 if narrow == 3 else torch.float64
        family, kv_heads = models.FAMILIES[self.group % len(models.FAMILIES)], (2, 1, 4)[self.group % 3]
        kv_heads = 4 if family == "gpt_neox" else kv_heads
        settings = LandmarkConfig(block_size=3 + self.group % 4, chunk_tokens=chunk, **policy)
        if self.dtype == torch.float32:
            settings = settings.replace(top_k=WIDE, max_blocks=None)
        make = functools.partial(pristine, family, kv_heads, settings.block_size, self.dtype)
        self.model, self.other = copy.deepcopy(make()), make(other=True)
        for each in (self.model, self.other):
            each.configure_landmark(**{**settings.to_dict(), "landmark_trained": True, "trained_length": 4096})
        self.truth = machine.truth(family, kv_heads, settings.replace(chunk_tokens=1))
        self.around, self.count = "nothing", rows
        self.cache = LandmarkCache(self.model, **tier)
        self.rows: list[Row] = [[] for _ in range(rows)]
        self.pending: list[Column] | None = None
        self.aside: tuple[Any, ...] | None = None
        self.saved: tuple[Path, Row] | None = None
        self.sound = True

    # What all rules share.

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around what the library does in one step."""
        self.sound = False
        with torch.no_grad(), AROUND[self.around]():
            yield
        self.sound = True

    def past(self) -> int:
        return len(self.rows[0])

    def has_room(self) -> bool:
        return self.past() < MOST_COLUMNS

    def is_rough(self) -> bool:
        return self.around == "autocast" or any(map(machine.rough, self.rows))

    def columns(self, tokens: int, seed: int, padding: str = "none", **marks: bool) -> list[Row]:
        """New columns of every row: what generate said last, and some text, padded."""
        rows = len(self.rows)
        marks = {**marks, "rough": self.around == "autocast"}
        text, mask = machine.some_text(rows, tokens, seed), machine.padding(padding, rows, tokens)
        last = [[] if self.pending is None else [self.pending[row]] for row in range(rows)]
        said = [[Column(each.id, text=not each.pad, **marks) for each in each_row] for each_row in last]
        more = [[Column(a, text=bool(b), **marks) for a, b in zip(*pair, strict=True)] for pair in zip(text, mask, strict=True)]
        return [one + two for one, two in zip(said, more, strict=True)]

    def read_as(self, rows: list[Row], new: list[Row]) -> None:
        """The memory has now read ``new`` behind ``rows``."""
        self.rows = [one + two for one, two in zip(rows, new, strict=True)]
        self.pending = None

    def compare(self, logits: torch.Tensor, rows: list[Row], new: list[Row]) -> None:
        """Logits (B, T, vocabulary) of new columns are the oracle's."""
        assert logits.shape[:2] == (len(rows), len(new[0]))
        for found, row, more in zip(logits, rows, new, strict=True):
            text = torch.tensor(machine.mask_of(more)).bool()
            found, whole = found[text], row + more
            assert found.isfinite().all()
            if not machine.rough(whole) and len(found):
                wrong = (found - self.truth.logits(whole, len(found))).abs().max()
                assert wrong < BOUNDS[self.dtype], f"logits differ by {wrong:.1e}"

    def honest(self) -> list[Row]:
        """The rows of who masks the pads that generate wrote behind the end of a row."""
        return [machine.hidden(row, machine.written_pads(row)) for row in self.rows]

    def may_refuse_to_go_back(self, refusal: ValueError) -> bool:
        return any(word in str(refusal) for word in ("evicted", "granularity head"))

    def refused(self, call: Callable[[], Any]) -> str:
        """A mistake is told in one line."""
        with pytest.raises(ValueError) as caught:
            call()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    # Reading.

    @precondition(has_room)
    @rule(tokens=TOKENS, seed=SEEDS, retrieve=st.booleans(), padding=st.sampled_from(machine.PADDINGS), whole=st.booleans())
    def read(self, tokens: int, seed: int, retrieve: bool, padding: str, whole: bool) -> None:
        """model.read: with or without retrieval and padding; the mask may cover new columns only, or be left out."""
        new = self.columns(tokens, seed, padding, silent=not retrieve)
        rows = self.honest() if whole else self.rows
        ids, mask = as_tensors(rows, new, whole=whole)
        with self.step():
            done = self.going_back(
                rows, lambda: self.model.read(ids, mask, cache=self.cache, retrieve=retrieve), whole=whole
            )
        if done is not None:
            assert done is self.cache
            self.read_as(rows, new)

    @precondition(has_room)
    @rule(tokens=TOKENS, seed=SEEDS, embeds=st.booleans(), padding=st.sampled_from(machine.PADDINGS), whole=st.booleans())
    def forward(self, tokens: int, seed: int, embeds: bool, padding: str, whole: bool) -> None:
        """model(ids or embeddings, past_key_values=memory) gives the oracle's logits."""
        new = self.columns(tokens, seed, padding)
        self.call(self.honest() if whole else self.rows, new, whole=whole, embeds=embeds)

    def call(self, rows: list[Row], new: list[Row], *, whole: bool, embeds: bool = False) -> None:
        ids, mask = as_tensors(rows, new, whole=whole)
        given: dict[str, Any] = {"inputs_embeds": self.model.get_input_embeddings()(ids)} if embeds else {"input_ids": ids}
        with self.step():
            output = self.going_back(
                rows, lambda: self.model(**given, attention_mask=mask, past_key_values=self.cache), whole=whole
            )
        if output is not None:
            new = [[*map(functools.partial(unknown, embeds), row)] for row in new]
            self.compare(output.logits, rows, new)
            self.read_as(rows, new)

    def going_back(self, rows: list[Row], call: Callable[[], Any], *, whole: bool) -> Any:
        """Calls; ``None`` where the mask hides tokens that the memory cannot go back behind."""
        try:
            return call()
        except ValueError as refusal:
            if whole and rows != self.rows and self.may_refuse_to_go_back(refusal):
                return None
            raise

    @precondition(lambda self: self.has_room() and any(map(machine.visible, self.rows)))
    @rule(row=SMALL, count=st.integers(1, 4), tokens=st.integers(1, 3), seed=SEEDS)
    def hide(self, row: int, count: int, tokens: int, seed: int) -> None:
        """A mask that hides a row's last tokens takes them back."""
        rows, row = list(self.rows), row % len(self.rows)
        rows[row] = machine.hidden(rows[row], min(count, len(machine.visible(rows[row]))))
        self.call(rows, self.columns(tokens, seed), whole=True)

    @precondition(has_room)
    @rule(tokens=TOKENS, layer=st.integers(0, 1))
    def interrupted(self, tokens: int, layer: int) -> None:
        """A call that fails inside the model leaves whole chunks of it or nothing."""
        new, before = self.columns(tokens, 0), self.past()
        ids, _ = as_tensors(self.rows, new, whole=False)

        def fail(*_: Any) -> None:
            raise InterruptedError

        hook = self.model.base_model.layers[layer].register_forward_hook(fail)
        with self.step(), contextlib.suppress(InterruptedError), hook:
            self.model(ids, past_key_values=self.cache)
        assert self.cache.get_seq_length() == before

    # Generating.

    def may_generate(self) -> bool:
        """Every row has text, and room for more."""
        return self.has_room() and (self.past() > 0 or self.pending is not None)

    def asked(self, tokens: int, seed: int) -> tuple[list[Row], list[Row]]:
        """Rows and new columns of a call of generate; with no new column, the last is computed again."""
        new = self.columns(tokens, seed)
        rows = self.honest()
        if any(not row[-1].text for row in map(list.__add__, rows, new)):
            new = [row + more for row, more in zip(new, self.columns(1, seed), strict=True)]
        return rows, new
