"""Which older blocks a query reads: scores of their landmarks, and the choice by granularity
(paper, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from landmark.config import LandmarkConfig
from landmark.memory.faiss_index import LandmarkIndex
from landmark.memory.geometry import QueryGrid
from landmark.memory.positions import RotaryTables, own_slot
from landmark.memory.storage.store import BlockStore
from landmark.ops.select import running_top_k, select_top


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
class LandmarkKeys:
    """Landmarks to be scored: those of some blocks of each row.

    Attributes:
        blocks: ``(B or 1, P)`` their blocks, ascending.
        keys: ``(B, G, P, D)``.
        equal: whether all are one vector (a model's first layer under stingy positions).
        largest: largest distance in blocks under exact positions.
    """

    blocks: Tensor
    keys: Tensor
    equal: bool
    largest: int


def landmark_keys_at(store: BlockStore, begin: int, end: int) -> LandmarkKeys:
    """Returns the landmarks at the places ``begin..end - 1`` of the store."""
    keys = store.landmarks(end)[:, :, begin:]
    blocks = store.block_of(torch.arange(begin, end, device=keys.device))[None]
    return LandmarkKeys(blocks, keys, store.shared_landmark, store.first + store.places)


def landmark_keys_from(store: BlockStore, first: Tensor, count: int) -> LandmarkKeys:
    """Returns the landmarks of ``count`` blocks from ``first (B,)`` on; of dropped ones no key is
    right.
    """
    blocks = first[:, None] + torch.arange(count, device=first.device)
    places = store.place_of(blocks).clamp(max=store.places - 1)
    rows = torch.arange(len(first), device=first.device)[:, None]
    keys = store.landmark_keys[rows, :, places].transpose(1, 2)
    return LandmarkKeys(blocks, keys, store.shared_landmark, store.first + store.places)


def landmark_scores(
    query: Tensor,
    grid: QueryGrid,
    marks: LandmarkKeys,
    tables: RotaryTables,
    config: LandmarkConfig,
) -> Tensor:
    """Scores every candidate's landmark where it stands while choosing.

    Args:
        query: ``(B, G, R, n, W, D)``, rotated by its place inside the block, times the softmax
            scale (before the product: in float16 the product alone may overflow).
        grid: where these queries stand.
        marks: the ``P`` landmarks to score.
        tables: rotations.
        config: the settings.

    Returns:
        ``(B, G, R, n, W, P)``, ``-inf`` for blocks that are no candidate; at least float32, so that
        rounding decides between no more blocks than it must.
    """
    query = query.to(torch.promote_types(query.dtype, torch.float32))
    scores = _stingy_scores if config.positions == "stingy" else _exact_scores
    barred = ~candidates(grid, marks.blocks, config)[:, None, None, :, None]
    return scores(query, grid, marks, tables, config).masked_fill_(barred, -torch.inf)


def candidates(grid: QueryGrid, blocks: Tensor, config: LandmarkConfig) -> Tensor:
    """Which of ``blocks (B or 1, P)`` each own block may retrieve, ``(B, n, P)`` bool."""
    block = blocks[:, None]
    first = grid.local_first[..., None]
    old = block < first
    if config.max_blocks is None:
        return old
    kept = block >= first - config.max_blocks
    if config.local == "blocks":
        kept = kept | (block == 0)
    return old & kept


def _exact_scores(
    query: Tensor,
    grid: QueryGrid,
    marks: LandmarkKeys,
    tables: RotaryTables,
    config: LandmarkConfig,
) -> Tensor:
    turns = tables.by_blocks(marks.blocks, query.dtype, marks.largest)[:, None]
    keys = turns.rotate(marks.keys.to(query.dtype))
    query = tables.by_blocks(grid.own, query.dtype, marks.largest)[:, None, None, :, None].rotate(
        query
    )
    return _against_all(query, keys)


def at_prefix_start(
    query: Tensor, grid: QueryGrid, tables: RotaryTables, config: LandmarkConfig
) -> Tensor:
    """Turns queries ``(B, G, R, n, W, D)`` to where old landmarks are scored under ``stingy``."""
    largest = config.top_k + 1 + int(grid.local.shape[-1])
    turns = tables.by_blocks(own_slot(grid, config.top_k), query.dtype, largest)
    return turns[:, None, None, :, None].rotate(query)


def _stingy_scores(
    query: Tensor,
    grid: QueryGrid,
    marks: LandmarkKeys,
    tables: RotaryTables,
    config: LandmarkConfig,
) -> Tensor:
    """All at slot 0, then those of the latest ``top_k`` blocks once more at their true places."""
    keys = marks.keys.to(query.dtype)
    count = marks.keys.shape[2]
    at_zero = at_prefix_start(query, grid, tables, config)
    if marks.equal:
        scores = (
            (at_zero * keys[:, :, None, None, None, 0])
            .sum(-1, keepdim=True)
            .expand(*query.shape[:-1], count)
        )
    else:
        scores = _against_all(at_zero, keys)
    recent = grid.local_first[..., None] - 1 - torch.arange(config.top_k, device=query.device)
    blocks = marks.blocks.expand(len(query), count).contiguous()
    at = torch.searchsorted(blocks, recent.flatten(1)).clamp(max=count - 1)
    known = (blocks.gather(1, at) == recent.flatten(1)).view_as(recent)
    at = at.view_as(recent)
    near = tables.by_blocks(
        grid.own[..., None] - recent, query.dtype, config.top_k + 1 + int(grid.local.shape[-1])
    )
    rows = torch.arange(len(query), device=query.device)[:, None, None]
    near_keys = keys[rows, :, at].movedim(3, 1)
    near_query = near[:, None, None, :, None].rotate(query[..., None, :])
    near_scores = torch.einsum("bgrnwkd,bgnkd->bgrnwk", near_query, near_keys)
    spare = torch.nn.functional.pad(scores, (0, 1))
    at = torch.where(known, at, count)[:, None, None, :, None].expand_as(near_scores)
    return spare.scatter_(-1, at, near_scores)[..., :count]


def _against_all(query: Tensor, keys: Tensor) -> Tensor:
    """``(B, G, R, n, W, D)`` with ``(B, G, P, D)`` to ``(B, G, R, n, W, P)``."""
    return torch.unflatten(query.flatten(2, 4) @ keys.transpose(-1, -2), 2, query.shape[2:5])


def select_per_query(
    query: Tensor,
    grid: QueryGrid,
    count: int,
    store: BlockStore,
    tables: RotaryTables,
    config: LandmarkConfig,
    at_once: int,
) -> tuple[Tensor, Tensor]:
    """Chooses for every query alone (``token_head``), among all landmarks.

    Args:
        query: as for ``landmark_scores``.
        grid: where these queries stand.
        count: places of the store to choose from.
        store: the layer's blocks.
        tables: rotations.
        config: the settings.
        at_once: places whose scores are alive at once.

    Returns:
        as ``choose``, blocks for places.
    """

    def scores(begin: int, end: int) -> Tensor:
        return landmark_scores(query, grid, landmark_keys_at(store, begin, end), tables, config)

    _, places, valid = running_top_k(scores, count, config.top_k, at_once)
    return store.block_of(places), valid


def select_with_index(
    query: Tensor,
    grid: QueryGrid,
    store: BlockStore,
    tables: RotaryTables,
    config: LandmarkConfig,
    index: LandmarkIndex,
) -> tuple[Tensor, Tensor]:
    """Chooses for every query alone among what an index finds of the blocks it holds, and all later
    ones.

    The index scores at slot 0, so it may hold only blocks older than the latest ``top_k``
    candidates of every query. Arguments and what is returned as for ``select_per_query``.
    """
    precise = query.to(torch.promote_types(query.dtype, torch.float32))
    lowest = None
    if config.max_blocks is not None:
        lowest = grid.local_first - config.max_blocks
    turned = at_prefix_start(precise, grid, tables, config)
    old_scores, old = index.search(
        turned, config.top_k, lowest, keep_first=config.local == "blocks"
    )
    begin = torch.tensor(index.ends, device=query.device)
    later = landmark_keys_from(store, begin, max(1, int((grid.local_first[:, -1] - begin).max())))
    scores = torch.cat((old_scores, landmark_scores(query, grid, later, tables, config)), dim=-1)
    found, valid = select_top(scores, config.top_k)
    blocks = later.blocks[:, None, None, None, None].expand(*scores.shape[:-1], -1)
    return torch.cat((old, blocks), dim=-1).gather(-1, found), valid


def choose(
    scores: Tensor, config: LandmarkConfig, peak: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Chooses ``top_k`` places from scaled scores where queries choose together; alone they do by
    ``select_per_query``.

    Args:
        scores: ``(B, G, R, n, W, P)``, scaled, ``-inf`` where there is no candidate.
        config: the settings.
        peak: for ``head``, what ``head_peaks`` gave for these queries.

    Returns:
        places and whether each is valid, ``(B, G, R, n, W, K)``, where a dimension of size 1 stands
        for "the same for all" (``R`` under ``group``, ``G`` and ``R`` under ``token``, ``n`` and
        ``W`` under ``head`` in a local chunk).
    """
    if config.granularity == "head":
        assert peak is not None
        return select_top(peak, config.top_k)
    heads = (2,) if config.granularity == "group" else (1, 2)
    shared = _probabilities(scores).amax(heads, keepdim=True)
    return select_top(shared, config.top_k)


def head_peaks(
    scores: Tensor, grid: QueryGrid, config: LandmarkConfig, earlier: Tensor | None
) -> Tensor:
    """Each query's maximum of landmark probabilities over the tokens that choose with it.

    Args:
        scores: as for ``choose``.
        grid: where these queries stand.
        config: with ``local="chunk"`` all queries of the call choose together, else those of the
            own block up to the query.
        earlier: ``(B, G, R, P)`` maximum over queries of the first own block in earlier calls
            (zeros where there are none), or ``None``.

    Returns:
        ``(B, G, R, n, W, P)``, or ``(B, G, R, 1, 1, P)`` for a local chunk; ``-inf`` where there is
        no candidate.
    """
    shares = _probabilities(scores).masked_fill(~grid.valid[:, None, None, ..., None], -torch.inf)
    if config.local == "chunk":
        return shares.amax((3, 4), keepdim=True)
    peaks = shares.cummax(4).values
    if earlier is not None:
        earlier = torch.nn.functional.pad(earlier, (0, peaks.shape[-1] - earlier.shape[-1]))
        first = torch.where(
            peaks[:, :, :, :1] == -torch.inf, peaks[:, :, :, :1], earlier[:, :, :, None, None]
        )
        peaks = torch.cat((torch.maximum(peaks[:, :, :, :1], first), peaks[:, :, :, 1:]), dim=3)
    return peaks


def _probabilities(scores: Tensor) -> Tensor:
    """Softmax over the candidates; ``-inf`` for the others."""
    return torch.softmax(scores, dim=-1).masked_fill(scores == -torch.inf, -torch.inf)
