"""Tests that the memory's kernels compute what plain PyTorch computes.

They run through Triton's interpreter, or on a GPU (`make test-gpu`).
"""

import dataclasses
import random

import pytest
import torch

from landmark import LandmarkConfig
from landmark.memory import layer
from landmark.memory.context import LayerContext
from landmark.memory.geometry import make_geometry, move
from landmark.memory.layer import LayerMemory
from landmark.memory.rotary_tables import RotaryTables
from landmark.memory.storage.tiers import TIERS, OffloadConfig
from landmark.rotary import Rotary
from numerics import assert_close, low_precision_budget, online_error

pytest.importorskip("triton")
append_kernel = pytest.importorskip("landmark.memory.triton.append")
decode_kernels = pytest.importorskip("landmark.memory.triton.decode")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
CASES = 60 if ON_GPU else 20
# A power of two: the scaled query is rounded nowhere, so that both select by the same float32
# scores.
SCALE = 0.125


@dataclasses.dataclass
class Case:
    """A layer, and the calls that it is given.

    Attributes:
        calls: slots that each row adds, and whether the call retrieves; ``None`` for a call that
            only appends.
    """

    config: LandmarkConfig
    layer: int
    rotary: Rotary
    dtype: torch.dtype
    heads: tuple[int, int]
    dim: int
    calls: list[tuple[list[int], bool | None]]


