"""Tests that the kernels page in from host memory what plain PyTorch brings, call by call."""

import copy
import random

import pytest
import torch

from landmark import LandmarkConfig
from landmark.memory.context import LayerContext
from landmark.memory.geometry import make_geometry, move
from landmark.memory.rotary_tables import RotaryTables
from landmark.memory.storage.extents import HostExtent
from landmark.memory.storage.store import BlockStore
from landmark.memory.storage.tiers import OffloadConfig
from landmark.rotary import Rotary

pytest.importorskip("triton")
decode_kernels = pytest.importorskip("landmark.memory.triton.decode")
page_in_kernels = pytest.importorskip("landmark.memory.triton.page_in")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
LENGTH = 4
DIM = 8


def remembering(chance, config, rows, groups, slots, lru_size):
    """Returns a store of tier ``host`` that has seen so many slots of each row."""
    block = 2 * rows * groups * LENGTH * DIM * 4
    store = BlockStore(
        LENGTH,
        local_blocks=config.local_blocks,
        offload=OffloadConfig("host", device_bytes=lru_size * block),
    )
    begin = 0
    while begin < slots:
        end = min(slots, begin + chance.randint(1, 5 * LENGTH))
        step(store, config, rows, groups, begin, end)
        begin = end
    return store


def step(store, config, rows, groups, begin, end):
    """Appends random slots to each row, and returns the geometry of that call."""
    geometry = make_geometry([begin] * rows, [end - begin] * rows, config)
    geometry = move(geometry, torch.device(DEVICE))
    key, value = (torch.randn(rows, groups, end - begin, DIM, device=DEVICE) for _ in range(2))
    store.begin_call(geometry, key)
    store.append(key, value, geometry, begun=True)
    return geometry


def context_of(store, config):
    """Returns what the kernels are given of a layer; paging in reads no rotations."""
    ones = torch.ones(DIM).double()
    return LayerContext(store, RotaryTables(Rotary(ones, ones, False), LENGTH), config, scale=1.0)


@pytest.mark.parametrize("seed", range(40 if ON_GPU else 12))
def test_kernels_page_in_what_plain_pytorch_brings(seed, monkeypatch):
    """The same blocks, the same ones evicted from the LRU cache, and as many counted."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    rows, groups, repeats, top_k = (chance.randint(1, most) for most in (3, 2, 2, 4))
    config = LandmarkConfig(block_size=LENGTH, top_k=top_k, local_blocks=chance.randint(0, 2))
    lru_size = repeats * top_k + chance.choice([0, 1, 9, 60, 200])
    slots = chance.randint(8, 60) * LENGTH
    store = remembering(chance, config, rows, groups, slots, lru_size)
    assert store.pool.table.lru.shape[1] == lru_size
    for _ in range(20 if ON_GPU else 8):
        end = slots + chance.randint(1, LENGTH - slots % LENGTH)
        geometry = step(store, config, rows, groups, slots, end)
        slots = end
        selected = selections(
            chance, (rows, groups, repeats, 1, 1, top_k), int(geometry.grid.local_first[0, 0])
        )
        other = copy.deepcopy(store)
        paged = page_in_kernels.page_in(geometry.grid, selected, context_of(store, config))
        with monkeypatch.context() as patch:
            patch.setattr(decode_kernels, "page_in", lambda *_: None)
            plain = decode_kernels.items_to_read(geometry.grid, selected, context_of(other, config))
        for name in ("keys", "values"):
            found = of(getattr(store.pool, name), paged.physical)
            older = of(plain[f"p_selected_{name}"], plain["p_physical"])
            local = of(plain[f"p_{name}"], plain["p_physical"])
            valid = selected >= 0
            assert torch.equal(found[..., :top_k, :, :][valid], older[..., :top_k, :, :][valid])
            assert torch.equal(found[..., top_k:, :, :], local[..., top_k:, :, :])
        table = store.pool.table
        expected = other.pool.table
        assert torch.equal(table.lru.sort().values, expected.lru.sort().values)
        assert torch.equal(table.last_used.sort().values, expected.last_used.sort().values)
        assert store.stats == other.stats
    assert store.stats.misses


def selections(chance, shape, first):
    """Draws indices of blocks before ``first``, ascending, -1 behind the last; heads often select
    alike.
    """
    found = torch.full(shape, -1, dtype=torch.int32)
    some = [chance.randrange(max(first, 1)) for _ in range(6)]
    for index in range(found[..., 0].numel()):
        blocks = set(chance.choices(some, k=chance.randint(0, shape[-1]))) if first else set()
        blocks = sorted(blocks)
        found.view(-1, shape[-1])[index, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    return found.to(DEVICE)


def of(tensor, physical):
    """Returns the blocks at ``physical (B, G, R, 1, 1, M)`` of a pool ``(B, G, P, L, D)``."""
    batch, groups = tensor.shape[:2]
    rows = torch.arange(batch, device=DEVICE).view(-1, 1, 1, 1, 1, 1)
    heads = torch.arange(groups, device=DEVICE).view(1, -1, 1, 1, 1, 1)
    return tensor[rows, heads, physical.long().clamp(0, tensor.shape[2] - 1)]


@pytest.mark.skipif(not ON_GPU, reason="nothing is in flight on a CPU")
def test_what_a_kernel_may_still_read_is_not_given_out_anew():
    """Pinned memory of an extent that came from an archive, so that no copy of a GPU has touched
    it.
    """
    shape = (2, 1, 1, 2, LENGTH, DIM)
    extent = HostExtent(shape, torch.float32)
    extent.fill(torch.randn(shape))
    begin = extent.address(torch.device(DEVICE)).begin
    torch.cuda._sleep(10**9)
    del extent
    while_it_runs = HostExtent(shape, torch.float32)
    assert while_it_runs.address(torch.device(DEVICE)).begin != begin
    torch.cuda.synchronize()
    assert HostExtent(shape, torch.float32).address(torch.device(DEVICE)).begin == begin
