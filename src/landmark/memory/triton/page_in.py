"""Two kernels that bring chosen blocks from the memory of the CPU, so that a token of a GPU waits
for no answer of it.

One program of ``place_kernel`` for each row and key/value head does what ``CachedPool`` does in
plain PyTorch: it looks up which of the blocks that its queries chose stand in frames, and gives the
others frames of those that were not asked for longest. Then ``copy_kernel`` reads those others
where they lie, by address.

An *owner* is a row and key/value head; what it wants is what its queries chose. Other names are
those of ``kernels.py``.
"""

import triton
import triton.language as tl

from landmark.memory.storage.cached_pool import MOST_HOT_BLOCKS
from landmark.memory.triton.prefill import ALIGNED

OLDEST = tl.constexpr(2**20)  # turns: what was not asked for longer is as old
FRAMES = tl.constexpr(MOST_HOT_BLOCKS)  # hot ones of an owner, at most: a power of two
BITS = tl.constexpr(MOST_HOT_BLOCKS.bit_length())  # that number one of them, or what is wanted
LAST = tl.constexpr(2**63 - 1)
# Arguments of the kernels for whose values nothing is compiled anew.
NUMBERS = (
    "groups",
    "n_wanted",
    "n_items",
    "n_hot",
    "n_ring",
    "n_near",
    "n_rows",
    "n_length",
    "first_stored",
    "store_head",
)


@triton.jit
def higher_of(one, other):
    """For a running maximum."""
    return tl.maximum(one, other)


