"""Which older blocks a query reads: scores of their landmarks, and the choice by granularity (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from landmark.config import LandmarkConfig
from landmark.memory.plan import Grid
from landmark.memory.positions import RotationTables, own_slot
from landmark.memory.store import BlockStore
from landmark.ops.select import select_top


def landmark_scores(
    query: Tensor, grid: Grid, count: int, store: BlockStore, tables: RotationTables, config: LandmarkConfig
) -> Tensor:
    """Scores every candidate's landmark where it stands while choosing.

    Args:
        query: ``(B, G, R, n, W, D)``, rotated by its place inside the block, times the softmax scale (before the
            product: in float16 the product alone may overflow).
        grid: where these queries stand.
        count: places of the store to score.
        store: the layer's blocks.
        tables: rotations.
        config: the settings.

    Returns:
        ``(B, G, R, n, W, count)``, ``-inf`` for places that are no candidate; at least float32, so that rounding
        decides between no more blocks than it must.
    """
    query = query.to(torch.promote_types(query.dtype, torch.float32))
    scores = _stingy_scores if config.positions == "stingy" else _exact_scores
    barred = ~candidates(grid, count, store, config)[:, None, None, :, None]
    return scores(query, grid, count, store, tables, config).masked_fill_(barred, -torch.inf)


def candidates(grid: Grid, count: int, store: BlockStore, config: LandmarkConfig) -> Tensor:
    """Which places each own block may retrieve from, ``(B, n, count)`` bool."""
    block = store.block_of(torch.arange(count, device=grid.own.device))
    first = grid.local_first[..., None]
    old = block < first
    if config.max_blocks is None:
        return old
    kept = block >= first - config.max_blocks
    if config.local == "blocks":
        kept = kept | (block == 0)
    return old & kept


def _exact_scores(
    query: Tensor, grid: Grid, count: int, store: BlockStore, tables: RotationTables, config: LandmarkConfig
) -> Tensor:
    block = store.block_of(torch.arange(count, device=grid.own.device))
    largest = store.first + store.places
    keys = tables.by_blocks(block, query.dtype, largest).rotate(store.landmarks(count).to(query.dtype))
    query = tables.by_blocks(grid.own, query.dtype, largest)[:, None, None, :, None].rotate(query)
    return _against_all(query, keys)


def _stingy_scores(
    query: Tensor, grid: Grid, count: int, store: BlockStore, tables: RotationTables, config: LandmarkConfig
) -> Tensor:
    """All at slot 0, then the latest ``top_k`` once more at their true places."""
    keys, largest = store.landmarks(count).to(query.dtype), config.top_k + 1 + int(grid.local.shape[-1])
    at_zero = tables.by_blocks(own_slot(grid, config.top_k), query.dtype, largest)[:, None, None, :, None].rotate(query)
    if store.shared_landmark:
        scores = (at_zero * keys[:, :, None, None, None, 0]).sum(-1, keepdim=True).expand(*query.shape[:-1], count)
    else:
        scores = _against_all(at_zero, keys)
    recent = grid.local_first[..., None] - 1 - torch.arange(min(config.top_k, count), device=query.device)
    places = store.place_of(recent)
    known = (recent >= 0) & ((recent == 0) | (recent >= store.first))
    near = tables.by_blocks(grid.own[..., None] - recent, query.dtype, largest)[:, None, None, :, None]
    rows = torch.arange(len(query), device=query.device)[:, None, None]
    near_keys = store.landmark_keys[rows, :, places].movedim(3, 1).to(query.dtype)
    near_scores = torch.einsum("bgrnwkd,bgnkd->bgrnwk", near.rotate(query[..., None, :]), near_keys)
    spare = torch.nn.functional.pad(scores, (0, 1))
    places = torch.where(known, places, count)[:, None, None, :, None].expand_as(near_scores)
    return spare.scatter_(-1, places, near_scores)[..., :count]


def _against_all(query: Tensor, keys: Tensor) -> Tensor:
    """``(B, G, R, n, W, D)`` with ``(B, G, P, D)`` to ``(B, G, R, n, W, P)``."""
    return torch.unflatten(query.flatten(2, 4) @ keys.transpose(-1, -2), 2, query.shape[2:5])


def choose(scores: Tensor, config: LandmarkConfig, peak: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Chooses ``top_k`` places per query from scaled scores.

    Args:
        scores: ``(B, G, R, n, W, P)``, scaled, ``-inf`` where there is no candidate.
        config: the settings.
        peak: for ``head``, what ``head_peaks`` gave for these queries.

    Returns:
        places and whether each is valid, ``(B, G, R, n, W, K)``, where a dimension of size 1 stands for "the same for
        all" (``R`` under ``group``, ``G`` and ``R`` under ``token``, ``n`` and ``W`` under ``head`` in a local chunk).
    """
    if config.granularity == "token_head":
        return select_top(scores, config.top_k)
    if config.granularity == "head":
        assert peak is not None
        return select_top(peak, config.top_k)
    heads = (2,) if config.granularity == "group" else (1, 2)
    shared = _probabilities(scores).amax(heads, keepdim=True)
    return select_top(shared, config.top_k)


def head_peaks(scores: Tensor, grid: Grid, config: LandmarkConfig, earlier: Tensor | None) -> Tensor:
    """Each query's maximum of landmark probabilities over the tokens that choose with it.

    Args:
        scores: as for ``choose``.
        grid: where these queries stand.
        config: with ``local="chunk"`` all queries of the call choose together, else those of the own block up to the
            query.
        earlier: ``(B, G, R, P)`` maximum over queries of the first own block in earlier calls (zeros where there are
            none), or ``None``.

    Returns:
        ``(B, G, R, n, W, P)``, or ``(B, G, R, 1, 1, P)`` for a local chunk; ``-inf`` where there is no candidate.
    """
    shares = _probabilities(scores).masked_fill(~grid.valid[:, None, None, ..., None], -torch.inf)
    if config.local == "chunk":
        return shares.amax((3, 4), keepdim=True)
    peaks = shares.cummax(4).values
    if earlier is not None:
        earlier = torch.nn.functional.pad(earlier, (0, peaks.shape[-1] - earlier.shape[-1]))
        first = torch.where(peaks[:, :, :, :1] == -torch.inf, peaks[:, :, :, :1], earlier[:, :, :, None, None])
        peaks = torch.cat((torch.maximum(peaks[:, :, :, :1], first), peaks[:, :, :, 1:]), dim=3)
    return peaks


def _probabilities(scores: Tensor) -> Tensor:
    """Softmax over the candidates; ``-inf`` for the others."""
    return torch.softmax(scores, dim=-1).masked_fill(scores == -torch.inf, -torch.inf)
