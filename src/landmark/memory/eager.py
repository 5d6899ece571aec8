"""Attention to what is remembered in plain PyTorch: it runs everywhere, and the kernels are held to
it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from landmark.memory.geometry import QueryGrid
from landmark.memory.positions import RotaryTables
from landmark.memory.storage.store import BlockStore

TILE_ROWS = 64  # queries that read a block together, at most
QUERY_ROWS = 5  # for each query: it, turned, its angles, scores, what it reads
PIECE_BYTES = 2**22  # of tiles computed at once: about what a core's cache holds


def attend(
    query: Tensor,
    grid: QueryGrid,
    shared: tuple[Tensor, Tensor],
    chosen: tuple[Tensor, Tensor] | None,
    store: BlockStore,
    tables: RotaryTables,
    scale: float,
    largest: int,
) -> tuple[Tensor, Tensor]:
    """Own text, blocks that all queries of an own block share, and blocks that each query chose, in
    one gate softmax.

    Args:
        query: ``(B, G, R, n, W, D)``, rotated by its place inside the block.
        grid: where these queries stand.
        shared: places in the store ``(B, n, m)`` and distances in blocks from the own block, below
            0 for none.
        chosen: places ``(B, G, R, n, W, K)`` and distances, likewise; ``G`` and ``R`` may be 1 for
            "all the same".
        store: the layer's blocks.
        tables: rotations.
        scale: the softmax scale.
        largest: a distance that none of these exceeds.

    Returns:
        the output, shape and dtype of ``query``, and ``(B, G, R, n, W, K)`` gate weights of the
        chosen blocks (``K = 0`` where there are none).
    """
    query = query * scale
    size = store.block_size
    keys, values = store.gather(store.place_of(grid.own)[:, None])
    own = torch.einsum("bgrnwd,bgnld->bgrnwl", query, keys)
    place = torch.arange(size, device=query.device)
    seen = (place <= grid.offsets[..., None]) & (place < size - 1)
    own = _at_least_float32(own).masked_fill(~seen[:, None, None], -torch.inf)
    parts = [_shared(query, *shared, store, tables, largest)]
    if chosen is not None:
        places, distances = (each.expand(*query.shape[:5], -1) for each in chosen)
        parts.append(_chosen(query, places, distances, store, tables, largest))
    logits = [own, *(marks for marks, _ in parts)]
    weights = torch.softmax(torch.cat(logits, dim=-1), dim=-1)
    gates = torch.split(weights, [each.shape[-1] for each in logits], dim=-1)
    output = torch.einsum("bgrnwl,bgnld->bgrnwd", gates[0].to(values.dtype), values)
    for gate, (_, texts) in zip(gates[1:], parts, strict=True):
        output = output + (gate[..., None] * texts).sum(-2)
    return output.to(query.dtype), gates[0][..., :0] if chosen is None else gates[2]


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _read(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Landmark scores ``(..., M)`` and what is read of the text ``(..., M, D)`` by queries of one
    block.

    Args:
        query: ``(..., M, D)``, scaled and turned to the block.
        keys: ``(..., L, D)`` of the block.
        values: likewise.
    """
    scores = _at_least_float32(query @ keys.mT)
    marks = scores[..., -1].clone()
    scores[..., -1] = -torch.inf
    return marks, torch.softmax(scores, dim=-1).to(values.dtype) @ values


def _shared(
    query: Tensor,
    places: Tensor,
    distances: Tensor,
    store: BlockStore,
    tables: RotaryTables,
    largest: int,
) -> tuple[Tensor, Tensor]:
    """Landmark scores ``(B, G, R, n, W, m)`` and texts ``(B, G, R, n, W, m, D)`` of blocks ``(B, n,
    m)``.
    """
    turned = tables.by_blocks(distances, query.dtype, largest)[:, None, :, :, None, None]
    rows = turned.rotate(query.permute(0, 1, 3, 2, 4, 5)[:, :, :, None])
    marks, texts = _read(rows.flatten(4, 5), *store.gather(places[:, None]))
    marks = marks.masked_fill((distances < 0)[:, None, ..., None], -torch.inf)
    marks, texts = (torch.unflatten(x, 4, query.shape[2:5:2]) for x in (marks, texts))
    return marks.permute(0, 1, 4, 2, 5, 3), texts.permute(0, 1, 4, 2, 5, 3, 6)


