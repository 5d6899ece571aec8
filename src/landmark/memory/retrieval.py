"""Retrieval: which older blocks a query reads (paper, section 3.2).

Every candidate's landmark is scored. A *selector* says who shares a selection of blocks: one class
for each value of ``LandmarkConfig.granularity``. ``head``, which keeps a state, is in
``head_choice.py``; ``policies.py`` lists all.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from landmark.config import LandmarkConfig
from landmark.memory.context import LayerContext
from landmark.memory.geometry import CallGeometry, QueryGrid
from landmark.memory.positions import SCHEMES, STINGY
from landmark.memory.storage.store import LandmarkKeys
from landmark.ops.select import running_top_k, select_top

COPIES = 8  # of a score that are alive while softmaxes are taken
# Scratch memory of one call of a layer, by device type: for scores and copies.
SLAB_BYTES = defaultdict(lambda: 2**26, {"cpu": 2**26, "cuda": 2**31})


@dataclass(frozen=True)
class Retrieval:
    """What one layer retrieved in one call.

    Attributes:
        layer: the layer's index.
        positions: ``(B, T)`` slot of each query, ``-1`` where the row has none.
        blocks: ``(B, H, T, K)`` retrieved blocks, ``-1`` for none.
        weights: ``(B, H, T, K)`` their gate weights.
    """

    layer: int
    positions: Tensor
    blocks: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Selection:
    """The blocks that queries selected, ascending, invalid ones last.

    Attributes:
        blocks: ``(B, G, R, n, W, K)``; a dimension of size 1 stands for "the same for all" (``R``
            under ``group``, ``G`` and ``R`` under ``token``).
        valid: the same shape, bool.
    """

    blocks: Tensor
    valid: Tensor


class Selector:
    """Who shares a selection of blocks: the interface, and what most selectors have in common.

    A layer has a selector of its own. The base class keeps no state. The latest candidate of an own
    block is block ``grid.local_first - 1``, of age 0; the candidates' numbers are
    ``LandmarkKeys.blocks``.

    On a GPU kernels compute ``TokenHeadSelector.select``, with a decode step in few launches and as
    a CUDA graph. A selector with another ``select`` runs in plain PyTorch, and kernels attend.

    Attributes:
        name: value of ``LandmarkConfig.granularity``.
        needs_every_score: whether ``select`` holds all scores of a query at once, as a softmax over
            them does. Calls are then cut into smaller slabs.
        per_query_head: whether query heads of one key/value head may select different blocks.
        keeps_state: whether the selector has to see every call.
        crop_blocks: a cache can be cropped into so many of the latest blocks, ``None`` for all.
        selects_whole_call: whether all queries of a call have to be given to ``select`` at once.

    Args:
        config: the settings.
    """

    name: ClassVar[str]
    needs_every_score: ClassVar[bool] = True
    per_query_head: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = False
    crop_blocks: ClassVar[int | None] = None

    def __init__(self, config: LandmarkConfig) -> None:
        self.config = config
        self.selects_whole_call = False

    def select(
        self,
        query: Tensor,
        grid: QueryGrid,
        candidates: int,
        context: LayerContext,
        *,
        is_first: bool,
    ) -> Selection:
        """Selects up to ``top_k`` blocks for each query.

        Args:
            query: ``(B, G, R, n, W, D)``, rotated by its offset inside the block, not scaled:
                ``landmark_scores`` wants ``query * context.scale``.
            grid: where these queries stand.
            candidates: blocks ``0..candidates - 1`` may be selected.
            context: the layer.
            is_first: whether these are the first own blocks of the call; selectors without a state
                have no use for it.
        """
        raise NotImplementedError

    def begin_call(
        self, query: Tensor, geometry: CallGeometry, context: LayerContext, *, retrieve: bool
    ) -> None:
        """Called before each call's selections, where the selector keeps a state."""

    def commit(self) -> None:
        """Called when all layers have done a call: it will not be taken back."""

    def rollback(self) -> None:
        """Called when a call failed in some layer: the state is that before the call."""

    def note_crop(self) -> None:
        """Called when rows were cropped."""

    def state(self) -> dict[str, Tensor]:
        """Returns the state of the one row, for an archive."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Takes up a state that ``state`` returned."""

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows, repeated or reordered."""


class TokenHeadSelector(Selector):
    """``token_head``: every query of every head selects for itself."""

    name = "token_head"
    needs_every_score = False

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
        if context.index is not None:
            return select_with_index(query, grid, context)
        return select_per_query(query, grid, candidates, context)


class SharedSelector(Selector):
    """Heads of a token share a selection: the best by the maximum of their probabilities."""

    per_query_head = False
    shared_dims: ClassVar[tuple[int, ...]]  # of scores (B, G, R, n, W, P)

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
        landmarks = context.store.landmarks_before(candidates)
        scores = landmark_scores(query * context.scale, grid, landmarks, context)
        merits = probabilities(scores).amax(self.shared_dims, keepdim=True)
        return select_by_merit(merits, landmarks, self.config.top_k)


class TokenSelector(SharedSelector):
    """``token``: all heads of a token select together."""

    name = "token"
    shared_dims = (1, 2)


class GroupSelector(SharedSelector):
    """``group``: the query heads of one key/value head select together."""

    name = "group"
    shared_dims = (2,)


def landmark_scores(
    query: Tensor, grid: QueryGrid, landmarks: LandmarkKeys, context: LayerContext
) -> Tensor:
    """Scores landmarks where the position scheme places them.

    Args:
        query: ``(B, G, R, n, W, D)``, rotated by its offset inside the block, times the softmax
            scale (before the product: in float16 the product alone may overflow).
        grid: where these queries stand.
        landmarks: the ``P`` landmarks to score.
        context: the layer.

    Returns:
        ``(B, G, R, n, W, P)``, ``-inf`` for blocks that are no candidate; at least float32, so that
        rounding decides between no more blocks than it must.
    """
    query = query.to(torch.promote_types(query.dtype, torch.float32))
    scores = SCHEMES[context.config.positions].scores(query, grid, landmarks, context)
    barred = ~is_candidate(grid, landmarks.blocks, context.config)
    return scores.masked_fill_(barred[:, None, None, :, None], -torch.inf)


def is_candidate(grid: QueryGrid, blocks: Tensor, config: LandmarkConfig) -> Tensor:
    """Returns which of ``blocks (B or 1, P)`` each own block may retrieve, ``(B, n, P)`` bool."""
    block = blocks[:, None]
    first = grid.local_first[..., None]
    is_older = block < first
    if config.max_blocks is None:
        return is_older
    is_kept = block >= first - config.max_blocks
    if config.local == "blocks":
        is_kept = is_kept | (block == 0)
    return is_older & is_kept


def select_per_query(
    query: Tensor, grid: QueryGrid, candidates: int, context: LayerContext
) -> Selection:
    """Selects for every query alone, among all landmarks, piece by piece.

    Args:
        query: as for ``landmark_scores``.
        grid: where these queries stand.
        candidates: blocks ``0..candidates - 1`` may be selected.
        context: the layer.
    """

    landmarks = context.store.landmarks_before(candidates)

    def scores(begin: int, end: int) -> Tensor:
        part = replace(
            landmarks,
            blocks=landmarks.blocks[:, begin:end],
            keys=landmarks.keys[:, :, begin:end],
        )
        return landmark_scores(query, grid, part, context)

    queries = query.numel() // query.shape[-1]
    score_bytes = COPIES * max(query.element_size(), 4) * queries
    at_once = max(1, SLAB_BYTES[query.device.type] // score_bytes)
    count = landmarks.keys.shape[2]
    _, index, valid = running_top_k(scores, count, context.config.top_k, at_once)
    return Selection(landmarks.blocks[0][index], valid)


def select_with_index(query: Tensor, grid: QueryGrid, context: LayerContext) -> Selection:
    """Selects for every query alone among what an index finds, and all blocks that it lacks.

    The index scores at the start of the prefix, so it may hold only blocks older than the latest
    ``top_k`` candidates of every query. Arguments as for ``select_per_query``.
    """
    config = context.config
    assert context.index is not None
    precise = query.to(torch.promote_types(query.dtype, torch.float32))
    lowest = None
    if config.max_blocks is not None:
        lowest = grid.local_first - config.max_blocks
    at_start = STINGY.at_prefix_start(precise, grid, context)
    found_scores, found_blocks = context.index.search(
        at_start, config.top_k, lowest, keep_first=config.local == "blocks"
    )
    begin = torch.tensor(context.index.ends, device=query.device)
    later = context.store.landmarks_from(
        begin, max(1, int((grid.local_first[:, -1] - begin).max()))
    )
    later_scores = landmark_scores(query, grid, later, context)
    scores = torch.cat((found_scores, later_scores), dim=-1)
    best, valid = select_top(scores, config.top_k)
    later_blocks = later.blocks[:, None, None, None, None].expand(*later_scores.shape[:-1], -1)
    return Selection(torch.cat((found_blocks, later_blocks), dim=-1).gather(-1, best), valid)


def select_by_merit(merits: Tensor, landmarks: LandmarkKeys, top_k: int) -> Selection:
    """Selects the ``top_k`` blocks of the largest merits.

    Args:
        merits: ``(B, G or 1, R or 1, n or 1, W or 1, P)``, ``-inf`` where there is no candidate.
        landmarks: the ``P`` landmarks, of the same blocks in every row, as
            ``BlockStore.landmarks_before`` returns them.
        top_k: how many at most.
    """
    index, valid = select_top(merits, top_k)
    return Selection(landmarks.blocks[0][index], valid)


def select_pinned(pinned: Tensor, grid: QueryGrid, config: LandmarkConfig) -> Selection:
    """Selects given blocks, the same for all heads, where a query may retrieve them.

    Args:
        pinned: ``(B, top_k)`` blocks, no block twice; -1 for none.
        grid: where the queries stand.
        config: the settings.
    """
    valid = is_candidate(grid, pinned, config) & (pinned >= 0)[:, None]
    last = torch.iinfo(pinned.dtype).max
    blocks, order = torch.where(valid, pinned[:, None], last).sort(dim=-1)
    valid = valid.gather(-1, order)
    shape = (len(pinned), 1, 1, grid.own.shape[1], 1, pinned.shape[1])
    return Selection(blocks.masked_fill(~valid, 0).view(shape), valid.view(shape))


def probabilities(scores: Tensor) -> Tensor:
    """Returns the softmax over the candidates; ``-inf`` for the others."""
    return torch.softmax(scores, dim=-1).masked_fill(scores == -torch.inf, -torch.inf)
