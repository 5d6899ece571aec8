"""Attention to remembered blocks in plain PyTorch.

It runs on every device, and the Triton kernels are compared with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from landmark.memory.context import LayerContext
from landmark.memory.geometry import QueryGrid
from landmark.memory.positions import SCHEMES
from landmark.memory.storage.block_table import MANY
from landmark.memory.storage.pool import BlockPool, ResidentBlocks
from landmark.rotary import Rotation

TILE_ROWS = 64  # queries that read a block together, at most
QUERY_ROWS = 5  # for each query: it, rotated, its angles, scores, what it reads
PIECE_BYTES = 2**22  # of tiles computed at once: about what a core's cache holds


@dataclass(frozen=True)
class PlacedBlocks:
    """Blocks, and the distances in blocks at which queries read them.

    Attributes:
        blocks: their numbers.
        distances: the same shape; below 0 for no block.
    """

    blocks: Tensor
    distances: Tensor


@dataclass(frozen=True)
class Attended:
    """What attention returns.

    Attributes:
        output: ``(B, G, R, n, W, D)``, of the dtype of the query.
        gates: ``(B, G, R, n, W, K)`` gate weights of the selected blocks, ``K = 0`` for none.
    """

    output: Tensor
    gates: Tensor


def attend(
    query: Tensor,
    grid: QueryGrid,
    shared: PlacedBlocks,
    selected: PlacedBlocks | None,
    context: LayerContext,
) -> Attended:
    """Attends to the own text, to shared blocks and to selected blocks, in one grouped softmax.

    Args:
        query: ``(B, G, R, n, W, D)``, rotated by its offset inside the block.
        grid: where these queries stand.
        shared: ``(B, n, m)`` blocks that all queries of an own block read.
        selected: ``(B, G, R, n, W, K)`` blocks that each query selected; ``G`` and ``R`` may be 1
            for "all the same".
        context: the layer.
    """
    query = query * context.scale
    largest = SCHEMES[context.config.positions].largest_distance(grid, context)
    table = context.tables.distance_table(query.device, query.dtype, largest)
    read_by_all = torch.cat((grid.own[..., None], shared.blocks), dim=-1)
    wanted = None
    if selected is not None:
        wanted = selected.blocks.expand(-1, query.shape[1], *selected.blocks.shape[2:])
    resident = context.store.pool.make_resident(read_by_all, wanted)
    common = resident.shared
    size = context.store.block_size

    own_keys, own_values = _gather(common, common.index[..., 0])
    own = torch.einsum("bgrnwd,bgnld->bgrnwl", query, own_keys)
    slot = torch.arange(size, device=query.device)
    is_seen = (slot <= grid.offsets[..., None]) & (slot < size - 1)
    own = _at_least_float32(own).masked_fill(~is_seen[:, None, None], -torch.inf)

    keys, values = _gather(common, common.index[..., 1:])
    rotation = table.at(shared.distances.clamp(0, largest))
    parts = [_read_shared(query, keys, values, shared.distances, rotation)]
    if selected is not None:
        parts.append(_read_selected(query, resident.selected, selected, context.store.pool, table))

    logits = [own, *(landmarks for landmarks, _ in parts)]
    weights = torch.softmax(torch.cat(logits, dim=-1), dim=-1)
    gates = torch.split(weights, [each.shape[-1] for each in logits], dim=-1)
    output = torch.einsum("bgrnwl,bgnld->bgrnwd", gates[0].to(own_values.dtype), own_values)
    for gate, (_, texts) in zip(gates[1:], parts, strict=True):
        output = output + (gate[..., None] * texts).sum(-2)
    selected_gates = gates[0][..., :0] if selected is None else gates[2]
    return Attended(output.to(query.dtype), selected_gates)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _gather(resident: ResidentBlocks, index: Tensor) -> tuple[Tensor, Tensor]:
    """Copies keys and values ``(B, G, ..., L, D)`` of physical blocks ``(B, ...)``."""
    batch, heads, count, length, dim = resident.keys.shape
    row_heads = torch.arange(batch * heads, device=index.device)
    row_heads = row_heads.view(batch, heads, *[1] * (index.ndim - 1))
    numbers = row_heads * count + index[:, None]
    found = []
    for pool in (resident.keys, resident.values):
        blocks = pool.reshape(-1, length * dim).index_select(0, numbers.flatten())
        found.append(blocks.view(*numbers.shape, length, dim))
    keys, values = found
    return keys, values


def _read_block(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns landmark scores ``(..., M)`` and texts ``(..., M, D)`` of one block each.

    Args:
        query: ``(..., M, D)``, scaled and rotated to the block.
        keys: ``(..., L, D)`` of the block.
        values: likewise.
    """
    scores = _at_least_float32(query @ keys.mT)
    landmarks = scores[..., -1].clone()
    scores[..., -1] = -torch.inf
    return landmarks, torch.softmax(scores, dim=-1).to(values.dtype) @ values


