"""Two kernels that bring chosen blocks from the memory of the CPU, so that a token of a GPU waits for no answer of it.

One program of ``place_kernel`` for each row and key/value head does what ``SomeNear`` does in plain PyTorch: it looks
up which of the blocks that its queries chose stand in frames, and gives the others frames of those that were not asked
for longest. Then ``copy_kernel`` reads those others where they lie, by address.

An *owner* is a row and key/value head; what it wants is what its queries chose. Other names are those of
``kernels.py``.
"""

import triton
import triton.language as tl

from landmark.memory.triton.kernels import ALIGNED

OLDEST = tl.constexpr(2**20)  # turns: what was not asked for longer is as old
COMPARED = 2**14  # pairs of frames that are compared at once
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
def hot_frames(p_hot, p_asked, o_hot, n_hot, wanted, now):
    """Which of the frames ``o_hot`` (F,) hold which wanted block, (N, F), and how much each may be given away, (F,).

    That is the more the longer ago it was asked for, and -1 for those that are wanted now.
    """
    inside = o_hot < n_hot
    held = tl.load(p_hot + o_hot, mask=inside, other=-2).to(tl.int32)
    age = tl.minimum(now - tl.load(p_asked + o_hot, mask=inside, other=0), OLDEST).to(tl.int32)
    same = held[None, :] == wanted[:, None]
    kept = tl.max(same.to(tl.int32), axis=0)
    return same, tl.where(inside & (kept == 0), age * 512 + 511 - o_hot, -1)


@triton.jit(do_not_specialize=NUMBERS)
def place_kernel(
    p_chosen, p_own, p_recent, p_hot, p_asked, p_counted, p_frame, p_missing,
    groups, n_wanted, n_items, n_hot, n_ring, n_near, first_stored,
    TOP_K: tl.constexpr, WANTED: tl.constexpr, HOT: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Gives each item of an owner's queries its frame, and says which of the chosen have to be brought there.

    ``p_frame`` (owners, queries, n_items) gets frames, ``p_missing`` (owners, n_wanted) the frame of a block that is
    not there, once for each of them, else -1.
    """
    i_owner = tl.program_id(0).to(tl.int64)
    i_row, o_wanted, o_hot = i_owner // groups, tl.arange(0, WANTED), tl.arange(0, HOT)
    p_hot, p_asked = p_hot + i_owner * n_hot, p_asked + i_owner * n_hot
    inside = o_wanted < n_wanted
    place = tl.load(p_chosen + i_owner * n_wanted + o_wanted, mask=inside, other=-1).to(tl.int32)
    block = tl.where(place <= 0, 0, place + first_stored - 1)
    recent = tl.load(p_recent + i_row * n_ring + block % n_ring).to(tl.int32)
    far = (place > 0) & (recent != block)
    wanted = tl.where(far, block, -3)

    now = tl.max(tl.load(p_asked + o_hot, mask=o_hot < n_hot, other=0), axis=0) + 1
    same, spare = hot_frames(p_hot, p_asked, o_hot, n_hot, wanted, now)
    at = tl.max(tl.where(same, o_hot[None, :], -1), axis=1)
    missing = far & (at < 0)
    twin = (wanted[None, :] == wanted[:, None]) & (missing[None, :] & missing[:, None])
    once = missing & (tl.min(tl.where(twin, o_wanted[None, :], WANTED), axis=1) == o_wanted)
    turn = tl.cumsum(once.to(tl.int32), axis=0) - 1
    turn = tl.max(tl.where(twin & once[None, :], turn[None, :], -1), axis=1)

    if SLICE == HOT:
        rank = tl.sum((spare[None, :] > spare[:, None]).to(tl.int32), axis=1)
    else:
        rank = tl.zeros((HOT,), tl.int32)
        for i_slice in range(0, HOT, SLICE):
            _, other = hot_frames(p_hot, p_asked, i_slice + tl.arange(0, SLICE), n_hot, wanted, now)
            rank += tl.sum((other[None, :] > spare[:, None]).to(tl.int32), axis=1)
    given = (rank[None, :] == turn[:, None]) & ((spare >= 0)[None, :] & missing[:, None])
    at = tl.where(missing, tl.max(tl.where(given, o_hot[None, :], -1), axis=1), at)
    new = tl.max(tl.where(given, wanted[:, None], -1), axis=0)
    tl.debug_barrier()
    tl.store(p_hot + o_hot, new.to(tl.int64), mask=(o_hot < n_hot) & (new >= 0))
    tl.store(p_asked + o_hot, now + tl.zeros((HOT,), tl.int64), mask=(o_hot < n_hot) & ((new >= 0) | (spare < 0)))

    frame = tl.where(far, 1 + n_ring + at, tl.where(block == 0, 0, 1 + block % n_ring))
    tl.store(p_missing + i_owner * n_wanted + o_wanted, tl.where(once, frame, -1), mask=inside)
    p_frame += i_owner * (n_wanted // TOP_K) * n_items
    tl.store(p_frame + (o_wanted // TOP_K) * n_items + o_wanted % TOP_K, frame, mask=inside)
    own = tl.load(p_own + i_row).to(tl.int32)
    for i_near in range(n_near):
        near = tl.maximum(own - i_near, 0)
        near = tl.where(near == 0, 0, 1 + near % n_ring) + tl.zeros((WANTED,), tl.int32)
        tl.store(p_frame + o_wanted * n_items + TOP_K + i_near, near, mask=o_wanted < n_wanted // TOP_K)
    found = tl.sum(((spare < 0) & (o_hot < n_hot)).to(tl.int64), axis=0)
    fetched = tl.sum(once.to(tl.int64), axis=0)
    tl.atomic_add(p_counted, found)
    tl.atomic_add(p_counted + 1, fetched)
    tl.atomic_add(p_counted + 2, fetched)


@triton.jit(do_not_specialize=NUMBERS)
def copy_kernel(
    p_chosen, p_missing, p_address, p_key, p_value,
    groups, n_wanted, n_rows, n_length, first_stored, store_head,
    SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Copies the keys, or the values, of one missing block, ``SIZE`` numbers, to its frame.

    ``p_address`` (extents, n_rows, 2): where the first of ``n_length`` blocks begins, and bytes from one to the next.
    """
    i_half, i_entry = tl.program_id(0) % 2, (tl.program_id(0) // 2).to(tl.int64)
    frame = tl.load(p_missing + i_entry)
    if frame >= 0:
        i_owner = i_entry // n_wanted
        block = tl.load(p_chosen + i_entry).to(tl.int32) + first_stored - 1
        p_extent = p_address + ((block // n_length).to(tl.int64) * n_rows + i_owner // groups) * 2
        begin, step = tl.load(p_extent), tl.load(p_extent + 1)
        bytes_of_one = p_key.dtype.element_ty.primitive_bitwidth // 8
        begin += (block % n_length) * step + (i_owner % groups * 2 + i_half) * (SIZE * bytes_of_one)
        p_from = tl.multiple_of(begin, 16).to(tl.pointer_type(p_key.dtype.element_ty))
        p_to = p_key if i_half == 0 else p_value
        p_to += tl.multiple_of(i_owner * store_head + frame.to(tl.int64) * SIZE, ALIGNED)
        o_number = tl.arange(0, WIDTH)
        data = tl.load(p_from + o_number, mask=o_number < SIZE)
        tl.store(p_to + o_number, data, mask=o_number < SIZE)
