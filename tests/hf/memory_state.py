"""The state of the machine: a memory, what ought to be in it, and how a step is done and
compared.
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

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

import machine
import models
from landmark import LandmarkCache
from landmark.blocks import slots_for
from landmark.config import GRANULARITIES, POSITIONS, LandmarkConfig
from machine import Column, Row, as_tensors

MOST_COLUMNS = 50
MOST_ROWS = 4
BOUNDS = {torch.float64: 1e-8, torch.float32: 1e-3}
# Lengths that a stock family may act upon, such as Phi3's original_max_position_embeddings.
SHORT = 24
CACHE_NAMES = st.sampled_from(("past_key_values", "cache"))

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
        "top_k": st.sampled_from((2, 1, 64)),
        "granularity": st.sampled_from(GRANULARITIES),
        "positions": st.sampled_from(POSITIONS),
        "local_blocks": st.integers(0, 2),
        "max_blocks": st.sampled_from((None, None, 0, 1, 3)),
        "layers": st.sampled_from((None, None, (1,), (0,))),
        "mode": st.sampled_from(("retrieval",) * 5 + ("all",)),
    }
)
CHUNKS = st.sampled_from((1000, 1, 3, 5, 11))


@functools.cache
def pristine(
    family: str, kv_heads: int, block_size: int, dtype: torch.dtype, other: bool = False
) -> Any:
    """A landmark model that no history touches; ``other`` has other weights."""
    model = copy.deepcopy(
        models.landmark_model(
            family, LandmarkConfig(block_size=block_size), kv_heads=kv_heads, dtype=dtype
        )
    )
    for length in ("max_position_embeddings", "original_max_position_embeddings"):
        if hasattr(model.config, length):
            setattr(model.config, length, SHORT)
    with torch.no_grad():
        for parameter in model.parameters() if other else ():
            parameter.add_(
                0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
            )
    return model


class Memory(RuleBasedStateMachine):
    """A memory and the rows that it ought to hold; a second one, a fork of it, may be kept aside.

    Attributes:
        cache: the memory.
        rows: what it has read.
        pending: what generate said last in each row, which the memory has not read yet.
        aside: the same three of another memory.
        around: what the next steps run under, a name of ``AROUND``.
        archive: the last folder that was saved to, and the row in it.
    """

    group = 0

    def __init__(self) -> None:
        super().__init__()
        self.folders = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.whole = False  # nothing was interrupted by a failure

    @initialize(
        policy=POLICIES,
        chunk=CHUNKS,
        rows=st.integers(1, 3),
        tier=st.sampled_from(TIERS),
        narrow=st.booleans(),
        index=st.booleans(),
        tokens=st.sampled_from((0, 14, 9, 20)),
        around=st.sampled_from(("nothing", "nothing", "inference", "autocast")),
    )
    def begin(
        self,
        policy: dict[str, Any],
        chunk: int,
        rows: int,
        tier: dict[str, Any],
        narrow: bool,
        index: bool,
        tokens: int,
        around: str,
    ) -> None:
        """Makes a model, in float32 where ``narrow``, and a memory of some text, read under
        ``around``.
        """
        self.dtype = torch.float32 if narrow else torch.float64
        family = models.FAMILIES[self.group % len(models.FAMILIES)]
        kv_heads = 4 if family == "gpt_neox" else (2, 1, 4)[self.group % 3]
        settings = LandmarkConfig(block_size=3 + self.group % 4, chunk_tokens=chunk, **policy)
        make = functools.partial(pristine, family, kv_heads, settings.block_size, self.dtype)
        self.model = copy.deepcopy(make())
        self.other = copy.deepcopy(make(other=True))
        for each in (self.model, self.other):
            each.configure_landmark(
                **{**settings.to_dict(), "landmark_trained": True, "trained_length": 4096}
            )
        self.truth = machine.truth(family, kv_heads, settings.replace(chunk_tokens=1))
        plain = (settings.mode, settings.granularity, settings.positions) == (
            "retrieval",
            "token_head",
            "stingy",
        )
        self.index = {"index": "faiss-flat"} if plain and index else {}
        self.enter(around)
        self.cache = LandmarkCache(self.model, **tier, **self.index)
        self.rows: list[Row] = [[] for _ in range(rows)]
        self.pending: list[Column] | None = None
        self.aside: tuple[LandmarkCache, list[Row], list[Column] | None] | None = None
        self.archive: tuple[Path, Row] | None = None
        self.whole = True
        if tokens:
            self.call(self.columns(tokens, 0), "none", self.forwarded)

    def enter(self, around: str) -> None:
        """The steps that follow run under one of ``AROUND``."""
        self.around = (
            "nothing" if around == "autocast" and self.dtype == torch.float64 else around
        )  # knows no autocast

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around what the library does in one step."""
        self.whole = False
        with torch.no_grad(), AROUND[self.around]():
            yield
        self.whole = True

    # What there is.

    def past(self) -> int:
        """Columns of the memory."""
        return len(self.rows[0])

    def has_room(self) -> bool:
        return self.past() < MOST_COLUMNS

    def columns(self, tokens: int, seed: int, padding: str = "none", **marks: bool) -> list[Row]:
        """New columns of every row: what generate said last, and some text, padded."""
        rows = len(self.rows)
        marks = {**marks, "rough": self.around == "autocast"}
        last = [[Column(each.id, text=not each.pad, **marks)] for each in self.pending or ()] or [
            [] for _ in self.rows
        ]
        mask = machine.padding(padding, rows, tokens)
        for row, ids, counts in zip(last, machine.some_text(rows, tokens, seed), mask, strict=True):
            row.extend(
                Column(each, text=bool(count), **marks)
                for each, count in zip(ids, counts, strict=True)
            )
        return last

    def unpadded(self) -> list[Row]:
        """The rows of who masks the pads that generate wrote behind their ends."""
        return [machine.hidden(row, machine.written_pads(row)) for row in self.rows]

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folders))

    # What is compared.

    def is_certain(self, row: Row) -> bool:
        """Whether the oracle says what a row answers: not where it was computed in bfloat16, or a
        choice is close.
        """
        exact = self.dtype == torch.float64 and not self.index
        return (
            self.around != "autocast"
            and not machine.rough(row)
            and (exact or not self.truth.is_close(row))
        )

    def compare(self, logits: torch.Tensor, rows: list[Row], new: list[Row]) -> None:
        """Logits (B, T, vocabulary) of new columns are the oracle's."""
        assert logits.shape[:2] == (len(rows), len(new[0]))
        for found, row, more in zip(logits, rows, new, strict=True):
            found = found[torch.tensor(machine.mask_of(more)).bool()]
            assert found.isfinite().all()
            if len(found) and self.is_certain(row + more):
                wrong = float((found - self.truth.logits(row + more, len(found))).abs().max())
                assert wrong < BOUNDS[self.dtype], f"logits differ by {wrong:.1e}"
        for memory in self.cache.layers_in_use():
            memory.check_integrity()

    def call(
        self, new: list[Row], mask: str, function: Callable[..., Any], rows: list[Row] | None = None
    ) -> None:
        """Calls a function of ids and mask: of ``none``, of the ``new`` columns, or of the
        ``whole`` text.

        A mask over the whole text hides the pads that generate wrote, or whatever ``rows`` hide.
        """
        if rows is None:
            rows = self.unpadded() if mask == "whole" else self.rows
        ids, given = as_tensors(rows, new, whole=mask == "whole")
        told = self.going_back(
            rows,
            lambda: function(
                ids[:, -len(new[0]) :], None if mask == "none" and given.all() else given
            ),
        )
        if isinstance(told, torch.Tensor):
            self.compare(told, rows, new)
        if told is not None:
            self.rows = [row + more for row, more in zip(rows, new, strict=True)]
            self.pending = None

    def going_back(self, rows: list[Row], call: Callable[[], Any]) -> Any:
        """Calls; ``None`` where ``rows`` leave out tokens of the memory that it cannot go back
        behind.
        """
        with self.step():
            try:
                return call()
            except ValueError as refusal:
                if rows != self.rows and self.cannot_go_back(refusal):
                    return None
                raise

    def cannot_go_back(self, refusal: ValueError) -> bool:
        return any(word in str(refusal) for word in ("evicted", "granularity head"))

    def refused(self, call: Callable[[], Any]) -> str:
        """A mistake is told in one line."""
        self.whole = False
        with torch.no_grad(), AROUND[self.around](), pytest.raises(ValueError) as caught:
            call()
        self.whole = True
        assert "\n" not in str(caught.value) and len(str(caught.value)) <= 400
        return str(caught.value)

    def forwarded(
        self, ids: torch.Tensor, mask: torch.Tensor | None, name: str = "past_key_values"
    ) -> torch.Tensor:
        return self.model(ids, attention_mask=mask, **{name: self.cache}).logits

    def select(
        self, rows: list[int], given: torch.Tensor | None = None, *, reorder: bool = False
    ) -> None:
        """Keeps these rows, as ``given`` tells the memory."""
        with self.step():
            choose = self.cache.reorder_cache if reorder else self.cache.batch_select_indices
            choose(torch.tensor(rows) if given is None else given)
        self.take(rows)

    def take(self, rows: list[int]) -> None:
        """The memory holds these rows now."""
        self.rows = [self.rows[row] for row in rows]
        self.pending = None if self.pending is None else [self.pending[row] for row in rows]

    @invariant()
    def counters(self) -> None:
        """Everything that can be counted is what was read."""
        cache = self.cache
        past = self.past()
        assert cache.get_seq_length() == past
        assert cache.is_initialized == (past > 0)
        if past > 0:
            text = [machine.visible(row) for row in self.rows]
            assert cache.batch_size == len(text)
            assert cache.tokens == [len(row) for row in text]
            assert cache.slots == [slots_for(len(row), cache.settings.block_size) for row in text]
            assert [cache.ids(row).tolist() for row in range(len(text))] == [
                machine.known_ids(row) for row in text
            ]

    def swap(self) -> None:
        """Goes on with the memory that was kept aside."""
        assert self.aside is not None
        now = self.cache, self.rows, self.pending
        (self.cache, self.rows, self.pending) = self.aside
        self.aside = now

    def teardown(self) -> None:
        """Both memories answer what they ought to, to the last."""
        self.around = "nothing"
        try:
            for _ in range(0 if not self.whole else 1 if self.aside is None else 2):
                self.counters()
                self.call(self.columns(1, 2), "new", self.forwarded)
                if self.aside is not None:
                    self.swap()
        finally:
            shutil.rmtree(self.folders)