def case(seed):
    """Draws a case; every fourth has ``max_blocks`` 0, so that block 0 alone is a candidate."""
    rng = random.Random(seed)
    block_size = rng.choice([51, 64] if ON_GPU else [16, 16, 20])
    dim = rng.choice([40, 64, 128] if ON_GPU else [32, 40])
    positions = rng.choice(["stingy", "stingy", "exact"])
    config = LandmarkConfig(
        block_size=block_size,
        top_k=rng.choice([1, 3, 4]),
        local_blocks=rng.choice([0, 1, 2]),
        max_blocks=(None, 6, 0, None)[seed % 4],
        granularity=rng.choice(["token_head"] * 4 + ["head", "group", "token"]),
        positions=positions,
        mode=rng.choice(["retrieval"] * 5 + ["all"]),
    )
    rotated = rng.choice([dim, dim // 2])
    rotary = Rotary(
        torch.linspace(0.01, 1, rotated).double(), torch.ones(rotated).double(), rng.random() < 0.3
    )
    rows = rng.choice([1, 2])
    groups = rng.choice([1, 1 + ON_GPU])
    longest = 12 * block_size if ON_GPU else 3 * block_size
    calls = [
        [rng.randint(1, longest) for _ in range(rows)],
        [1] * rows,
        [rng.randint(1, longest) for _ in range(rows)],
    ]
    kinds = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
    return Case(
        config=config,
        layer=rng.choice([0, 1, 1]),
        rotary=rotary,
        dtype=rng.choice(kinds),
        heads=(groups * rng.choice([1, 2]), groups),
        dim=dim,
        calls=[(lengths, rng.random() < 0.85) for lengths in calls],
    )


def outputs(case, seed, *, upcast=False, offload=None):
    """Returns of each call the output (B, T, H, D), which of it is text (B, T), and what was
    retrieved.
    """
    noise = torch.Generator().manual_seed(seed)
    memory = LayerMemory(
        case.config, RotaryTables(case.rotary, case.config.block_size), case.layer, offload
    )
    rows = len(case.calls[0][0])
    starts = [0] * rows
    found = []
    shared = torch.randn(1, case.heads[1], 1, case.dim, generator=noise)
    for lengths, retrieve in case.calls:
        geometry = make_geometry(starts, lengths, case.config)
        width = geometry.flat_index.shape[1]
        query, key, value = (
            torch.randn(rows, heads, width, case.dim, generator=noise)
            for heads in (case.heads[0], case.heads[1], case.heads[1])
        )
        if case.layer == 0:  # all landmarks are the same vector
            is_landmark = geometry.offsets == case.config.block_size - 1
            key = torch.where(is_landmark[:, None, :, None], shared, key)
        tensors = [
            (spread * each).to(case.dtype).to(DEVICE)
            for each, spread in ((query, 2), (key, 1), (value, 1))
        ]
        if upcast:
            tensors = [each.double() for each in tensors]
        if retrieve is None:
            append_alone(memory, lengths, *tensors[1:])
        else:
            output, read = memory.attend(
                *tensors,
                move(geometry, torch.device(DEVICE)),
                scale=SCALE,
                retrieve=retrieve,
                record=True,
            )
            found.append((output, (geometry.slots >= 0).to(DEVICE), read))
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    return found


def append_alone(memory, lengths, key, value):
    """Begins a memory without attending, a few blocks at a time."""
    step = 8 * memory.config.block_size
    for begin in range(0, max(lengths), step):
        starts = [min(each, begin) for each in lengths]
        ends = [min(each, begin + step) for each in lengths]
        added = [end - start for start, end in zip(starts, ends, strict=True)]
        geometry = move(make_geometry(starts, added, memory.config), torch.device(DEVICE))
        columns = (geometry.slots.clamp(min=0))[:, None, :, None].expand(
            -1, key.shape[1], -1, key.shape[3]
        )
        memory.store.begin_call(geometry, key)
        rotation = memory.tables.by_offset(geometry.offsets, key.dtype)[:, None]
        memory.store.append(
            rotation.rotate(key.gather(2, columns)), value.gather(2, columns), geometry, begun=True
        )


@pytest.mark.parametrize("seed", range(CASES))
def test_fused_is_plain(seed, monkeypatch):
    """The selections of plain PyTorch in the same dtype, and at most twice its error, where float64
    selects alike.

    Beside that, what an online softmax in float32 adds, with no score above the product of the
    usual norms.
    """
    made = case(seed)
    monkeypatch.setattr(layer, "runs_fused", lambda *_: False)
    plain = outputs(made, seed)
    exact = outputs(made, seed, upcast=True)
    used = []
    monkeypatch.setattr(layer, "runs_fused", lambda *_: used.append(1) or True)
    shares = compare(made, outputs(made, seed), plain, exact)
    assert used
    assert min(shares) > 0.9, "most queries are compared"


def compare(made, found, plain, exact):
    """Returns of each call which share of the tokens and heads selects as float64 does, and is
    compared with it.
    """
    shares = []
    for (output, there, read), (eager, _, ours), (right, _, best) in zip(
        found, plain, exact, strict=True
    ):
        assert torch.equal(read.blocks, ours.blocks)
        alike = (ours.blocks == best.blocks).all(dim=3)
        shares.append(alike.float().mean().item())
        weights = [each.weights[alike] for each in (read, ours, best)]
        results = [
            each[there[..., None] & alike.transpose(1, 2).to(DEVICE)]
            for each in (output, eager, right)
        ]
        for name, (fused, other, wanted) in {"weights": weights, "output": results}.items():
            if wanted.numel():
                budget = low_precision_budget(other.to(made.dtype), wanted)
                budget += (
                    online_error(torch.tensor(2 * made.dim * SCALE)) * wanted.abs().max().item()
                )
                assert_close(fused, wanted, budget, name)
    return shares


def many(seed):
    """Whether there are more chunks of landmarks than are looked at in one go."""
    return seed % 5 == 1


def decoding(seed):
    """Draws a long memory that was appended without attending, then calls of one or a few tokens
    inside a block; one row may be short.
    """
    made = case(seed)
    rng = random.Random(-1 - seed)
    size = made.config.block_size
    rows = len(made.calls[0][0])
    top_k = rng.choice([1, 2, 3, 4, 16] if ON_GPU else [1, 2, 3, 6])
    most = rng.choice([3, 40, 200])
    if many(seed):
        top_k = 2
        most = 64 * 4 + 40
    lengths = [rng.randint(1, size * rng.choice([4, most])) for _ in range(rows - 1)] + [
        size * most + rng.randrange(4)
    ]
    calls = [(lengths, None), ([1] * rows, True), ([1 + i for i in range(rows)], True)]
    config = dataclasses.replace(
        made.config, top_k=top_k, granularity="token_head", mode="retrieval"
    )
    kinds = [torch.float32, torch.float32, torch.float16] + [torch.bfloat16] * 2 * ON_GPU
    groups = 2 - seed % 2
    repeats = rng.choice([1, 2, 4] if ON_GPU else [1, 2])
    heads = (groups * repeats, groups)
    return dataclasses.replace(
        made, config=config, calls=calls, dtype=rng.choice(kinds), heads=heads
    )


def decoded(made, seed, monkeypatch, offload=None):
    """Returns ``outputs`` where small calls are fused, and how many of them the decode kernels
    took.
    """
    used = []
    decode = LayerMemory._decode
    monkeypatch.setattr(layer, "runs_fused", lambda query, _: query.shape[3] <= 5)
    monkeypatch.setattr(
        LayerMemory, "_decode", lambda *args, **named: used.append(1) or decode(*args, **named)
    )
    found = outputs(made, seed, offload=offload)
    monkeypatch.undo()
    return found, len(used)


@pytest.mark.parametrize("seed", range(CASES if ON_GPU else 10))
def test_decoding_is_plain(seed, monkeypatch):
    """As above, over long memories."""
    made = decoding(seed)
    monkeypatch.setattr(layer, "runs_fused", lambda *_: False)
    plain = outputs(made, seed)
    exact = outputs(made, seed, upcast=True)
    if many(seed):
        monkeypatch.setattr(decode_kernels, "PEAKS", (4, 4))
    monkeypatch.setattr(decode_kernels, "WAVES", random.Random(seed).choice([1, 3, 20]))
    found, used = decoded(made, seed, monkeypatch)
    assert used == 2
    shares = compare(made, found, plain, exact)
    assert sum(shares) / len(shares) > 0.5, "most are compared"


@pytest.mark.parametrize("seed", range(CASES if ON_GPU else 3))
def test_decoding_computes_the_same_bits_on_every_tier(seed, monkeypatch):
    """And each time, whichever item arrives last."""
    made = decoding(seed)
    block = (
        2
        * len(made.calls[0][0])
        * made.heads[1]
        * made.config.block_size
        * made.dim
        * made.dtype.itemsize
    )
    expected, _ = decoded(made, seed, monkeypatch)
    for offload in (
        None,
        OffloadConfig("host", device_bytes=5 * block),
        OffloadConfig("disk", device_bytes=5 * block),
    ):
        found, used = decoded(made, seed, monkeypatch, offload)
        assert used
        for (output, there, read), (right, _, best) in zip(found, expected, strict=True):
            assert torch.equal(output[there], right[there])
            assert torch.equal(read.blocks, best.blocks) and torch.equal(read.weights, best.weights)


@pytest.mark.parametrize("seed", range(CASES if ON_GPU else 3))
def test_fused_computes_the_same_bits_on_every_tier(seed, monkeypatch):
    """With room for few blocks in the LRU cache, so that blocks come and go."""
    made = case(seed)
    block = (
        2
        * len(made.calls[0][0])
        * made.heads[1]
        * made.config.block_size
        * made.dim
        * made.dtype.itemsize
    )
    monkeypatch.setattr(layer, "runs_fused", lambda *_: True)
    expected = outputs(made, seed)
    for tier in ("host", "disk"):
        found = outputs(made, seed, offload=OffloadConfig(tier, device_bytes=3 * block))
        for (output, there, read), (right, _, best) in zip(found, expected, strict=True):
            assert torch.equal(output[there], right[there])
            assert torch.equal(read.blocks, best.blocks) and torch.equal(read.weights, best.weights)


def stored(memory, slots):
    """Yields landmark keys of every block of each row, its keys and its values."""
    store = memory.store
    heads = store.landmark_keys.shape[1]
    for row, count in enumerate(slots):
        kept = torch.tensor([0, *range(store.first, -(-count // store.block_size))], device=DEVICE)
        row_head = row * heads + torch.arange(heads, device=DEVICE)
        keys, values = store.pool.gather(row_head.repeat_interleave(len(kept)), kept.repeat(heads))
        yield store.landmark_keys[row][:, store.kept.index_of(kept)], keys, values


def some_of(rng, noise, made, heads, width):
    """Draws a tensor ``(3, heads, width, D)`` as layers hand them on, some in another order."""
    order = rng.choice([(0, 1, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3), (0, 1, 3, 2)])
    shape = [(3, heads, width, made.dim)[each] for each in order]
    found = torch.randn(shape, generator=noise).permute([order.index(each) for each in range(4)])
    return found.to(made.dtype).to(DEVICE)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("seed", range(CASES if ON_GPU else 8))
def test_append_kernel_is_plain(seed, tier, monkeypatch):
    """Bit for bit; among the calls are some that finish blocks, and some in which a row has no
    token.
    """
    if not ON_GPU:  # the interpreter rounds a product before it adds to it, `addcmul` does not
        monkeypatch.setattr(torch, "addcmul", lambda x, y, z: x + y * z)
    made = case(seed)
    rng = random.Random(-1 - seed)
    noise = torch.Generator().manual_seed(seed)
    config = dataclasses.replace(
        made.config, block_size=4, max_blocks=(None, 3, 0, None)[seed % 4], mode="retrieval"
    )
    heads = 2 * made.heads[0]
    groups = 2 * made.heads[1]
    memories = [
        LayerMemory(config, RotaryTables(made.rotary, 4), made.layer, OffloadConfig(tier))
        for _ in range(2)
    ]
    least = [1, 1, 1] if config.max_blocks is None else [140] * 3
    finished = 0
    absent = 0
    slots = [
        rng.randint(begin, end) for begin, end in zip(least, (least[0] + 2, 160, 160), strict=True)
    ]
    first = [some_of(rng, noise, made, groups, max(slots)) for _ in range(2)]
    for memory in memories:
        append_alone(memory, slots, *first)
    for _ in range(8):
        lengths = [rng.randint(0, 4 - each % 4) for each in slots]
        geometry = move(make_geometry(slots, lengths, config), torch.device(DEVICE))
        query, key, value = (
            some_of(rng, noise, made, each, geometry.flat_index.shape[1])
            for each in (heads, groups, groups)
        )
        for memory in memories:
            memory.prepare(geometry, key)
        rotation = memories[0].tables.by_offset(geometry.offsets, key.dtype)[:, None]
        memories[0].store.append(rotation.rotate(key), value, geometry, begun=True)
        store = memories[1].store
        context = LayerContext(store, memories[1].tables, config, SCALE)
        found = append_kernel.append(
            query.unflatten(1, (groups, -1)), key, value, geometry.grid, context
        )
        if geometry.finished_blocks:
            store.pool.seal_blocks(geometry)
        assert torch.equal(found.flatten(1, 3), rotation.rotate(query))
        slots = [start + length for start, length in zip(slots, lengths, strict=True)]
        finished = finished + len(geometry.finished_blocks)
        absent = absent + lengths.count(0)
    assert finished and absent
    assert (memories[1].store.first > 1) == (config.max_blocks is not None)
    for plain, appended in zip(*(stored(memory, slots) for memory in memories), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(plain, appended, strict=True))