def _chosen(
    query: Tensor,
    places: Tensor,
    distances: Tensor,
    store: BlockStore,
    tables: RotaryTables,
    largest: int,
) -> tuple[Tensor, Tensor]:
    """Landmark scores ``(B, G, R, n, W, K)`` and texts ``(B, G, R, n, W, K, D)`` of blocks that
    each query chose.

    Queries that chose the same block read it together.
    """
    numbers = store.numbered(places).flatten()
    flat = query.flatten(0, 4)
    far = distances.flatten()
    marks = flat.new_empty(len(numbers) + 1, dtype=torch.promote_types(flat.dtype, torch.float32))
    texts = flat.new_empty(len(numbers) + 1, query.shape[-1])
    rows_at_once = max(1, PIECE_BYTES // (query.shape[-1] * query.element_size()))
    for pairs, there in _tiles(numbers, 2 * store.block_size, rows_at_once):
        turned = tables.by_blocks(far[pairs], query.dtype, largest)
        rows = flat.index_select(0, (pairs // places.shape[-1]).flatten()).view(*pairs.shape, -1)
        mark, text = _read(turned.rotate(rows), *store.take(numbers[pairs[:, 0]]))
        pairs = torch.where(
            there, pairs, len(far)
        ).flatten()  # fillers go to a row that nobody reads
        marks.index_copy_(0, pairs, mark.flatten())
        texts.index_copy_(0, pairs, text.flatten(0, 1))
    marks = marks[:-1].view(places.shape)
    texts = texts[:-1].view(*places.shape, -1)
    return marks.masked_fill(distances < 0, -torch.inf), texts


def _tiles(numbers: Tensor, fetched: int, at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Sorts pairs of a query and a block into tiles, each of up to ``TILE_ROWS`` queries that read
    one block.

    Args:
        numbers: ``(P,)`` block of each pair.
        fetched: rows of keys and values of a block.
        at_once: rows of all kinds that are computed at once, about.

    Yields:
        of some tiles, about equally long, the pairs ``(t, M)``, and which of these are no fillers
        (never the first).
    """
    if (
        len(numbers) * (fetched + QUERY_ROWS) <= at_once
    ):  # few, as in generation: sorting costs more than it saves
        yield torch.arange(len(numbers), device=numbers.device)[:, None], numbers[:, None] >= 0
        return
    numbers, order = numbers.sort()
    lengths = torch.unique_consecutive(numbers, return_counts=True)[1]
    tiles = (lengths + TILE_ROWS - 1) // TILE_ROWS
    block = torch.arange(len(lengths), device=numbers.device).repeat_interleave(tiles)
    rank = torch.arange(len(block), device=numbers.device) - (tiles.cumsum(0) - tiles)[block]
    start = (lengths.cumsum(0) - lengths)[block] + TILE_ROWS * rank
    length, by_length = (lengths[block] - TILE_ROWS * rank).clamp(max=TILE_ROWS).sort()
    rows = (fetched + QUERY_ROWS * length).cumsum(0)
    pieces = torch.unique_consecutive(rows // at_once, return_counts=True)[1].tolist()
    for some, short in zip(
        torch.split(by_length, pieces), torch.split(length, pieces), strict=True
    ):
        row = torch.arange(int(short[-1]), device=numbers.device)
        pairs = order[(start[some, None] + row).clamp(max=len(order) - 1)]
        yield pairs, row < short[:, None]
