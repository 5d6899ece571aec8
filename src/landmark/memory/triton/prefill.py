"""Kernels of a prefill: select blocks, attend to shared blocks, attend to selected blocks.

They compute what ``retrieval.py`` and ``eager.py`` compute in plain PyTorch. Names in kernels are
those of ``primitives.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from landmark.memory.context import LayerContext
from landmark.memory.eager import Attended, PlacedBlocks
from landmark.memory.geometry import QueryGrid
from landmark.memory.positions import SCHEMES, STINGY
from landmark.memory.retrieval import Selection
from landmark.memory.triton.arguments import (
    LEAST_ROWS,
    WARPS,
    distance_rotation,
    dot_precision,
    grid_strides,
    landmark_arguments,
    landmark_stages,
    latest_candidates,
    launch,
    programs,
    scored_landmarks,
    store_arguments,
    tile_rows,
    to_int32,
)
from landmark.memory.triton.primitives import ALIGNED, STRIDES, load_block, old_count, rotate
from landmark.ops.triton.configs import kept_of, on_device, power_of_two
from landmark.ops.triton.primitives import LOG2_E, LOWEST
from landmark.ops.triton.select import NOTHING, merge_top_k, numbers_of, packed

NOWHERE = tl.constexpr(2**31 - 1)
LANDMARK_TILE = 64  # landmark keys that a tile of queries is multiplied with at once
# Numbers of a tile of queries of ``select_kernel``: products in float32 take much shared memory.
SELECT_NUMBERS = 2**12
# Arguments of the kernels for whose values nothing is compiled anew.
NUMBERS = (
    *STRIDES,
    "groups",
    "repeats",
    "n_own",
    "n_width",
    "n_shared",
    "n_index",
    "n_selected",
    "first_kept",
    "most",
)


@triton.jit
def own_block(i_program, groups, repeats, n_own, n_tiles):
    """Row, key/value head, query head of it, own block and tile of a program; neighbours read the
    same keys.
    """
    i_tile = i_program % n_tiles
    i_rest = i_program // n_tiles
    i_repeat = i_rest % repeats
    i_rest = i_rest // repeats
    i_own = i_rest % n_own
    i_rest = i_rest // n_own
    return i_rest // groups, i_rest % groups, i_repeat, i_own, i_tile


@triton.jit(do_not_specialize=NUMBERS)
def select_kernel(
    p_query,
    p_landmark,
    p_cos,
    p_sin,
    p_own,
    p_first,
    p_distance,
    p_selected,
    query_batch,
    query_group,
    query_repeat,
    query_own,
    query_slot,
    landmark_batch,
    landmark_group,
    groups,
    repeats,
    n_own,
    n_width,
    n_index,
    first_kept,
    most,
    scale,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    LANDMARKS: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    N_RECENT: tl.constexpr,
    EQUAL: tl.constexpr,
    KEEP_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The ``TOP_K`` indices of highest landmark score of each query, ascending, -1 for none.

    All landmarks are scored at one distance, but for the latest ``N_RECENT`` candidates, which are
    scored at their own. With ``EQUAL`` all landmarks are the same vector. Candidates are the latest
    ``most`` blocks before ``first``, and block 0 with ``KEEP_FIRST``.
    """
    n_tiles = tl.cdiv(n_width, ROWS)
    i_row, i_group, i_repeat, i_own, i_tile = own_block(
        tl.program_id(0), groups, repeats, n_own, n_tiles
    )
    o_query_slot = i_tile * ROWS + tl.arange(0, ROWS)
    inside = (o_query_slot < n_width)[:, None]
    p_rows = (
        p_query + i_row.to(tl.int64) * query_batch + i_group * query_group + i_repeat * query_repeat
    )
    p_rows += i_own.to(tl.int64) * query_own + (o_query_slot * query_slot)[:, None]
    p_landmark += tl.multiple_of(
        i_row.to(tl.int64) * landmark_batch + i_group.to(tl.int64) * landmark_group, ALIGNED
    )
    own = tl.load(p_own + i_row * n_own + i_own)
    first = tl.load(p_first + i_row * n_own + i_own)
    lowest = first - most
    o_dim = tl.arange(0, PADDED)
    o_k = tl.arange(0, PADDED_K)
    best = tl.full((ROWS, PADDED_K), NOTHING, tl.int64)

    distance = tl.load(p_distance + i_row * n_own + i_own)
    query = rotate(p_rows, inside, p_cos, p_sin, distance, scale, DIM, PADDED, ROTATED, INTERLEAVED)
    if EQUAL:
        landmark = tl.load(p_landmark + o_dim, mask=o_dim < DIM, other=0.0).to(tl.float32)
        same = tl.sum(query * landmark[None, :], axis=1)[:, None]
    last = first - N_RECENT
    n_old = old_count(last, first_kept, n_index)
    for i_index in range(0, n_old, LANDMARKS):
        index = i_index + tl.arange(0, LANDMARKS)
        if EQUAL:
            scores = same + tl.zeros((ROWS, LANDMARKS), tl.float32)
        else:
            p_landmarks = p_landmark + index.to(tl.int64)[:, None] * DIM + o_dim[None, :]
            landmark = tl.load(
                p_landmarks, mask=(index < n_old)[:, None] & (o_dim < DIM)[None, :], other=0.0
            ).to(tl.float32)
            scores = tl.dot(query, tl.trans(landmark), input_precision=PRECISION)
        block = tl.where(index == 0, 0, index + first_kept - 1)
        candidate = (
            (index < n_old) & (block < last) & ((block >= lowest) | (KEEP_FIRST & (block == 0)))
        )
        best = merge_top_k(best, packed(scores, index[None, :], candidate[None, :]), ROWS, PADDED_K)
    if N_RECENT > 0:
        found = tl.full((ROWS, PADDED_K), NOTHING, tl.int64)
        for i_recent in range(0, N_RECENT):
            block = first - 1 - i_recent
            if (block >= 0) & ((block >= lowest) | (KEEP_FIRST & (block == 0))):
                index = tl.where(block == 0, 0, block - first_kept + 1)
                landmark = tl.load(
                    p_landmark + index.to(tl.int64) * DIM + o_dim, mask=o_dim < DIM, other=0.0
                ).to(tl.float32)
                query = rotate(
                    p_rows,
                    inside,
                    p_cos,
                    p_sin,
                    own - block,
                    scale,
                    DIM,
                    PADDED,
                    ROTATED,
                    INTERLEAVED,
                )
                scores = tl.sum(query * landmark[None, :], axis=1)
                here = packed(scores, index, block >= 0)
                found = tl.where((o_k == i_recent)[None, :], here[:, None], found)
        best = merge_top_k(best, found, ROWS, PADDED_K)
    indices = tl.sort(numbers_of(tl.where((o_k < TOP_K)[None, :], best, NOTHING), NOWHERE))
    p_selected += (
        (((i_row * groups + i_group) * repeats + i_repeat).to(tl.int64) * n_own + i_own)
        * n_width
        * TOP_K
    )
    p_selected += o_query_slot[:, None] * TOP_K + o_k[None, :]
    tl.store(
        p_selected, tl.where(indices == NOWHERE, -1, indices), mask=inside & (o_k < TOP_K)[None, :]
    )


