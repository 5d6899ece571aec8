"""Launches the kernels: what one layer chooses and reads in one call, in place of a dozen steps of
plain PyTorch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from landmark.config import LandmarkConfig
from landmark.memory.geometry import QueryGrid
from landmark.memory.positions import RotaryTables, own_slot
from landmark.memory.storage.cached_pool import CachedPool
from landmark.memory.storage.store import BlockStore
from landmark.memory.triton.append import file_kernel
from landmark.memory.triton.decode import CHUNK, best_kernel, read_kernel, score_kernel
from landmark.memory.triton.page_in import copy_kernel, place_kernel
from landmark.memory.triton.prefill import choice_kernel, chosen_kernel, shared_kernel
from landmark.ops.triton.configs import kept_of, on_device, power_of_two

ALL_BLOCKS = 2**30  # more than there are
MARKS = 64
MOST_ROWS = 64
LEAST_ROWS = 16
CHOICE_NUMBERS = 2**12
MARK_STAGES = 3
MARK_BYTES = 3 * 2**14
PARTS = 4
MOST_STACKED = 32  # rows of a product for a query in three parts of bfloat16, and for all queries
WARPS = 4
WAVES = 3  # programs of a multiprocessor that score landmarks
PEAKS = (256, 1024)  # chunks that a choice looks at in one go
READ_STAGES = 1
READ_WARPS = (2, 4)
READ_BYTES = 2**14  # for keys of a block that are no larger, and for others
FILE_WARPS = 1


def select_fused(
    query: Tensor,
    grid: QueryGrid,
    count: int,
    store: BlockStore,
    tables: RotaryTables,
    config: LandmarkConfig,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """What ``choose(landmark_scores(...))`` of ``retrieval.py`` gives under ``token_head``, no
    scores kept.

    Args:
        query: ``(B, G, R, n, W, D)``, rotated by its place inside the block.
        grid: where these queries stand.
        count: places of the store to choose from.
        store: the layer's blocks.
        tables: rotations.
        config: the settings.
        scale: the softmax scale.

    Returns:
        places, ascending, int32, and whether each is valid, ``(B, G, R, n, W, K)`` with ``K`` of at
        most ``count``; invalid ones come last and hold 0.
    """
    stingy = config.positions == "stingy"
    (marks, largest) = _marks(grid, count, store, tables, config)
    distance = own_slot(grid, config.top_k) if stingy else grid.own
    chosen = torch.empty((*query.shape[:5], config.top_k), dtype=torch.int32, device=query.device)
    rows = rows_of_choice(query)
    with on_device(query.device):
        choice_kernel[(_programs(query, rows),)](
            query,
            marks,
            *_turns(tables, query, largest),
            *map(_numbers, (grid.own, grid.local_first, distance)),
            chosen,
            *query.stride()[:5],
            *marks.stride()[:2],
            *query.shape[1:5],
            count,
            store.first,
            _most(config),
            scale,
            **_turned(tables, query),
            ROWS=rows,
            MARKS=MARKS,
            TOP_K=config.top_k,
            KEPT=kept_of(config.top_k),
            RECENT=config.top_k if stingy else 0,
            EQUAL=store.shared_landmark,
            KEEP_FIRST=config.local == "blocks",
            PRECISION=_precision(query),
            num_warps=WARPS,
            num_stages=stages_of_marks(MARKS * query.shape[-1] * (marks.itemsize + 4)),
        )
    chosen = chosen[..., : min(config.top_k, count)]
    return chosen.clamp(min=0), chosen >= 0


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
    """As ``landmark.memory.eager.attend``."""
    rows = _rows(query)
    turns = _turns(tables, query, largest)
    shape = {
        **_turned(tables, query),
        "BLOCK": store.block_size,
        "WIDTH": power_of_two(store.block_size),
    }
    keys, values, own, past = store.fetch(store.place_of(grid.own)[:, None], shared[0][:, None])
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    lse = torch.empty(query.shape[:5], dtype=torch.float32, device=query.device)
    with on_device(query.device):
        shared_kernel[(_programs(query, rows),)](
            query,
            keys,
            values,
            *turns,
            *map(_numbers, (own, grid.offsets, past, shared[1])),
            out,
            lse,
            *query.stride()[:5],
            *keys.stride()[:2],
            *query.shape[1:5],
            past.shape[-1],
            scale,
            **shape,
            ROWS=rows,
            num_warps=WARPS,
        )
        if chosen is None:
            return out.to(query.dtype), out.new_empty((*query.shape[:5], 0))
        keys, values, frames = store.fetch(
            chosen[0].expand(-1, query.shape[1], *chosen[0].shape[2:])
        )
        frames, distances = (
            each.int().expand(*query.shape[:5], -1) for each in (frames, chosen[1])
        )
        result = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        count = frames.shape[-1]
        gates = torch.empty((*query.shape[:5], count), dtype=torch.float32, device=query.device)
        chosen_kernel[(lse.numel(),)](
            query,
            keys,
            values,
            *turns,
            frames,
            distances,
            out,
            lse,
            result,
            gates,
            *query.stride()[:5],
            *keys.stride()[:2],
            *frames.stride(),
            *distances.stride(),
            *query.shape[1:5],
            count,
            scale,
            **shape,
            KEPT=kept_of(count),
            num_warps=WARPS,
        )
    return result, gates


def file(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: QueryGrid,
    store: BlockStore,
    tables: RotaryTables,
) -> Tensor:
    """Files a call of one own block in each row, but does not finish blocks, in one launch.

    Args:
        query: ``(B, G, R, W, D)``, not rotated.
        key: ``(B, G, W, D)``, not rotated.
        value: ``(B, G, W, D)``.
        grid: where these queries stand.
        store: the layer's blocks, reserved and opened.
        tables: rotations.

    Returns:
        the queries, rotated by their place inside the block, ``(B, G, R, 1, W, D)``.
    """
    near = store.near
    (batch, groups, repeats, width, dim) = query.shape
    rotation = tables.offsets(query.device, query.dtype)
    heads = groups * repeats
    turned = torch.empty(
        (batch, groups, repeats, 1, width, dim), dtype=query.dtype, device=query.device
    )
    given = [
        each if each.stride(-1) == 1 else each.contiguous()
        for each in (query.flatten(1, 2), key, value)
    ]
    ring = near.recent.shape[1] if isinstance(near, CachedPool) else 0
    with on_device(query.device):
        file_kernel[(heads + groups, width, batch)](
            *given,
            rotation.cos,
            rotation.sin,
            grid.own,
            grid.offsets,
            grid.valid,
            turned,
            near.keys,
            near.values,
            store.landmark_keys,
            *(step for each in given for step in each.stride()[:3]),
            *near.keys.stride()[:2],
            *store.landmark_keys.stride()[:2],
            groups,
            heads,
            width,
            ring,
            store.first,
            **_turned(tables, query),
            BLOCK=store.block_size,
            SHARED=store.shared_landmark,
            FETCHED=store.fetches,
            num_warps=FILE_WARPS,
        )
    return turned


def decode(
    query: Tensor,
    grid: QueryGrid,
    count: int,
    store: BlockStore,
    tables: RotaryTables,
    config: LandmarkConfig,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``select_fused`` and ``attend`` give, for few queries of one own block in each row, in
    two launches.

    A third chooses where blocks have to be fetched before they are read.

    Args:
        query: ``(B, G, R, 1, W, D)``, rotated by its place inside the block.
        grid: where these queries stand.
        count: places of the store to choose from.
        store: the layer's blocks.
        tables: rotations.
        config: the settings.
        scale: the softmax scale.

    Returns:
        the output ``(B, W, H, D)``, of the dtype of ``query``; the chosen places, ascending, int32,
        -1 for none, and their gate weights, ``(B, G, R, 1, W, K)`` with ``K`` of at most ``count``.
    """
    stingy = config.positions == "stingy"
    (batch, groups, repeats, _, width, dim) = query.shape
    kept = kept_of(config.top_k)
    items = config.top_k + 1 + grid.local.shape[-1]
    largest = items if stingy else store.first + store.places
    turns = _turns(tables, query, largest)
    choice = _scored(query, grid, count, store, tables, config, scale)
    chunks = choice[0].shape[-1] // CHUNK.value
    shape = {"TOP_K": config.top_k, "KEPT": kept, "RECENT": config.top_k if stingy else 0}
    shape["PEAKS"] = next((each for each in (kept, PEAKS[0]) if chunks <= each), PEAKS[1])
    chosen = torch.empty((*query.shape[:5], config.top_k), dtype=torch.int32, device=query.device)
    gates = torch.empty(chosen.shape, dtype=torch.float32, device=query.device)
    part = torch.empty(
        (chosen[..., 0].numel(), items, dim), dtype=torch.float32, device=query.device
    )
    lse = part.new_empty(part.shape[:2])
    result = query.new_empty(batch, width, groups * repeats, dim)
    with on_device(query.device):
        if store.fetches:
            best_kernel[(len(part),)](
                *choice[:3],
                grid.local_first,
                chosen,
                groups,
                repeats,
                width,
                count,
                chunks,
                store.first,
                **shape,
                num_warps=WARPS,
            )
        arenas = _arenas(store, grid, chosen)
        read_kernel[(repeats * width, len(part) // (repeats * width), items)](
            query,
            *arenas,
            *turns,
            grid.own,
            grid.local_first,
            grid.offsets,
            *choice[:3],
            part,
            lse,
            choice[3],
            chosen,
            gates,
            result,
            *_strides(query),
            *arenas[0].stride()[:2],
            *arenas[2].stride()[:2],
            groups,
            width,
            count,
            chunks,
            items,
            store.first,
            scale,
            **_turned(tables, query),
            **shape,
            BLOCK=store.block_size,
            WIDTH=power_of_two(store.block_size),
            STINGY=stingy,
            ITEMS=power_of_two(items),
            FETCHED=store.fetches,
            num_warps=read_warps(store.block_size * dim * query.itemsize),
            num_stages=READ_STAGES,
        )
    found = slice(min(config.top_k, count))
    return result, chosen[..., found], gates[..., found]


def _scored(
    query: Tensor,
    grid: QueryGrid,
    count: int,
    store: BlockStore,
    tables: RotaryTables,
    config: LandmarkConfig,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores by place, the best of each chunk, those of the latest blocks; and room to count what
    has arrived.
    """
    stingy = config.positions == "stingy"
    (batch, groups, repeats, _, width, _) = query.shape
    queries = repeats * width
    chunks = -(-count // CHUNK.value)
    kept = kept_of(config.top_k)
    marks, largest = _marks(grid, count, store, tables, config)
    scores = torch.empty(
        (batch, groups, queries, chunks * CHUNK.value), dtype=torch.float32, device=query.device
    )
    peaks = scores.new_empty((*scores.shape[:3], chunks))
    recent = scores.new_empty((*scores.shape[:3], kept))
    arrived = torch.empty(scores.shape[:3], dtype=torch.int32, device=query.device)
    precision = "parts" if marks.dtype == torch.bfloat16 else _precision(query)
    parts = 1
    if precision == "parts" and PARTS * queries <= MOST_STACKED and not store.shared_landmark:
        parts = PARTS
    rows = max(LEAST_ROWS, parts * power_of_two(queries))
    each = -(-chunks * batch * groups // (WAVES * _multiprocessors(query.device)))
    splits = -(-chunks // each)
    with on_device(query.device):
        score_kernel[(batch * groups * (splits + stingy * queries),)](
            query,
            marks,
            *_turns(tables, query, largest),
            grid.own,
            grid.local_first,
            scores,
            peaks,
            recent,
            arrived,
            *_strides(query),
            *marks.stride()[:2],
            groups,
            repeats,
            width,
            count,
            chunks,
            splits,
            each,
            store.first,
            _most(config),
            scale,
            **_turned(tables, query),
            ROWS=rows,
            QUERIES=rows // parts,
            KEPT=kept,
            RECENT=config.top_k if stingy else 0,
            EQUAL=store.shared_landmark,
            KEEP_FIRST=config.local == "blocks",
            PRECISION=precision,
            num_warps=WARPS,
            num_stages=stages_of_marks(CHUNK.value * marks.shape[-1] * marks.itemsize),
        )
    return scores, peaks, recent, arrived


def _arenas(store: BlockStore, grid: QueryGrid, chosen: Tensor) -> tuple[Tensor, ...]:
    """Keys and values of the own and local blocks, of the chosen ones, and the frame of each item
    of a query.
    """
    if not store.fetches:
        keys, values = store.fetch()
        return keys, values, keys, values, chosen
    brought = _bring(store, grid, chosen)
    if brought is not None:
        return brought
    near = grid.own[..., None] - torch.arange(1 + grid.local.shape[-1], device=grid.own.device)
    keys, values, near_frames = store.fetch(store.place_of(near.clamp(min=0))[:, None])
    far_keys, far_values, far_frames = store.fetch(chosen.clamp(min=0))
    frames = torch.cat(
        (far_frames, near_frames[:, :, None, :, None].expand(*chosen.shape[:5], -1)), dim=-1
    )
    return keys, values, far_keys, far_values, _numbers(frames)


def _bring(store: BlockStore, grid: QueryGrid, chosen: Tensor) -> tuple[Tensor, ...] | None:
    """As ``_arenas``, by kernels, where all blocks lie in the memory of the CPU and the hot frames
    hold the chosen.
    """
    near = store.near
    (batch, groups, *_, top_k) = chosen.shape
    wanted = chosen[0, 0].numel()
    items = top_k + 1 + grid.local.shape[-1]
    if not isinstance(near, CachedPool) or wanted > near.hot.shape[1]:
        return None
    addresses = near.shelf.addresses(chosen.device)
    if addresses is None:
        return None
    frames = chosen.new_empty((*chosen.shape[:5], items))
    missing = torch.empty_like(chosen)
    size = near.keys[0, 0, 0].numel()
    hot = near.hot.shape[1]
    ring = near.recent.shape[1]
    with on_device(chosen.device):
        place_kernel[(batch * groups,)](
            chosen,
            grid.own,
            near.recent,
            near.hot,
            near.asked,
            near.counted,
            frames,
            missing,
            groups,
            wanted,
            items,
            hot,
            ring,
            items - top_k,
            store.first,
            TOP_K=top_k,
            SIZE=power_of_two(wanted + hot),
            num_warps=WARPS,
        )
        copy_kernel[(2 * missing.numel(),)](
            chosen,
            missing,
            addresses,
            near.keys,
            near.values,
            groups,
            wanted,
            batch,
            near.shelf.length,
            store.first,
            near.keys.stride(1),
            SIZE=size,
            WIDTH=power_of_two(size),
            num_warps=WARPS,
        )
    return near.keys, near.values, near.keys, near.values, frames


def _marks(
    grid: QueryGrid, count: int, store: BlockStore, tables: RotaryTables, config: LandmarkConfig
) -> tuple[Tensor, int]:
    """Landmark keys as they are scored, and a distance that none of them exceeds."""
    marks = store.landmarks(count)
    if config.positions == "stingy":
        return marks, config.top_k + 1 + grid.local.shape[-1]
    largest = store.first + store.places
    blocks = store.block_of(torch.arange(count, device=marks.device))
    return tables.by_blocks(blocks, torch.float32, largest).rotate(marks.float()), largest


def _most(config: LandmarkConfig) -> int:
    """How many of the latest older blocks are candidates; 0 leaves block 0 alone."""
    return ALL_BLOCKS if config.max_blocks is None else config.max_blocks


def _precision(query: Tensor) -> str:
    return "ieee" if query.dtype == torch.float32 else "tf32x3"


def _strides(query: Tensor) -> tuple[int, int, int, int]:
    """Strides of row, key/value head, query head of it and place."""
    row, group, repeat, _, place, _ = query.stride()
    return row, group, repeat, place


def read_warps(size: int) -> int:
    """Returns how many warps ``read_kernel`` has for keys of a block of ``size`` bytes."""
    return READ_WARPS[size > READ_BYTES]


@cache
def _multiprocessors(device: torch.device) -> int:
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )


def _turns(tables: RotaryTables, query: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    table = tables.blocks(query.device, query.dtype, largest)
    return table.cos.contiguous(), table.sin.contiguous()


def _turned(tables: RotaryTables, query: Tensor) -> dict[str, Any]:
    dim = query.shape[-1]
    return {
        "DIM": dim,
        "PADDED": power_of_two(dim),
        "TURNED": len(tables.rotary.frequencies),
        "PAIRS": tables.rotary.interleaved,
    }


def rows_of_choice(query: Tensor) -> int:
    """Returns the rows of a tile of the choice: products in float32 take much shared memory."""
    return max(LEAST_ROWS, min(_rows(query), CHOICE_NUMBERS // power_of_two(query.shape[-1])))


def stages_of_marks(size: int) -> int:
    """Returns how many stages a loop over tiles of landmarks has, for such of ``size`` bytes with
    any copy in float32.

    Two large tiles on their way at once would exceed the 99 KiB of shared memory of some cards.
    """
    return MARK_STAGES if size <= MARK_BYTES else 1


def _rows(query: Tensor) -> int:
    return max(LEAST_ROWS, min(MOST_ROWS, power_of_two(query.shape[4])))


def _programs(query: Tensor, rows: int) -> int:
    return query.shape[:4].numel() * -(-query.shape[4] // rows)


def _numbers(tensor: Tensor) -> Tensor:
    """As the kernels read them."""
    return tensor.int().contiguous()