@triton.jit(do_not_specialize=NUMBERS)
def place_kernel(
    p_chosen,
    p_own,
    p_recent,
    p_hot,
    p_asked,
    p_counted,
    p_frame,
    p_missing,
    groups,
    n_wanted,
    n_items,
    n_hot,
    n_ring,
    n_near,
    first_stored,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Gives each item of an owner's queries its frame, and says which of the chosen have to be
    brought there.

    ``p_frame`` (owners, queries, n_items) gets frames, ``p_missing`` (owners, n_wanted) the frame
    of a block that is not there, once for each of them, else -1. Hot frames and what is wanted are
    sorted together by block, ``SIZE`` at most: what is wanted comes right behind the frame that
    holds it, and equal blocks side by side.
    """
    i_owner = tl.program_id(0).to(tl.int64)
    o_each = tl.arange(0, SIZE)
    i_row = i_owner // groups
    o_hot = o_each - n_wanted
    p_hot = p_hot + i_owner * n_hot
    p_asked = p_asked + i_owner * n_hot
    p_missing = p_missing + i_owner * n_wanted
    p_frame += i_owner * (n_wanted // TOP_K) * n_items
    inside = o_each < n_wanted
    is_hot = (o_hot >= 0) & (o_hot < n_hot)
    place = tl.load(p_chosen + i_owner * n_wanted + o_each, mask=inside, other=-1).to(tl.int32)
    block = tl.where(place <= 0, 0, place + first_stored - 1)
    recent = tl.load(p_recent + i_row * n_ring + block % n_ring).to(tl.int32)
    far = (place > 0) & (recent != block)
    frame = tl.where(block == 0, 0, 1 + block % n_ring)
    tl.store(
        p_frame + (o_each // TOP_K) * n_items + o_each % TOP_K, frame, mask=inside & (far == 0)
    )
    tl.store(p_missing + o_each, -1, mask=inside & (far == 0))

    now = tl.max(tl.load(p_asked + o_hot, mask=is_hot, other=0), axis=0) + 1
    block = tl.where(far, block, tl.load(p_hot + o_hot, mask=is_hot, other=0))
    order = tl.where(far | is_hot, (block << BITS) + tl.where(far, FRAMES + o_each, o_hot), LAST)
    order = tl.sort(order)
    block = order >> BITS
    entry = (order & (2 * FRAMES - 1)).to(tl.int32)
    is_hot = entry < FRAMES
    wanted = (entry >= FRAMES) & (order != LAST)
    behind = tl.gather(tl.where(wanted, block, -2), tl.minimum(o_each + 1, SIZE - 1), 0)
    before = tl.where(o_each == 0, -2, tl.gather(block, tl.maximum(o_each - 1, 0), 0))
    kept = is_hot & (behind == block)
    latest = tl.associative_scan(tl.where(is_hot, order, -LAST), 0, higher_of)
    at = tl.where(latest >> BITS == block, (latest & (2 * FRAMES - 1)).to(tl.int32), -1)
    missing = wanted & (at < 0)
    once = missing & (before != block)

    age = tl.minimum(now - tl.load(p_asked + entry, mask=is_hot, other=0), OLDEST).to(tl.int32)
    spare = tl.where(is_hot & (kept == 0), age * FRAMES + FRAMES - 1 - entry, -1)
    turn = tl.maximum(tl.cumsum(once.to(tl.int32), axis=0) - 1, 0)
    given = FRAMES - 1 - tl.gather(tl.sort(spare, descending=True), turn, 0) % FRAMES
    at = tl.where(missing, given, at)
    tl.debug_barrier()
    tl.store(p_hot + at, block, mask=once)
    tl.store(p_asked + at, now + tl.zeros((SIZE,), tl.int64), mask=wanted)
    o_wanted = entry - FRAMES
    frame = 1 + n_ring + at
    tl.store(p_missing + o_wanted, tl.where(once, frame, -1), mask=wanted)
    tl.store(p_frame + (o_wanted // TOP_K) * n_items + o_wanted % TOP_K, frame, mask=wanted)

    own = tl.load(p_own + i_row).to(tl.int32)
    for i_near in range(n_near):
        near = tl.maximum(own - i_near, 0)
        near = tl.where(near == 0, 0, 1 + near % n_ring) + tl.zeros((SIZE,), tl.int32)
        tl.store(p_frame + o_each * n_items + TOP_K + i_near, near, mask=o_each < n_wanted // TOP_K)
    fetched = tl.sum(once.to(tl.int64), axis=0)
    tl.atomic_add(p_counted, tl.sum(kept.to(tl.int64), axis=0))
    tl.atomic_add(p_counted + 1, fetched)
    tl.atomic_add(p_counted + 2, fetched)


@triton.jit(do_not_specialize=NUMBERS)
def copy_kernel(
    p_chosen,
    p_missing,
    p_address,
    p_key,
    p_value,
    groups,
    n_wanted,
    n_rows,
    n_length,
    first_stored,
    store_head,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Copies the keys, or the values, of one missing block, ``SIZE`` numbers, to its frame.

    ``p_address`` (extents, n_rows, 2): where the first of ``n_length`` blocks begins, and bytes
    from one to the next.
    """
    i_half = tl.program_id(0) % 2
    i_entry = (tl.program_id(0) // 2).to(tl.int64)
    frame = tl.load(p_missing + i_entry)
    if frame >= 0:
        i_owner = i_entry // n_wanted
        block = tl.load(p_chosen + i_entry).to(tl.int32) + first_stored - 1
        p_extent = p_address + ((block // n_length).to(tl.int64) * n_rows + i_owner // groups) * 2
        begin = tl.load(p_extent)
        step = tl.load(p_extent + 1)
        bytes_of_one = p_key.dtype.element_ty.primitive_bitwidth // 8
        begin += (block % n_length) * step + (i_owner % groups * 2 + i_half) * (SIZE * bytes_of_one)
        p_from = tl.multiple_of(begin, 16).to(tl.pointer_type(p_key.dtype.element_ty))
        p_to = p_key if i_half == 0 else p_value
        p_to += tl.multiple_of(i_owner * store_head + frame.to(tl.int64) * SIZE, ALIGNED)
        o_number = tl.arange(0, WIDTH)
        data = tl.load(p_from + o_number, mask=o_number < SIZE)
        tl.store(p_to + o_number, data, mask=o_number < SIZE)
