"""Launches the kernels: what one layer chooses and reads in one call, in place of a dozen steps of plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from landmark.config import LandmarkConfig
from landmark.memory.plan import Grid
from landmark.memory.positions import RotationTables, own_slot
from landmark.memory.store import BlockStore
from landmark.memory.triton.kernels import choice_kernel, chosen_kernel, shared_kernel
from landmark.ops.triton.configs import kept_of, on_device, power_of_two

ALL_BLOCKS = 2**30
MARKS = 64
MOST_ROWS, LEAST_ROWS = 64, 16
CHOICE_NUMBERS = 2**12
WARPS = 4


def choose_places(
    query: Tensor,
    grid: Grid,
    count: int,
    store: BlockStore,
    tables: RotationTables,
    config: LandmarkConfig,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """What ``choose(landmark_scores(...))`` of ``retrieval.py`` gives under ``token_head``, no scores kept.

    Args:
        query: ``(B, G, R, n, W, D)``, rotated by its place inside the block.
        grid: where these queries stand.
        count: places of the store to choose from.
        store: the layer's blocks.
        tables: rotations.
        config: the settings.
        scale: the softmax scale.

    Returns:
        places, ascending, int32, and whether each is valid, ``(B, G, R, n, W, K)`` with ``K`` of at most ``count``;
        invalid ones come last and hold 0.
    """
    stingy, marks = config.positions == "stingy", store.landmarks(count)
    distance, largest = own_slot(grid, config.top_k), config.top_k + 1 + grid.local.shape[-1]
    if not stingy:
        distance, largest = grid.own, store.first + store.places
        blocks = store.block_of(torch.arange(count, device=query.device))
        marks = tables.by_blocks(blocks, torch.float32, largest).rotate(marks.float())
    chosen = torch.empty((*query.shape[:5], config.top_k), dtype=torch.int32, device=query.device)
    rows = rows_of_choice(query)
    with on_device(query.device):
        choice_kernel[(_programs(query, rows),)](
            query, marks, *_turns(tables, query, largest), *map(_numbers, (grid.own, grid.local_first, distance)),
            chosen, *query.stride()[:5], *marks.stride()[:2], *query.shape[1:5], count, store.first,
            config.max_blocks or ALL_BLOCKS, scale, **_turned(tables, query),
            ROWS=rows, MARKS=MARKS, TOP_K=config.top_k, KEPT=kept_of(config.top_k),
            RECENT=config.top_k if stingy else 0, EQUAL=store.shared_landmark, KEEP_FIRST=config.local == "blocks",
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32x3", num_warps=WARPS,
        )  # fmt: skip
    chosen = chosen[..., : min(config.top_k, count)]
    return chosen.clamp(min=0), chosen >= 0


def attend(
    query: Tensor,
    grid: Grid,
    shared: tuple[Tensor, Tensor],
    chosen: tuple[Tensor, Tensor] | None,
    store: BlockStore,
    tables: RotationTables,
    scale: float,
    largest: int,
) -> tuple[Tensor, Tensor]:
    """As ``landmark.memory.plain.attend``."""
    rows, turns = _rows(query), _turns(tables, query, largest)
    shape = {**_turned(tables, query), "BLOCK": store.block_size, "WIDTH": power_of_two(store.block_size)}
    keys, values, own, past = store.fetch(store.place_of(grid.own)[:, None], shared[0][:, None])
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    lse = torch.empty(query.shape[:5], dtype=torch.float32, device=query.device)
    with on_device(query.device):
        shared_kernel[(_programs(query, rows),)](
            query, keys, values, *turns, *map(_numbers, (own, grid.offsets, past, shared[1])), out, lse,
            *query.stride()[:5], *keys.stride()[:2], *query.shape[1:5], past.shape[-1], scale, **shape, ROWS=rows,
            num_warps=WARPS,
        )  # fmt: skip
        if chosen is None:
            return out.to(query.dtype), out.new_empty((*query.shape[:5], 0))
        keys, values, frames = store.fetch(chosen[0].expand(-1, query.shape[1], *chosen[0].shape[2:]))
        frames, distances = (each.int().expand(*query.shape[:5], -1) for each in (frames, chosen[1]))
        result, count = torch.empty(query.shape, dtype=query.dtype, device=query.device), frames.shape[-1]
        gates = torch.empty((*query.shape[:5], count), dtype=torch.float32, device=query.device)
        chosen_kernel[(lse.numel(),)](
            query, keys, values, *turns, frames, distances, out, lse, result, gates,
            *query.stride()[:5], *keys.stride()[:2], *frames.stride(), *distances.stride(), *query.shape[1:5], count,
            scale, **shape, KEPT=kept_of(count), num_warps=WARPS,
        )  # fmt: skip
    return result, gates


def _turns(tables: RotationTables, query: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    table = tables.blocks(query.device, query.dtype, largest)
    return table.cos.contiguous(), table.sin.contiguous()


def _turned(tables: RotationTables, query: Tensor) -> dict[str, Any]:
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


def _rows(query: Tensor) -> int:
    return max(LEAST_ROWS, min(MOST_ROWS, power_of_two(query.shape[4])))


def _programs(query: Tensor, rows: int) -> int:
    return query.shape[:4].numel() * -(-query.shape[4] // rows)


def _numbers(tensor: Tensor) -> Tensor:
    """As the kernels read them."""
    return tensor.int().contiguous()
