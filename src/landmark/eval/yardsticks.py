"""Selections to compare landmarks with: they say what a perfect or a blind one would find.

Each is a value of ``LandmarkConfig.granularity`` once ``register`` was called, for measuring alone:
``block_mass`` and ``mean_key`` read the keys of every block at each query.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from landmark.memory.context import LayerContext
from landmark.memory.geometry import QueryGrid
from landmark.memory.policies import SELECTORS, register_selector
from landmark.memory.retrieval import Selection, Selector, landmark_scores, select_by_merit
from landmark.memory.storage.store import LandmarkKeys


class Yardstick(Selector):
    """Every query of every head selects for itself, by something else than landmarks."""

    def select(
        self,
        query: Tensor,
        grid: QueryGrid,
        candidates: int,
        context: LayerContext,
        *,
        is_first: bool,
    ) -> Selection:
        """See ``Selector.select``."""
        query = query * context.scale
        landmarks = context.store.landmarks_before(candidates)
        merits = self.merits(query, grid, landmarks, context)
        barred = landmark_scores(query, grid, landmarks, context) == -torch.inf
        return select_by_merit(merits.masked_fill(barred, -torch.inf), landmarks, self.config.top_k)

    def merits(
        self, query: Tensor, grid: QueryGrid, landmarks: LandmarkKeys, context: LayerContext
    ) -> Tensor:
        """Returns what blocks are selected by, ``(B, G, R, n, W, P)``; arguments as for ``select``.

        Merits of blocks that are no candidate have no meaning.
        """
        raise NotImplementedError


class LatestBlocks(Yardstick):
    """The latest older blocks: what a wider window would see."""

    name: ClassVar[str] = "latest"

    def merits(
        self, query: Tensor, grid: QueryGrid, landmarks: LandmarkKeys, context: LayerContext
    ) -> Tensor:
        """See ``Yardstick.merits``."""
        blocks = landmarks.blocks[0].to(torch.float32)
        return blocks.expand(*query.shape[:-1], len(blocks))


class RandomBlocks(Yardstick):
    """Any older blocks, drawn anew for each query but the same in each run: the floor."""

    name: ClassVar[str] = "random"

    def merits(
        self, query: Tensor, grid: QueryGrid, landmarks: LandmarkKeys, context: LayerContext
    ) -> Tensor:
        """See ``Yardstick.merits``."""
        generator = torch.Generator().manual_seed(int(grid.own.sum()))
        shape = (*query.shape[:-1], landmarks.blocks.shape[1])
        return torch.rand(shape, generator=generator).to(query.device)


class MeanKeys(Yardstick):
    """The mean key of a block's text in place of its landmark's key: no training."""

    name: ClassVar[str] = "mean_key"

    def merits(
        self, query: Tensor, grid: QueryGrid, landmarks: LandmarkKeys, context: LayerContext
    ) -> Tensor:
        """See ``Yardstick.merits``."""
        means = _text_keys(landmarks, context).mean(-2)
        return landmark_scores(query, grid, replace(landmarks, keys=means, equal=False), context)


class BlockMass(Yardstick):
    """The mass that attention would give a block's text: what an ideal landmark would score."""

    name: ClassVar[str] = "block_mass"

    def merits(
        self, query: Tensor, grid: QueryGrid, landmarks: LandmarkKeys, context: LayerContext
    ) -> Tensor:
        """See ``Yardstick.merits``."""
        total: Tensor | None = None
        for keys in _text_keys(landmarks, context).unbind(-2):
            here = replace(landmarks, keys=keys, equal=False)
            scores = landmark_scores(query, grid, here, context)
            total = scores if total is None else torch.logaddexp(total, scores)
        assert total is not None
        return total


class EvidenceBlocks(Yardstick):
    """The blocks that ``evidence`` names, and the best landmarks beside them: reading alone."""

    name: ClassVar[str] = "evidence"
    blocks: ClassVar[tuple[tuple[int, ...], ...]] = ()  # of each row; none where a text is read

    def merits(
        self, query: Tensor, grid: QueryGrid, landmarks: LandmarkKeys, context: LayerContext
    ) -> Tensor:
        """See ``Yardstick.merits``."""
        scores = landmark_scores(query, grid, landmarks, context)
        blocks = landmarks.blocks[0]
        is_named = [
            torch.isin(blocks, torch.tensor(named, device=blocks.device, dtype=blocks.dtype))
            for named in self.blocks or ((),)
        ]
        # (B, 1, 1, 1, 1, P), of one row where none is named
        here = torch.stack(is_named)[:, None, None, None, None]
        return scores.masked_fill(here, torch.finfo(scores.dtype).max)


@contextmanager
def evidence(blocks: Sequence[Iterable[int]]) -> Iterator[None]:
    """Says which blocks granularity ``evidence`` selects in calls inside the ``with`` block.

    Args:
        blocks: of each row of the batch.
    """
    before = EvidenceBlocks.blocks
    EvidenceBlocks.blocks = tuple(map(tuple, blocks))
    try:
        yield
    finally:
        EvidenceBlocks.blocks = before


YARDSTICKS: tuple[type[Yardstick], ...] = (LatestBlocks, RandomBlocks, MeanKeys, BlockMass)


def register(*further: type[Yardstick]) -> None:
    """Makes the yardsticks values of ``LandmarkConfig.granularity``; once is enough.

    Args:
        *further: yardsticks beside those of ``YARDSTICKS``.

    Raises:
        ValueError: another selector has taken one of their names.
    """
    for each in (*YARDSTICKS, *further):
        if SELECTORS.get(each.name) is not each:
            register_selector(each)


def _text_keys(landmarks: LandmarkKeys, context: LayerContext) -> Tensor:
    """Returns the keys of the text of blocks ``(B, G, P, L - 1, D)``, from whatever tier."""
    batch, heads, count, dim = landmarks.keys.shape
    row_head = torch.arange(batch * heads, device=landmarks.keys.device)
    blocks = landmarks.blocks[0]
    keys, _ = context.store.pool.gather(
        row_head.repeat_interleave(count), blocks.repeat(batch * heads)
    )
    return keys.view(batch, heads, count, -1, dim)[..., :-1, :]