def _read_shared(
    query: Tensor, keys: Tensor, values: Tensor, distances: Tensor, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """Returns landmark scores ``(B, G, R, n, W, m)`` and texts ``(B, G, R, n, W, m, D)``.

    Args:
        query: ``(B, G, R, n, W, D)``, scaled.
        keys: ``(B, G, n, m, L, D)`` of the blocks that an own block's queries share.
        values: likewise.
        distances: ``(B, n, m)``.
        rotation: by these distances.
    """
    rotation = rotation[:, None, :, :, None, None]
    rows = rotation.rotate(query.permute(0, 1, 3, 2, 4, 5)[:, :, :, None])
    landmarks, texts = _read_block(rows.flatten(4, 5), keys, values)
    landmarks = landmarks.masked_fill((distances < 0)[:, None, ..., None], -torch.inf)
    repeats_and_slots = query.shape[2:5:2]
    landmarks = torch.unflatten(landmarks, 4, repeats_and_slots)
    texts = torch.unflatten(texts, 4, repeats_and_slots)
    return landmarks.permute(0, 1, 4, 2, 5, 3), texts.permute(0, 1, 4, 2, 5, 3, 6)


def _read_selected(
    query: Tensor,
    resident: ResidentBlocks | None,
    selected: PlacedBlocks,
    pool: BlockPool,
    table: Rotation,
) -> tuple[Tensor, Tensor]:
    """Returns landmark scores ``(B, G, R, n, W, K)`` and texts ``(B, G, R, n, W, K, D)``.

    Queries that selected the same block read it together.

    Args:
        query: ``(B, G, R, n, W, D)``, scaled.
        resident: the selected blocks on the device, ``None`` to gather them tile by tile.
        selected: their numbers and distances.
        pool: where they are gathered from.
        table: rotations by all distances.
    """
    batch, heads = query.shape[:2]
    dim = query.shape[-1]
    shape = torch.Size((*query.shape[:5], selected.blocks.shape[-1]))
    row_head = torch.arange(batch * heads, device=query.device).view(batch, heads, 1, 1, 1, 1)
    # Tiles are made by block numbers, so that they are the same wherever blocks lie.
    numbers = (row_head * MANY + selected.blocks).expand(shape).flatten()
    distances = selected.distances.expand(shape)
    far = distances.flatten().clamp(min=0)
    queries = query.flatten(0, 4)
    score_dtype = torch.promote_types(queries.dtype, torch.float32)
    landmarks = queries.new_empty(len(numbers) + 1, dtype=score_dtype)
    texts = queries.new_empty(len(numbers) + 1, dim)
    physical = None
    if resident is not None:
        keys = resident.keys.flatten(0, 2)
        values = resident.values.flatten(0, 2)
        physical = row_head * resident.keys.shape[2] + resident.index
        physical = physical.expand(shape).flatten()
    rows_at_once = max(1, PIECE_BYTES // (dim * query.element_size()))
    for pairs, is_real in _tiles(numbers, 2 * pool.block_size, rows_at_once):
        rotation = table.at(far[pairs])
        query_index = (pairs // shape[-1]).flatten()
        rows = queries.index_select(0, query_index).view(*pairs.shape, -1)
        first = pairs[:, 0]
        if physical is None:
            block = numbers[first]
            tile_keys, tile_values = pool.gather(block // MANY, block % MANY)
        else:
            tile_keys = keys.index_select(0, physical[first])
            tile_values = values.index_select(0, physical[first])
        found, text = _read_block(rotation.rotate(rows), tile_keys, tile_values)
        # Fillers go to a row that nobody reads.
        pairs = torch.where(is_real, pairs, len(far)).flatten()
        landmarks.index_copy_(0, pairs, found.flatten())
        texts.index_copy_(0, pairs, text.flatten(0, 1))
    landmarks = landmarks[:-1].view(shape)
    return landmarks.masked_fill(distances < 0, -torch.inf), texts[:-1].view(*shape, -1)


def _tiles(numbers: Tensor, block_rows: int, rows_at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Sorts pairs of a query and a block into tiles of queries that read one block.

    Args:
        numbers: ``(P,)`` block of each pair.
        block_rows: rows of keys and values of a block.
        rows_at_once: rows of all kinds that are computed at once, about.

    Yields:
        of some tiles, about equally long, the pairs ``(t, M)``, and which of these are no fillers
        (the first of a tile never is one).
    """
    if len(numbers) * (block_rows + QUERY_ROWS) <= rows_at_once:
        # There are few pairs, as in decoding: sorting costs more than it saves.
        yield torch.arange(len(numbers), device=numbers.device)[:, None], numbers[:, None] >= 0
        return
    numbers, order = numbers.sort()
    lengths = torch.unique_consecutive(numbers, return_counts=True)[1]
    tiles = (lengths + TILE_ROWS - 1) // TILE_ROWS
    block = torch.arange(len(lengths), device=numbers.device).repeat_interleave(tiles)
    rank = torch.arange(len(block), device=numbers.device) - (tiles.cumsum(0) - tiles)[block]
    start = (lengths.cumsum(0) - lengths)[block] + TILE_ROWS * rank
    length, by_length = (lengths[block] - TILE_ROWS * rank).clamp(max=TILE_ROWS).sort()
    rows = (block_rows + QUERY_ROWS * length).cumsum(0)
    pieces = torch.unique_consecutive(rows // rows_at_once, return_counts=True)[1].tolist()
    by_piece = zip(torch.split(by_length, pieces), torch.split(length, pieces), strict=True)
    for some, lengths_there in by_piece:
        row = torch.arange(int(lengths_there[-1]), device=numbers.device)
        pairs = order[(start[some, None] + row).clamp(max=len(order) - 1)]
        yield pairs, row < lengths_there[:, None]
