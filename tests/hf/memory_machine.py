"""The machine: rules of what else a user does with a memory: read, forward, crop, fork, choose
rows, save, open.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from memory_generation import Generating
from memory_mistakes import MISTAKES, another_text
from memory_state import AROUND, CACHE_NAMES, CHUNKS, MOST_ROWS, TIERS, Memory

import machine
from landmark import LandmarkCache

TOKENS = st.sampled_from((1, 2, 5, 3, 9, 14))
SEEDS = st.integers(0, 3)
SMALL = st.integers(0, 3)
PADDINGS = st.sampled_from(machine.PADDINGS)
MASKS = st.sampled_from(("none", "new", "whole"))


def has_read(memory: Memory) -> bool:
    return memory.past() > 0


class Machine(Generating):
    """All that is done to a memory."""

    @precondition(Memory.has_room)
    @rule(tokens=TOKENS, seed=SEEDS, retrieve=st.booleans(), padding=PADDINGS, mask=MASKS)
    def read(self, tokens: int, seed: int, retrieve: bool, padding: str, mask: str) -> None:
        """model.read: with or without retrieval and padding; the mask may cover new columns only,
        or be left out.
        """
        new = self.columns(tokens, seed, padding, silent=not retrieve)
        self.call(
            new,
            mask,
            lambda ids, given: self.model.read(ids, given, cache=self.cache, retrieve=retrieve),
        )

    @precondition(Memory.has_room)
    @rule(tokens=TOKENS, seed=SEEDS, padding=PADDINGS, mask=MASKS, name=CACHE_NAMES)
    def forward(self, tokens: int, seed: int, padding: str, mask: str, name: str) -> None:
        """model(ids) with the memory gives the oracle's logits."""
        self.call(
            self.columns(tokens, seed, padding), mask, functools.partial(self.forwarded, name=name)
        )

    @precondition(Memory.has_room)
    @rule(tokens=TOKENS, seed=SEEDS)
    def forward_embeddings(self, tokens: int, seed: int) -> None:
        """The same of embeddings, whose ids the memory does not know."""

        def embedded(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            embeds = self.model.get_input_embeddings()(ids)
            return self.model(
                inputs_embeds=embeds, attention_mask=mask, past_key_values=self.cache
            ).logits

        self.call(self.columns(tokens, seed, unknown=True), "new", embedded)

    @precondition(lambda self: self.has_room() and any(map(machine.visible, self.rows)))
    @rule(row=SMALL, count=st.integers(1, 4), tokens=st.integers(1, 3), seed=SEEDS)
    def hide(self, row: int, count: int, tokens: int, seed: int) -> None:
        """A mask that hides a row's last tokens takes them back."""
        rows = list(self.rows)
        row = row % len(self.rows)
        rows[row] = machine.hidden(rows[row], min(count, len(machine.visible(rows[row]))))
        self.call(self.columns(tokens, seed), "whole", self.forwarded, rows)

    @precondition(Memory.has_room)
    @rule(tokens=TOKENS, layer=st.integers(0, 1), row=SMALL, count=st.sampled_from((0, 0, 1, 4)))
    def interrupted(self, tokens: int, layer: int, row: int, count: int) -> None:
        """A call that fails inside the model leaves nothing behind, but that what its mask hides
        stays hidden.
        """
        rows = list(self.rows)
        row = row % len(self.rows)
        new = self.columns(tokens, 0)
        rows[row] = machine.hidden(rows[row], min(count, len(machine.visible(rows[row]))))
        ids, mask = machine.as_tensors(rows, new, whole=rows != self.rows)

        def fail(*_: Any) -> None:
            raise InterruptedError

        def call() -> bool:
            with (
                contextlib.suppress(InterruptedError),
                self.model.base_model.layers[layer].register_forward_hook(fail),
            ):
                self.model(ids[:, -len(new[0]) :], attention_mask=mask, past_key_values=self.cache)
            return True

        if self.going_back(rows, call):
            self.rows = rows

    @precondition(has_read)
    @rule(columns=st.sampled_from((1, 2, 4, 9, 25)), positive=st.booleans())
    def crop(self, columns: int, positive: bool) -> None:
        """crop(-n) takes n columns back; crop(n) keeps n."""
        keep = max(int(positive), self.past() - columns)
        with self.step():
            try:
                self.cache.crop(keep if positive else keep - self.past())
            except ValueError as refusal:
                assert self.cannot_go_back(refusal)
                return
        self.rows = [row[:keep] for row in self.rows]
        self.pending = None

    @precondition(has_read)
    @rule(
        rows=st.lists(SMALL, min_size=1, max_size=MOST_ROWS),
        how=st.sampled_from(("reorder", "mask", "indices")),
    )
    def select_rows(self, rows: list[int], how: str) -> None:
        """Rows are reordered, or some are kept."""
        held = len(self.rows)
        rows = [row % held for row in rows]
        if how == "mask":
            rows = sorted(set(rows))
            self.select(rows, torch.tensor([row in rows for row in range(held)]))
        else:
            self.select(rows, reorder=how == "reorder")

    @precondition(has_read)
    @rule(times=st.integers(1, MOST_ROWS))
    def repeat_rows(self, times: int) -> None:
        """Every row is repeated."""
        times = min(times, MOST_ROWS // len(self.rows))
        with self.step():
            self.cache.batch_repeat_interleave(times)
        self.take([row for row in range(len(self.rows)) for _ in range(times)])

    @rule(deep=st.booleans())
    def fork(self, deep: bool) -> None:
        """Goes on with a copy and keeps the memory aside."""
        with self.step():
            fork = copy.deepcopy(self.cache) if deep else self.cache.fork()
        self.aside = self.cache, self.rows, self.pending
        self.cache = fork

    @precondition(lambda self: self.aside is not None)
    @rule()
    def other_one(self) -> None:
        """Goes on with the memory that was kept aside."""
        self.swap()

    @rule()
    def reset(self) -> None:
        """The memory forgets everything."""
        with self.step():
            self.cache.reset()
        self.rows = [[] for _ in self.rows]
        self.pending = None

    @rule(around=st.sampled_from(tuple(AROUND)), chunk=CHUNKS, record=st.booleans())
    def configure(self, around: str, chunk: int, record: bool) -> None:
        """What is free to change; the steps that follow run under inference_mode, autocast or
        neither.
        """
        self.enter(around)
        self.model.configure_landmark(chunk_tokens=chunk)
        self.cache.record = record

    @precondition(lambda self: len(self.rows) == 1 and machine.visible(self.rows[0]))
    @rule(same=st.booleans())
    def save(self, same: bool) -> None:
        """Saves to the folder of this memory, or to a new one."""
        saved = self.cache.saved if same else None
        folder = self.new_folder() if saved is None else saved.archive.folder
        if saved is not None and self.cache.rewound:
            assert "cropped" in self.refused(lambda: self.cache.save(folder))
            return
        with self.step():
            self.cache.save(folder)
        self.archive = folder, machine.visible(self.rows[0])

    @precondition(lambda self: self.archive is not None)
    @rule(tier=st.sampled_from(TIERS))
    def open(self, tier: dict[str, Any]) -> None:
        """Goes on with what was saved, on any tier."""
        folder, row = self.archive
        with self.step():
            self.cache = LandmarkCache.open(folder, self.model, **tier, **self.index)
        self.rows = [list(row)]
        self.pending = None

    @precondition(has_read)
    @rule(name=st.sampled_from(sorted(MISTAKES)))
    def mistake(self, name: str) -> None:
        """Refused in one line, and the memory is as it was."""
        self.refused_if_any(MISTAKES[name](self))

    @precondition(has_read)
    @rule(beams=st.sampled_from((1, 2)))
    def generate_behind_another_text(self, beams: int) -> None:
        """Refused too. A rule of its own: among the mistakes it comes so seldom that a search may
        end before it.
        """
        self.refused_if_any(another_text(self, num_beams=beams))

    def refused_if_any(self, call: Callable[[], Any] | None) -> None:
        """A mistake that cannot be made with this memory is none."""
        if call is not None:
            self.refused(call)
