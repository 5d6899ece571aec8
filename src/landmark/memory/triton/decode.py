"""Kernels of a decode step: score landmarks, select, attend; few queries, one own block a row.

``score_kernel`` scores all landmarks, once for the query heads of a key/value head. No program
selects while it scores: it writes each score and the best score of each ``CHUNK``. The best
``PADDED_K`` scores of all lie in the ``PADDED_K`` chunks whose own best are highest, so a selection
looks at few numbers, however long the memory is. These are not sorted either: counting how many
reach a bound finds the bound that just the best reach.

``decode_attention_kernel`` is split-K attention. Each selected block, the own block and each local
block are a *work item*, with a program each. The last program of a query to finish reduces the
partial results in the order of the items, so that the sum is the same in every run. Where blocks
are on the device it selects as well; where they have to be paged in, ``top_k_kernel`` selects
before.

Names are those of ``primitives.py``. Queries ``(B, G, R, W)`` are numbered in that order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from landmark.memory.context import LayerContext
from landmark.memory.geometry import QueryGrid
from landmark.memory.positions import SCHEMES
from landmark.memory.storage.block_range import BlockRange
from landmark.memory.storage.pool import ResidentBlocks
from landmark.memory.triton.arguments import (
    LEAST_ROWS,
    WARPS,
    distance_rotation,
    dot_precision,
    landmark_arguments,
    landmark_stages,
    latest_candidates,
    launch,
    multiprocessors,
    scored_landmarks,
    store_arguments,
    to_int32,
)
from landmark.memory.triton.page_in import page_in
from landmark.memory.triton.primitives import (
    ALIGNED,
    STRIDES,
    load_block,
    load_queries,
    load_rotation,
    old_count,
    rotate,
)
from landmark.ops.triton.configs import kept_of, on_device, power_of_two
from landmark.ops.triton.primitives import LOG2_E

CHUNK = tl.constexpr(64)  # landmarks
REDUCED_AT_ONCE = tl.constexpr(32)  # items at once
LOWEST = tl.constexpr(-0x7F800000)  # of a finite score, as ``ordered``
PARTS = 4  # rows of a product for each query whose three bfloat16 parts are stacked
MOST_STACKED = 32  # such rows of all queries
WAVES = 3  # programs of a multiprocessor that score landmarks
PEAKS = (256, 1024)  # chunks that a selection looks at in one go
DECODE_STAGES = 1
FEW_WARPS = 2  # of a program that attends to a block of few bytes
FEW_WARPS_BYTES = 2**14  # keys of a block that so few warps read, at most
# Arguments of the kernels for whose values nothing is compiled anew.
NUMBERS = (
    *STRIDES,
    "groups",
    "repeats",
    "n_width",
    "n_index",
    "n_chunks",
    "n_splits",
    "n_each",
    "n_items",
    "first_kept",
    "most",
)


@triton.jit
def latest(first, first_kept, PADDED_K: tl.constexpr, N_RECENT: tl.constexpr):
    """The latest ``N_RECENT`` blocks before ``first``, ascending, and their indices (PADDED_K,)."""
    block = first - N_RECENT + tl.arange(0, PADDED_K)
    return block, tl.where(block == 0, 0, block - first_kept + 1)


@triton.jit
def score_recent(
    p_row,
    p_landmark,
    p_cos,
    p_sin,
    p_recent,
    own,
    first,
    first_kept,
    lowest,
    scale,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PADDED_K: tl.constexpr,
    N_RECENT: tl.constexpr,
    KEEP_FIRST: tl.constexpr,
):
    """Scores (PADDED_K,) of one query and the latest ``N_RECENT`` candidates, each at its own
    distance; -inf for none.
    """
    o_k = tl.arange(0, PADDED_K)
    o_dim = tl.arange(0, PADDED)
    block, index = latest(first, first_kept, PADDED_K, N_RECENT)
    candidate = (o_k < N_RECENT) & (block >= 0) & ((block >= lowest) | (KEEP_FIRST & (block == 0)))
    p_rows = p_row + tl.zeros((PADDED_K, 1), tl.int32)
    distance = tl.where(candidate, own - block, 0)[:, None]
    query = rotate(
        p_rows, candidate[:, None], p_cos, p_sin, distance, scale, DIM, PADDED, ROTATED, INTERLEAVED
    )
    p_landmarks = p_landmark + index.to(tl.int64)[:, None] * DIM + o_dim[None, :]
    landmark = tl.load(p_landmarks, mask=candidate[:, None] & (o_dim < DIM)[None, :], other=0.0).to(
        tl.float32
    )
    tl.store(p_recent + o_k, tl.where(candidate, tl.sum(query * landmark, axis=1), float("-inf")))


@triton.jit
def bfloat16_parts(query):
    """Three parts in bfloat16 whose sum is ``query`` exactly."""
    high = query.to(tl.bfloat16)
    middle = (query - high.to(tl.float32)).to(tl.bfloat16)
    return high, middle, (query - high.to(tl.float32) - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit(do_not_specialize=NUMBERS)
def score_kernel(
    p_query,
    p_landmark,
    p_cos,
    p_sin,
    p_own,
    p_first,
    p_score,
    p_peak,
    p_recent,
    p_done,
    query_batch,
    query_group,
    query_repeat,
    query_slot,
    landmark_batch,
    landmark_group,
    groups,
    repeats,
    n_width,
    n_index,
    n_chunks,
    n_splits,
    n_each,
    first_kept,
    most,
    scale,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    PADDED_K: tl.constexpr,
    N_RECENT: tl.constexpr,
    EQUAL: tl.constexpr,
    KEEP_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of the landmarks of one row and key/value head, for all its queries; candidates as in
    ``select_kernel``.

    Each of ``n_splits`` programs walks over ``n_each`` chunks. A further one for each query scores
    the latest ``N_RECENT`` candidates at their own distances. Also sets what has arrived of each
    query to 0. ``QUERIES`` holds the queries, ``ROWS`` is that or four times as much: landmarks in
    bfloat16 are multiplied with three ``parts`` of them.
    """
    n_queries = repeats * n_width
    n_recent = n_queries if N_RECENT > 0 else 0
    n_programs = n_splits + n_recent
    i_split = tl.program_id(0) % n_programs - n_recent
    i_head = (tl.program_id(0) // n_programs).to(tl.int64)
    i_row = i_head // groups
    p_query += i_row * query_batch + i_head % groups * query_group
    p_landmark += tl.multiple_of(i_row * landmark_batch + i_head % groups * landmark_group, ALIGNED)
    own = tl.load(p_own + i_row).to(tl.int32)
    first = tl.load(p_first + i_row).to(tl.int32)
    lowest = first - most
    o_dim = tl.arange(0, PADDED)
    if i_split >= 0:
        last = first - N_RECENT
        n_old = old_count(first - N_RECENT, first_kept, n_index)
        o_query = tl.arange(0, QUERIES)
        inside = o_query < n_queries
        if i_split == 0:
            tl.store(p_done + i_head * n_queries + o_query, 0, mask=inside)
        o_row = tl.arange(0, ROWS) % QUERIES
        part = tl.arange(0, ROWS)[:, None] // QUERIES
        p_rows = (
            p_query + ((o_row // n_width) * query_repeat + (o_row % n_width) * query_slot)[:, None]
        )
        distance = own + (N_RECENT + 1 - first if N_RECENT > 0 else 0)
        real = (o_row < n_queries)[:, None]
        query = rotate(
            p_rows, real, p_cos, p_sin, distance, scale, DIM, PADDED, ROTATED, INTERLEAVED
        )
        if EQUAL:
            landmark = tl.load(p_landmark + o_dim, mask=o_dim < DIM, other=0.0).to(tl.float32)
            same = tl.sum(query * landmark[None, :], axis=1)[:, None]
        if PRECISION == "parts":
            high, middle, low = bfloat16_parts(query)
            if ROWS > QUERIES:  # rows of one product; those of the last quarter are 0
                low = tl.where(part == 2, low, 0.0)
                query = tl.where(part == 0, middle, tl.where(part == 1, high, low))
        begin = i_split * n_each
        for i_chunk in range(begin, tl.minimum(begin + n_each, tl.cdiv(n_old, CHUNK))):
            index = i_chunk * CHUNK + tl.arange(0, CHUNK)
            if EQUAL:
                scores = same + tl.zeros((QUERIES, CHUNK), tl.float32)
            else:
                p_landmarks = p_landmark + index.to(tl.int64)[:, None] * DIM + o_dim[None, :]
                landmark = tl.load(
                    p_landmarks, mask=(index < n_old)[:, None] & (o_dim < DIM)[None, :], other=0.0
                )
                if ROWS > QUERIES:
                    scores = tl.dot(query, tl.trans(landmark))
                    scores = tl.sum(tl.reshape(scores, (ROWS // QUERIES, QUERIES, CHUNK)), axis=0)
                elif PRECISION == "parts":
                    scores = tl.dot(low, tl.trans(landmark))
                    scores = tl.dot(middle, tl.trans(landmark), scores)
                    scores = tl.dot(high, tl.trans(landmark), scores)
                else:
                    scores = tl.dot(
                        query, tl.trans(landmark.to(tl.float32)), input_precision=PRECISION
                    )
            block = tl.where(index == 0, 0, index + first_kept - 1)
            candidate = (
                (index < n_old) & (block < last) & ((block >= lowest) | (KEEP_FIRST & (block == 0)))
            )
            scores = tl.where(candidate[None, :], scores, float("-inf"))
            o_score = (i_head * n_queries + o_query)[:, None] * (n_chunks * CHUNK) + index[None, :]
            tl.store(p_score + o_score, scores, mask=inside[:, None])
            p_peaks = p_peak + (i_head * n_queries + o_query) * n_chunks + i_chunk
            tl.store(p_peaks, tl.max(scores, axis=1), mask=inside)
    else:
        i_query = i_split + n_queries
        p_row = p_query + (i_query // n_width) * query_repeat + (i_query % n_width) * query_slot
        p_recent += (i_head * n_queries + i_query) * PADDED_K
        score_recent(
            p_row,
            p_landmark,
            p_cos,
            p_sin,
            p_recent,
            own,
            first,
            first_kept,
            lowest,
            scale,
            DIM,
            PADDED,
            ROTATED,
            INTERLEAVED,
            PADDED_K,
            N_RECENT,
            KEEP_FIRST,
        )


@triton.jit
def ordered(score):
    """Integers in the order of float32 scores."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def score_of(order):
    """The inverse of ``ordered``."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def reached(earlier, later, bound):
    """How many of both are at least ``bound``."""
    return tl.sum((earlier >= bound).to(tl.int32), axis=0) + tl.sum(
        (later >= bound).to(tl.int32), axis=0
    )


@triton.jit
def flag_best(earlier, later, low, high, TOP_K: tl.constexpr):
    """Which of the scores ``earlier`` and ``later``, in order of index, are the ``TOP_K`` best, as
    0 and 1; how many.

    Among equals the first win; ``-inf`` is no score. ``low`` is reached by at least ``TOP_K``, or
    is ``-inf``; none exceeds ``high``. Nothing is sorted: what lies between two bounds is halved
    until just ``TOP_K`` reach the lower.
    """
    low = tl.maximum(ordered(low), LOWEST)
    high = ordered(high) + 1
    n_reached = reached(earlier, later, score_of(low))
    while (n_reached > TOP_K) & (low + 1 < high):
        middle = (low & high) + ((low ^ high) >> 1)  # their sum would overflow
        n_middle = reached(earlier, later, score_of(middle))
        enough = n_middle >= TOP_K
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        n_reached = tl.where(enough, n_middle, n_reached)
    bound = score_of(low)
    surplus = n_reached - TOP_K
    best_earlier = (earlier >= bound).to(tl.int32)
    best_later = (later >= bound).to(tl.int32)
    if surplus > 0:  # the last of those that equal the bound
        same_earlier = (earlier == bound).to(tl.int32)
        same_later = (later == bound).to(tl.int32)
        n_earlier = tl.sum(same_earlier, axis=0)
        n_later = tl.sum(same_later, axis=0)
        n_same = n_earlier + n_later - surplus
        best_earlier -= same_earlier * (tl.cumsum(same_earlier, axis=0) > n_same).to(tl.int32)
        best_later -= same_later * (n_earlier + tl.cumsum(same_later, axis=0) > n_same).to(tl.int32)
    return best_earlier, best_later, tl.minimum(n_reached, TOP_K)


@triton.jit
def best_chunks(p_peak, n_used, n_chunks, PADDED_K: tl.constexpr, PEAKS: tl.constexpr):
    """The chunks (PADDED_K,) of the highest of ``n_used`` peaks, ascending, then numbers from
    ``n_used`` on.
    """
    o_k = tl.arange(0, PADDED_K)
    chunk = o_k
    for i_chunk in range(0, n_chunks, PEAKS):
        o_chunk = i_chunk + tl.arange(0, PEAKS)
        before = tl.load(p_peak + chunk, mask=chunk < i_chunk, other=float("-inf"))
        found = tl.load(p_peak + o_chunk, mask=o_chunk < n_chunks, other=float("-inf"))
        found = tl.where(o_chunk < n_used, found, float("-inf"))
        groups = tl.max(tl.reshape(found, (PEAKS // PADDED_K, PADDED_K)), axis=0)
        high = tl.max(tl.maximum(groups, before), axis=0)
        stays, passes, _ = flag_best(before, found, tl.min(groups, axis=0), high, PADDED_K)
        n_stay = tl.sum(stays, axis=0)
        if n_stay > 0:  # of earlier rounds
            stayed = (stays * tl.cumsum(stays, axis=0))[None, :] == o_k[:, None] + 1
            chunk = tl.sum(tl.where(stayed, chunk[None, :], 0), axis=1)
        smaller = (n_stay + tl.cumsum(passes, axis=0))[None, :] <= o_k[:, None]
        chunk = tl.where(o_k < n_stay, chunk, i_chunk + tl.sum(smaller.to(tl.int32), axis=1))
    return chunk


@triton.jit
def best_indices(
    p_score,
    p_peak,
    p_recent,
    i_query,
    first,
    first_kept,
    n_index,
    n_chunks,
    TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    N_RECENT: tl.constexpr,
    PEAKS: tl.constexpr,
):
    """Where the ``TOP_K`` highest scores of a query are, among those of the best chunks and of the
    latest candidates.

    With as few chunks as ``PADDED_K``, ``PEAKS`` is ``PADDED_K`` and all of them are looked at.
    What was not written is hidden after it was loaded, so that no load waits for the count.

    Returns:
        indices (PADDED_K * CHUNK,) and their ranks among the selected, by index, -1 for those that
        are not selected; the same (PADDED_K,) of the latest candidates; how many are selected.
    """
    o_k = tl.arange(0, PADDED_K)
    n_used = tl.cdiv(old_count(first - N_RECENT, first_kept, n_index), CHUNK)
    recent = tl.full((PADDED_K,), float("-inf"), tl.float32)
    if N_RECENT > 0:
        recent = tl.load(p_recent + i_query * PADDED_K + o_k)
    chunk = o_k
    if PEAKS > PADDED_K:
        chunk = best_chunks(p_peak + i_query * n_chunks, n_used, n_chunks, PADDED_K, PEAKS)
    index = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    p_scores = p_score + i_query * n_chunks * CHUNK + index
    scores = tl.load(p_scores, mask=(chunk < n_chunks)[:, None], other=float("-inf"))
    scores = tl.where((chunk < n_used)[:, None], scores, float("-inf"))
    groups = tl.max(scores, axis=1)
    low = tl.min(groups, axis=0)
    high = tl.maximum(tl.max(groups, axis=0), tl.max(recent, axis=0))
    if low == float("-inf"):  # fewer chunks than ``PADDED_K``
        low = tl.min(tl.max(tl.reshape(scores, (CHUNK, PADDED_K)), axis=0), axis=0)
    scores = tl.reshape(scores, (PADDED_K * CHUNK,))
    index = tl.reshape(index, (PADDED_K * CHUNK,))
    best, best_recent, n_selected = flag_best(scores, recent, low, high, TOP_K)
    n_old = n_selected - tl.sum(best_recent, axis=0)
    _, index_recent = latest(first, first_kept, PADDED_K, N_RECENT)
    rank = tl.where(best > 0, tl.cumsum(best, axis=0) - 1, -1)
    rank_recent = tl.where(best_recent > 0, n_old + tl.cumsum(best_recent, axis=0) - 1, -1)
    return index, rank, index_recent, rank_recent, n_selected


@triton.jit
def store_indices(p_selected, choice, TOP_K: tl.constexpr, PADDED_K: tl.constexpr):
    """Writes what ``best_indices`` gave in ascending order, -1 for none."""
    index, rank, index_recent, rank_recent, n_selected = choice
    tl.store(p_selected + rank, index, mask=rank >= 0)
    tl.store(p_selected + rank_recent, index_recent, mask=rank_recent >= 0)
    o_k = tl.arange(0, PADDED_K)
    tl.store(p_selected + o_k, -1, mask=(o_k >= n_selected) & (o_k < TOP_K))


@triton.jit(do_not_specialize=NUMBERS)
def top_k_kernel(
    p_score,
    p_peak,
    p_recent,
    p_first,
    p_selected,
    groups,
    repeats,
    n_width,
    n_index,
    n_chunks,
    first_kept,
    TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    N_RECENT: tl.constexpr,
    PEAKS: tl.constexpr,
):
    """What ``decode_attention_kernel`` chooses, alone: the indices of a query's blocks, -1 for
    none.
    """
    i_query = tl.program_id(0).to(tl.int64)
    first = tl.load(p_first + i_query // (groups * repeats * n_width)).to(tl.int32)
    choice = best_indices(
        p_score,
        p_peak,
        p_recent,
        i_query,
        first,
        first_kept,
        n_index,
        n_chunks,
        TOP_K,
        PADDED_K,
        N_RECENT,
        PEAKS,
    )
    store_indices(p_selected + i_query * TOP_K, choice, TOP_K, PADDED_K)


@triton.jit
def load_partials(p_partial, p_lse, i_first, n_items, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Returns log-sum-exps and outputs of some items of a query, from ``i_first`` on."""
    o_part = i_first + tl.arange(0, REDUCED_AT_ONCE)
    o_dim = tl.arange(0, PADDED)
    inside = o_part < n_items
    lse = tl.load(p_lse + o_part, mask=inside, other=float("-inf"), cache_modifier=".cg")
    p_partials = p_partial + o_part[:, None] * DIM + o_dim[None, :]
    mask = inside[:, None] & (o_dim < DIM)[None, :]
    return lse, tl.load(p_partials, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def reduce_partials(
    p_partial,
    p_lse,
    p_gate,
    p_result,
    n_items,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """Writes a query's gate weights of what it chose, and its output."""
    o_item = tl.arange(0, ITEMS)
    o_dim = tl.arange(0, PADDED)
    lse, part = load_partials(p_partial, p_lse, 0, n_items, DIM, PADDED)
    every = tl.load(
        p_lse + o_item, mask=o_item < n_items, other=float("-inf"), cache_modifier=".cg"
    )
    highest = tl.max(every, axis=0)
    gates = tl.exp2(every - highest)
    mass = tl.sum(gates, axis=0)
    tl.store(p_gate + o_item, gates / mass, mask=o_item < TOP_K)
    joined = tl.sum(tl.exp2(lse - highest)[:, None] * part, axis=0)
    for i_first in range(REDUCED_AT_ONCE, n_items, REDUCED_AT_ONCE):
        lse, part = load_partials(p_partial, p_lse, i_first, n_items, DIM, PADDED)
        joined += tl.sum(tl.exp2(lse - highest)[:, None] * part, axis=0)
    tl.store(p_result + o_dim, (joined / mass).to(p_result.dtype.element_ty), mask=o_dim < DIM)


@triton.jit(do_not_specialize=NUMBERS)
def decode_attention_kernel(
    p_query,
    p_keys,
    p_values,
    p_selected_keys,
    p_selected_values,
    p_physical,
    p_cos,
    p_sin,
    p_own,
    p_first,
    p_offset,
    p_score,
    p_peak,
    p_recent,
    p_partial,
    p_lse,
    p_done,
    p_selected,
    p_gate,
    p_result,
    query_batch,
    query_group,
    query_repeat,
    query_slot,
    store_batch,
    store_group,
    selected_batch,
    selected_group,
    groups,
    n_width,
    n_index,
    n_chunks,
    n_items,
    first_kept,
    scale,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    N_RECENT: tl.constexpr,
    STINGY: tl.constexpr,
    PEAKS: tl.constexpr,
    ITEMS: tl.constexpr,
    PAGED: tl.constexpr,
):
    """Attention of a query to one work item; the last one to finish reduces them all.

    Item ``i < TOP_K`` is the query's ``i``-th selected block, ``TOP_K`` the own block, ``TOP_K +
    j`` the ``j``-th before it. With ``PAGED`` the selection is given, its blocks lie in
    ``p_selected_keys`` and ``p_selected_values``, and ``p_physical`` says where; otherwise it is
    made here and written, and physical blocks are indices. ``p_result`` is (B, W, G, R, D).
    """
    i_item = tl.program_id(2)
    i_head = tl.program_id(1)  # those items that choose first, as they take longest
    i_query = i_head.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    i_repeat = tl.program_id(0) // n_width
    i_slot = tl.program_id(0) % n_width
    i_row = (i_head // groups).to(tl.int64)
    i_group = i_head % groups
    own = tl.load(p_own + i_row).to(tl.int32)
    first = tl.load(p_first + i_row).to(tl.int32)
    o_slot = tl.arange(0, WIDTH)
    o_dim = tl.arange(0, PADDED)
    o_k = tl.arange(0, PADDED_K)
    p_row = (
        p_query
        + i_row * query_batch
        + i_group * query_group
        + i_repeat * query_repeat
        + i_slot * query_slot
    )
    whole = tl.full((1, 1), True, tl.int1)
    query, partner = load_queries(
        p_row + tl.zeros((1, 1), tl.int32), whole, DIM, PADDED, ROTATED, INTERLEAVED
    )
    offset = tl.load(p_offset + i_row * n_width + i_slot).to(tl.int32)

    if i_item < TOP_K:
        if PAGED:
            indices = tl.load(p_selected + i_query * TOP_K + o_k, mask=o_k < TOP_K, other=-1).to(
                tl.int32
            )
            n_selected = tl.sum((indices >= 0).to(tl.int32), axis=0)
            physical = tl.sum(tl.where((o_k == i_item) & (indices >= 0), indices, 0), axis=0)
        else:
            choice = best_indices(
                p_score,
                p_peak,
                p_recent,
                i_query,
                first,
                first_kept,
                n_index,
                n_chunks,
                TOP_K,
                PADDED_K,
                N_RECENT,
                PEAKS,
            )
            index, rank, index_recent, rank_recent, n_selected = choice
            if i_item == 0:
                store_indices(p_selected + i_query * TOP_K, choice, TOP_K, PADDED_K)
            physical = tl.sum(tl.where(rank == i_item, index, 0), axis=0)
            physical += tl.sum(tl.where(rank_recent == i_item, index_recent, 0), axis=0)
        there = i_item < n_selected
        block = tl.where(physical == 0, 0, physical + first_kept - 1)
        distance = own - block
        if STINGY:
            recent = (first - 1 - block < TOP_K).to(tl.int32)
            distance = TOP_K + 1 + own - first - (i_item + TOP_K - n_selected + recent)
    else:
        block = own - (i_item - TOP_K)
        there = (block == own) | (block >= first)
        distance = own - block
        physical = tl.maximum(block - first_kept + 1, 0)
    head = tl.multiple_of(i_row * store_batch + i_group.to(tl.int64) * store_group, ALIGNED)
    selected_head = tl.multiple_of(
        i_row * selected_batch + i_group.to(tl.int64) * selected_group, ALIGNED
    )
    p_head_keys = p_keys + head
    p_head_values = p_values + head
    if PAGED:
        physical = tl.load(p_physical + i_query * n_items + i_item)
        if i_item < TOP_K:
            p_head_keys = p_selected_keys + selected_head
            p_head_values = p_selected_values + selected_head
    physical = tl.where(there, physical, 0)
    distance = tl.where(there, distance, 0)

    # Those of few numbers first: Triton lays out a product as what was loaded last.
    cos, sin = load_rotation(p_cos, p_sin, distance, PADDED, ROTATED)
    key = load_block(p_head_keys, physical, BLOCK, DIM, PADDED, WIDTH)
    value = load_block(p_head_values, physical, BLOCK, DIM, PADDED, WIDTH)
    query = (query * cos + partner * sin) * scale
    text = tl.sum(key.to(tl.float32) * query.to(key.dtype).to(tl.float32), axis=1) * LOG2_E
    landmark = tl.sum(tl.where(o_slot == BLOCK - 1, text, 0.0), axis=0)
    seen = (o_slot < BLOCK - 1) & ((i_item != TOP_K) | (o_slot <= offset))
    text = tl.where(seen, text, float("-inf"))
    peak = tl.max(text, axis=0)
    weights = tl.exp2(text - peak)
    total = tl.sum(weights, axis=0)
    out = tl.sum(weights[:, None] * value.to(tl.float32), axis=0) / total
    lse = tl.where(there, tl.where(i_item == TOP_K, peak + tl.log2(total), landmark), float("-inf"))

    p_partial = p_partial + i_query * n_items * DIM
    p_lse = p_lse + i_query * n_items
    tl.store(p_partial + i_item * DIM + o_dim, out, mask=o_dim < DIM)
    tl.store(p_lse + i_item, lse)
    tl.debug_barrier()
    if tl.atomic_add(p_done + i_query, 1, sem="acq_rel", scope="gpu") == n_items - 1:
        i_result = ((i_row * n_width + i_slot) * groups + i_group) * (
            tl.num_programs(0) // n_width
        ) + i_repeat
        reduce_partials(
            p_partial,
            p_lse,
            p_gate + i_query * TOP_K,
            p_result + i_result * DIM,
            n_items,
            DIM,
            PADDED,
            TOP_K,
            ITEMS,
        )


class Decoded(NamedTuple):
    """What a decode step returns.

    Attributes:
        output: ``(B, W, H, D)``, of the dtype of the query.
        selected: ``(B, G, R, 1, W, K)`` int32 indices of selected blocks, ascending, -1 for none.
        gates: the same shape, their gate weights.
        kept: which blocks are kept.
    """

    output: Tensor
    selected: Tensor
    gates: Tensor
    kept: BlockRange

    @property
    def blocks(self) -> Tensor:
        """The selected blocks, -1 for none; few calls ask for them, and no other launches this."""
        return torch.where(self.selected >= 0, self.kept.block_of(self.selected), -1)


class Scores(NamedTuple):
    """Scores of all landmarks, as ``score_kernel`` leaves them.

    Attributes:
        scores: ``(B, G, R * W, chunks * CHUNK)``, by index.
        peaks: ``(B, G, R * W, chunks)`` the best score of each chunk.
        recent: ``(B, G, R * W, padded top_k)`` scores of the latest blocks at their own distances.
        done: ``(B, G, R * W)`` counts the work items that have finished; zeros.
        n_scored: landmarks that were scored.
    """

    scores: Tensor
    peaks: Tensor
    recent: Tensor
    done: Tensor
    n_scored: int


def decode(query: Tensor, grid: QueryGrid, candidates: int, context: LayerContext) -> Decoded:
    """Selects and attends for few queries of one own block in each row, in two launches.

    Where blocks are offloaded, one more launch selects before, and two page blocks in from host
    memory; with blocks on disk, or more than the LRU cache holds, the pool does that by PyTorch.

    Args:
        query: ``(B, G, R, 1, W, D)``, rotated by its offset inside the block.
        grid: where these queries stand.
        candidates: blocks ``0..candidates - 1`` may be selected.
        context: the layer; the keys of the call were appended.
    """
    config = context.config
    store = context.store
    batch, groups, repeats, _, width, dim = query.shape
    padded_k = kept_of(config.top_k)
    is_stingy = config.positions == "stingy"
    items = config.top_k + 1 + grid.local.shape[-1]
    rotation = distance_rotation(query, _largest_distance(grid, context), context)
    scored = score(query, grid, candidates, rotation, context)
    chunks = scored.peaks.shape[-1]
    selection: dict[str, Any] = {
        "p_score": scored.scores,
        "p_peak": scored.peaks,
        "p_recent": scored.recent,
        "p_first": grid.local_first,
        "groups": groups,
        "n_width": width,
        "n_index": scored.n_scored,
        "n_chunks": chunks,
        "first_kept": store.first,
        "TOP_K": config.top_k,
        "PADDED_K": padded_k,
        "N_RECENT": config.top_k if is_stingy else 0,
        "PEAKS": next((each for each in (padded_k, PEAKS[0]) if chunks <= each), PEAKS[1]),
    }
    shape = (*query.shape[:5], config.top_k)
    selected = torch.empty(shape, dtype=torch.int32, device=query.device)
    gates = torch.empty(shape, dtype=torch.float32, device=query.device)
    queries = selected[..., 0].numel()
    partial = torch.empty((queries, items, dim), dtype=torch.float32, device=query.device)
    lse = partial.new_empty(partial.shape[:2])
    result = query.new_empty(batch, width, groups * repeats, dim)
    with on_device(query.device):
        if store.pool.needs_fetch:
            launch(
                top_k_kernel,
                (queries,),
                p_selected=selected,
                repeats=repeats,
                num_warps=WARPS,
                **selection,
            )
        read_from = items_to_read(grid, selected, context)
        launch(
            decode_attention_kernel,
            (repeats * width, queries // (repeats * width), items),
            p_query=query,
            p_own=grid.own,
            p_offset=grid.offsets,
            p_partial=partial,
            p_lse=lse,
            p_done=scored.done,
            p_selected=selected,
            p_gate=gates,
            p_result=result,
            n_items=items,
            scale=context.scale,
            BLOCK=store.block_size,
            WIDTH=power_of_two(store.block_size),
            STINGY=is_stingy,
            ITEMS=power_of_two(items),
            PAGED=store.pool.needs_fetch,
            num_warps=attention_warps(store.block_size * dim * query.itemsize),
            num_stages=DECODE_STAGES,
            **read_from,
            **slot_strides(query),
            **selection,
            **rotation,
        )
    found = slice(min(config.top_k, scored.n_scored))
    return Decoded(result, selected[..., found], gates[..., found], store.kept)


def score(
    query: Tensor,
    grid: QueryGrid,
    candidates: int,
    rotation: dict[str, Any],
    context: LayerContext,
) -> Scores:
    """Scores the landmarks of the kept blocks before ``candidates``.

    Args:
        query: as for ``decode``.
        grid: likewise.
        candidates: likewise.
        rotation: by all distances, as ``distance_rotation`` returns it.
        context: the layer.
    """
    config = context.config
    is_stingy = config.positions == "stingy"
    batch, groups, repeats, _, width, _ = query.shape
    queries = repeats * width
    padded_k = kept_of(config.top_k)
    keys, _ = scored_landmarks(grid, candidates, context)
    count = keys.shape[2]
    chunks = -(-count // CHUNK.value)
    shape = (batch, groups, queries)
    scores = torch.empty((*shape, chunks * CHUNK.value), dtype=torch.float32, device=query.device)
    peaks = scores.new_empty((*shape, chunks))
    recent = scores.new_empty((*shape, padded_k))
    done = torch.empty(shape, dtype=torch.int32, device=query.device)
    precision = "parts" if keys.dtype == torch.bfloat16 else dot_precision(query)
    parts = 1
    can_stack = PARTS * queries <= MOST_STACKED and not context.store.shared_landmark
    if precision == "parts" and can_stack:
        parts = PARTS
    rows = max(LEAST_ROWS, parts * power_of_two(queries))
    chunks_each = -(-chunks * batch * groups // (WAVES * multiprocessors(query.device)))
    splits = -(-chunks // chunks_each)
    programs = splits + queries if is_stingy else splits
    with on_device(query.device):
        launch(
            score_kernel,
            (batch * groups * programs,),
            p_query=query,
            p_own=grid.own,
            p_first=grid.local_first,
            p_score=scores,
            p_peak=peaks,
            p_recent=recent,
            p_done=done,
            groups=groups,
            repeats=repeats,
            n_width=width,
            n_index=count,
            n_chunks=chunks,
            n_splits=splits,
            n_each=chunks_each,
            first_kept=context.store.first,
            most=latest_candidates(config),
            scale=context.scale,
            ROWS=rows,
            QUERIES=rows // parts,
            PADDED_K=padded_k,
            N_RECENT=config.top_k if is_stingy else 0,
            EQUAL=context.store.shared_landmark,
            KEEP_FIRST=config.local == "blocks",
            PRECISION=precision,
            num_warps=WARPS,
            num_stages=landmark_stages(CHUNK.value * keys.shape[-1] * keys.itemsize),
            **slot_strides(query),
            **landmark_arguments(keys),
            **rotation,
        )
    return Scores(scores, peaks, recent, done, count)


def items_to_read(grid: QueryGrid, selected: Tensor, context: LayerContext) -> dict[str, Any]:
    """Returns where the work items lie: arguments of ``decode_attention_kernel``.

    Args:
        grid: one own block in each row.
        selected: ``(B, G, R, 1, W, K)`` int32 indices of selected blocks, -1 for none; they are not
            known yet where blocks do not have to be paged in.
        context: the layer.
    """
    pool = context.store.pool
    if not pool.needs_fetch:
        return _kv_sources(ResidentBlocks(pool.keys, pool.values, selected), None)
    paged = page_in(grid, selected, context)
    if paged is not None:
        return _kv_sources(ResidentBlocks(pool.keys, pool.values, paged.physical), None)
    items = torch.arange(1 + grid.local.shape[-1], device=grid.own.device)
    local = (grid.own[..., None] - items).clamp(min=0)
    blocks = context.store.kept.block_of(selected.clamp(min=0))
    resident = pool.make_resident(local, blocks)
    own = resident.selected
    if own is None:
        own = pool.gather_blocks(blocks)
    local_index = resident.shared.index[:, None, None, :, None]
    local_index = local_index.expand(*selected.shape[:5], -1)
    physical = to_int32(torch.cat((own.index, local_index), dim=-1))
    common = resident.shared
    return _kv_sources(ResidentBlocks(common.keys, common.values, physical), own)


def slot_strides(query: Tensor) -> dict[str, int]:
    """Returns the strides of queries ``(B, G, R, 1, W, D)``."""
    batch, group, repeat, _, slot, _ = query.stride()
    return {
        "query_batch": batch,
        "query_group": group,
        "query_repeat": repeat,
        "query_slot": slot,
    }


def attention_warps(block_bytes: int) -> int:
    """Returns the warps of a program that attends to a block whose keys take so many bytes."""
    return FEW_WARPS if block_bytes <= FEW_WARPS_BYTES else WARPS


def _kv_sources(common: ResidentBlocks, selected: ResidentBlocks | None) -> dict[str, Any]:
    """Returns the pools that items are read from; ``common.index`` is that of all items."""
    own = common if selected is None else selected
    selected_batch, selected_group, *_ = own.keys.stride()
    return {
        **store_arguments(common),
        "p_selected_keys": own.keys,
        "p_selected_values": own.values,
        "selected_batch": selected_batch,
        "selected_group": selected_group,
        "p_physical": common.index,
    }


def _largest_distance(grid: QueryGrid, context: LayerContext) -> int:
    return SCHEMES[context.config.positions].largest_distance(grid, context)