@triton.jit(do_not_specialize=NUMBERS)
def attend_shared_kernel(
    p_query,
    p_keys,
    p_values,
    p_cos,
    p_sin,
    p_own,
    p_offset,
    p_shared,
    p_distance,
    p_partial,
    p_lse,
    query_batch,
    query_group,
    query_repeat,
    query_own,
    query_slot,
    store_batch,
    store_group,
    groups,
    repeats,
    n_own,
    n_width,
    n_shared,
    scale,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Output and log-sum-exp (to base 2) over the text of the own block and ``n_shared`` past
    blocks of a tile.
    """
    n_tiles = tl.cdiv(n_width, ROWS)
    i_row, i_group, i_repeat, i_own, i_tile = own_block(
        tl.program_id(0), groups, repeats, n_own, n_tiles
    )
    o_query_slot = i_tile * ROWS + tl.arange(0, ROWS)
    inside = (o_query_slot < n_width)[:, None]
    p_rows = (
        p_query + i_row.to(tl.int64) * query_batch + i_group * query_group + i_repeat * query_repeat
    )
    p_rows += i_own.to(tl.int64) * query_own + (o_query_slot * query_slot)[:, None]
    head = tl.multiple_of(
        i_row.to(tl.int64) * store_batch + i_group.to(tl.int64) * store_group, ALIGNED
    )
    p_keys = p_keys + head
    p_values = p_values + head
    dtype = p_keys.dtype.element_ty
    i_grid = i_row * n_own + i_own
    o_slot = tl.arange(0, WIDTH)[None, :]
    o_dim = tl.arange(0, PADDED)

    offset = tl.load(
        p_offset + i_grid * n_width + o_query_slot, mask=o_query_slot < n_width, other=0
    )
    query = rotate(p_rows, inside, p_cos, p_sin, 0, scale, DIM, PADDED, ROTATED, INTERLEAVED)
    index = tl.load(p_own + i_grid)
    key = load_block(p_keys, index, BLOCK, DIM, PADDED, WIDTH)
    text = tl.dot(query.to(dtype), tl.trans(key), input_precision="ieee") * LOG2_E
    text = tl.where((o_slot <= offset[:, None]) & (o_slot < BLOCK - 1), text, float("-inf"))
    peak = tl.maximum(tl.max(text, axis=1), LOWEST)
    weights = tl.exp2(text - peak[:, None])
    total = tl.sum(weights, axis=1)
    value = load_block(p_values, index, BLOCK, DIM, PADDED, WIDTH)
    out = tl.dot(weights.to(dtype), value, input_precision="ieee")
    for i_shared in range(0, n_shared):
        distance = tl.load(p_distance + i_grid * n_shared + i_shared)
        if distance >= 0:
            index = tl.load(p_shared + i_grid * n_shared + i_shared)
            query = rotate(
                p_rows, inside, p_cos, p_sin, distance, scale, DIM, PADDED, ROTATED, INTERLEAVED
            )
            key = load_block(p_keys, index, BLOCK, DIM, PADDED, WIDTH)
            text = tl.dot(query.to(dtype), tl.trans(key), input_precision="ieee") * LOG2_E
            landmark = tl.sum(tl.where(o_slot == BLOCK - 1, text, 0.0), axis=1)
            text = tl.where(o_slot < BLOCK - 1, text, float("-inf"))
            weights = tl.exp2(text - tl.max(text, axis=1)[:, None])
            higher = tl.maximum(peak, landmark)
            shrink = tl.exp2(peak - higher)
            gate = tl.exp2(landmark - higher)
            weights *= (gate / tl.sum(weights, axis=1))[:, None]
            value = load_block(p_values, index, BLOCK, DIM, PADDED, WIDTH)
            out = tl.dot(weights.to(dtype), value, out * shrink[:, None], input_precision="ieee")
            total = total * shrink + gate
            peak = higher
    total = tl.where(total > 0, total, 1.0)  # where no query stands
    o_query = ((i_row * groups + i_group) * repeats + i_repeat).to(tl.int64) * n_own + i_own
    o_query = o_query * n_width + o_query_slot
    mask = inside & (o_dim < DIM)[None, :]
    tl.store(p_partial + o_query[:, None] * DIM + o_dim[None, :], out / total[:, None], mask=mask)
    tl.store(p_lse + o_query, peak + tl.log2(total), mask=o_query_slot < n_width)


@triton.jit(do_not_specialize=NUMBERS)
def attend_selected_kernel(
    p_query,
    p_keys,
    p_values,
    p_cos,
    p_sin,
    p_selected,
    p_distance,
    p_partial,
    p_lse,
    p_result,
    p_gate,
    query_batch,
    query_group,
    query_repeat,
    query_own,
    query_slot,
    store_batch,
    store_group,
    index_batch,
    index_group,
    index_repeat,
    index_own,
    index_slot,
    index_stride,
    distance_batch,
    distance_group,
    distance_repeat,
    distance_own,
    distance_slot,
    distance_stride,
    groups,
    repeats,
    n_own,
    n_width,
    n_selected,
    scale,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PADDED_K: tl.constexpr,
):
    """Adds the blocks that one query chose to what ``attend_shared_kernel`` left; also their gate
    weights.
    """
    i_row, i_group, i_repeat, i_own, i_slot = own_block(
        tl.program_id(0), groups, repeats, n_own, n_width
    )
    p_row = (
        p_query + i_row.to(tl.int64) * query_batch + i_group * query_group + i_repeat * query_repeat
    )
    p_row += i_own.to(tl.int64) * query_own + i_slot * query_slot + tl.zeros((1, 1), tl.int32)
    p_selected += i_row.to(tl.int64) * index_batch + i_group * index_group + i_repeat * index_repeat
    p_selected += i_own.to(tl.int64) * index_own + i_slot * index_slot
    p_distance += (
        i_row.to(tl.int64) * distance_batch + i_group * distance_group + i_repeat * distance_repeat
    )
    p_distance += i_own.to(tl.int64) * distance_own + i_slot * distance_slot
    head = tl.multiple_of(
        i_row.to(tl.int64) * store_batch + i_group.to(tl.int64) * store_group, ALIGNED
    )
    p_keys = p_keys + head
    p_values = p_values + head
    i_query = ((i_row * groups + i_group) * repeats + i_repeat).to(tl.int64) * n_own + i_own
    i_query = i_query * n_width + i_slot
    o_slot = tl.arange(0, WIDTH)
    o_dim = tl.arange(0, PADDED)
    o_k = tl.arange(0, PADDED_K)

    out = tl.load(p_partial + i_query * DIM + o_dim, mask=o_dim < DIM, other=0.0)
    peak = tl.load(p_lse + i_query)
    total = 1.0
    landmarks = tl.full((PADDED_K,), float("-inf"), tl.float32)
    for i_selected in range(0, n_selected):
        index = tl.load(p_selected + i_selected * index_stride)
        distance = tl.load(p_distance + i_selected * distance_stride)
        inside = (distance >= 0) & tl.full((1, 1), True, tl.int1)
        key = load_block(p_keys, tl.maximum(index, 0), BLOCK, DIM, PADDED, WIDTH)
        value = load_block(p_values, tl.maximum(index, 0), BLOCK, DIM, PADDED, WIDTH)
        query = rotate(
            p_row,
            inside,
            p_cos,
            p_sin,
            tl.maximum(distance, 0),
            scale,
            DIM,
            PADDED,
            ROTATED,
            INTERLEAVED,
        )
        query = query.to(key.dtype).to(tl.float32)
        text = tl.sum(key.to(tl.float32) * query, axis=1) * LOG2_E
        landmark = tl.sum(tl.where(o_slot == BLOCK - 1, text, 0.0), axis=0)
        landmark = tl.where(distance >= 0, landmark, float("-inf"))
        text = tl.where(o_slot < BLOCK - 1, text, float("-inf"))
        weights = tl.exp2(text - tl.max(text, axis=0))
        higher = tl.maximum(peak, landmark)
        shrink = tl.exp2(peak - higher)
        gate = tl.exp2(landmark - higher)
        weights *= gate / tl.sum(weights, axis=0)
        out = out * shrink + tl.sum(weights[:, None] * value.to(tl.float32), axis=0)
        total = total * shrink + gate
        peak = higher
        landmarks = tl.where(o_k == i_selected, landmark, landmarks)
    result = (out / total).to(p_result.dtype.element_ty)
    tl.store(p_result + i_query * DIM + o_dim, result, mask=o_dim < DIM)
    tl.store(
        p_gate + i_query * n_selected + o_k,
        tl.exp2(landmarks - peak) / total,
        mask=o_k < n_selected,
    )


def select(query: Tensor, grid: QueryGrid, candidates: int, context: LayerContext) -> Selection:
    """Selects blocks for every query alone, as ``retrieval.select_per_query``; keeps no scores.

    Args:
        query: ``(B, G, R, n, W, D)``, rotated by its offset inside the block, not scaled.
        grid: where these queries stand.
        candidates: blocks ``0..candidates - 1`` may be selected.
        context: the layer.
    """
    config = context.config
    is_stingy = config.positions == "stingy"
    keys, largest = scored_landmarks(grid, candidates, context)
    distance = STINGY.own_slot(grid, config) if is_stingy else grid.own
    shape = (*query.shape[:5], config.top_k)
    selected = torch.empty(shape, dtype=torch.int32, device=query.device)
    rows = select_rows(query)
    _, groups, repeats, own_blocks, width, dim = query.shape
    with on_device(query.device):
        launch(
            select_kernel,
            (programs(query, rows),),
            p_query=query,
            p_own=to_int32(grid.own),
            p_first=to_int32(grid.local_first),
            p_distance=to_int32(distance),
            p_selected=selected,
            groups=groups,
            repeats=repeats,
            n_own=own_blocks,
            n_width=width,
            n_index=keys.shape[2],
            first_kept=context.store.first,
            most=latest_candidates(config),
            scale=context.scale,
            ROWS=rows,
            LANDMARKS=LANDMARK_TILE,
            TOP_K=config.top_k,
            PADDED_K=kept_of(config.top_k),
            N_RECENT=config.top_k if is_stingy else 0,
            EQUAL=context.store.shared_landmark,
            KEEP_FIRST=config.local == "blocks",
            PRECISION=dot_precision(query),
            num_warps=WARPS,
            num_stages=landmark_stages(LANDMARK_TILE * dim * (keys.itemsize + 4)),
            **grid_strides(query),
            **landmark_arguments(keys),
            **distance_rotation(query, largest, context),
        )
    selected = selected[..., : min(config.top_k, keys.shape[2])]
    blocks = context.store.kept.block_of(selected.clamp(min=0))
    return Selection(blocks, selected >= 0)


def attend(
    query: Tensor,
    grid: QueryGrid,
    shared: PlacedBlocks,
    selected: PlacedBlocks | None,
    context: LayerContext,
) -> Attended:
    """Attends as ``eager.attend``."""
    rows = tile_rows(query)
    _, groups, repeats, own_blocks, width, _ = query.shape
    size = context.store.block_size
    largest = SCHEMES[context.config.positions].largest_distance(grid, context)
    call = {
        "p_query": query,
        "groups": groups,
        "repeats": repeats,
        "n_own": own_blocks,
        "n_width": width,
        "scale": context.scale,
        "BLOCK": size,
        "WIDTH": power_of_two(size),
        "num_warps": WARPS,
        **grid_strides(query),
        **distance_rotation(query, largest, context),
    }
    pool = context.store.pool
    read_by_all = torch.cat((grid.own[..., None], shared.blocks), dim=-1)
    common = pool.make_resident(read_by_all, None).shared
    partial = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    lse = torch.empty(query.shape[:5], dtype=torch.float32, device=query.device)
    with on_device(query.device):
        launch(
            attend_shared_kernel,
            (programs(query, rows),),
            p_own=to_int32(common.index[..., 0]),
            p_offset=to_int32(grid.offsets),
            p_shared=to_int32(common.index[..., 1:]),
            p_distance=to_int32(shared.distances),
            p_partial=partial,
            p_lse=lse,
            n_shared=shared.blocks.shape[-1],
            ROWS=rows,
            **call,
            **store_arguments(common),
        )
    if selected is None:
        return Attended(partial.to(query.dtype), partial.new_empty((*query.shape[:5], 0)))
    blocks = selected.blocks.expand(-1, groups, *selected.blocks.shape[2:])
    own = pool.make_resident(grid.own, blocks).selected
    if own is None:
        own = pool.gather_blocks(blocks)
    index = own.index.int().expand(*query.shape[:5], -1)
    distances = selected.distances.int().expand(*query.shape[:5], -1)
    count = index.shape[-1]
    result = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    gates = torch.empty((*query.shape[:5], count), dtype=torch.float32, device=query.device)
    names = ("batch", "group", "repeat", "own", "slot", "stride")
    with on_device(query.device):
        launch(
            attend_selected_kernel,
            (lse.numel(),),
            p_selected=index,
            p_distance=distances,
            p_partial=partial,
            p_lse=lse,
            p_result=result,
            p_gate=gates,
            n_selected=count,
            PADDED_K=kept_of(count),
            **{f"index_{name}": step for name, step in zip(names, index.stride(), strict=True)},
            **{
                f"distance_{name}": step
                for name, step in zip(names, distances.stride(), strict=True)
            },
            **call,
            **store_arguments(own),
        )
    return Attended(result, gates)


def select_rows(query: Tensor) -> int:
    """Returns the rows of a tile of queries of ``select_kernel``."""
    return max(LEAST_ROWS, min(tile_rows(query), SELECT_NUMBERS // power_of_two(query.shape[-1])))
