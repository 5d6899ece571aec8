"""The kernels that bring blocks from the memory of the CPU against plain PyTorch, turn by turn."""

import copy
import random

import pytest
import torch

from landmark import LandmarkConfig
from landmark.memory.geometry import make_geometry, move
from landmark.memory.storage.extents import HostExtent
from landmark.memory.storage.store import BlockStore
from landmark.memory.storage.tiers import OffloadConfig

pytest.importorskip("triton")
launch = pytest.importorskip("landmark.memory.triton.launch")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
LENGTH = 4
DIM = 8


def remembering(chance, config, rows, groups, slots, hot):
    """A store of tier ``host`` that has seen so many slots of each row."""
    block = 2 * rows * groups * LENGTH * DIM * 4
    store = BlockStore(
        LENGTH,
        local_blocks=config.local_blocks,
        tiers=OffloadConfig("host", device_bytes=hot * block),
    )
    begin = 0
    while begin < slots:
        end = min(slots, begin + chance.randint(1, 5 * LENGTH))
        step(store, config, rows, groups, begin, end)
        begin = end
    return store


def step(store, config, rows, groups, begin, end):
    plan = move(make_geometry([begin] * rows, [end - begin] * rows, config), torch.device(DEVICE))
    key, value = (torch.randn(rows, groups, end - begin, DIM, device=DEVICE) for _ in range(2))
    store.reserve(plan.blocks, key)
    store.open(plan)
    store.write(key, value, plan.writes)
    return plan


@pytest.mark.parametrize("seed", range(40 if ON_GPU else 12))
def test_kernels_bring_what_plain_pytorch_brings(seed, monkeypatch):
    """The same blocks to equal frames, the same ones given away, and as many counted."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    rows, groups, repeats, top_k = (chance.randint(1, most) for most in (3, 2, 2, 4))
    config = LandmarkConfig(block_size=LENGTH, top_k=top_k, local_blocks=chance.randint(0, 2))
    hot = repeats * top_k + chance.choice([0, 1, 9, 60, 200])
    slots = chance.randint(8, 60) * LENGTH
    store = remembering(chance, config, rows, groups, slots, hot)
    assert store.near.hot.shape[1] == hot
    for _ in range(20 if ON_GPU else 8):
        end = slots + chance.randint(1, LENGTH - slots % LENGTH)
        plan = step(store, config, rows, groups, slots, end)
        slots = end
        chosen = choices(
            chance, (rows, groups, repeats, 1, 1, top_k), int(plan.grid.local_first[0, 0])
        )
        other = copy.deepcopy(store)
        keys, values, _, _, frames = launch._bring(store, plan.grid, chosen)
        with monkeypatch.context() as patch:
            patch.setattr(launch, "_bring", lambda *_: None)
            near_keys, near_values, far_keys, far_values, plain = launch._arenas(
                other, plan.grid, chosen
            )
        for tensor, far, near in ((keys, far_keys, near_keys), (values, far_values, near_values)):
            found = of(tensor, frames)
            valid = chosen >= 0
            assert torch.equal(
                found[..., :top_k, :, :][valid], of(far, plain)[..., :top_k, :, :][valid]
            )
            assert torch.equal(found[..., top_k:, :, :], of(near, plain)[..., top_k:, :, :])
        assert torch.equal(store.near.hot.sort().values, other.near.hot.sort().values)
        assert torch.equal(store.near.asked.sort().values, other.near.asked.sort().values)
        assert store.traffic == other.traffic
    assert store.traffic.misses


def choices(chance, shape, first):
    """Places of blocks before ``first``, ascending, -1 behind the last; heads often choose
    alike.
    """
    found = torch.full(shape, -1, dtype=torch.int32)
    some = [chance.randrange(max(first, 1)) for _ in range(6)]
    for index in range(found[..., 0].numel()):
        blocks = set(chance.choices(some, k=chance.randint(0, shape[-1]))) if first else set()
        blocks = sorted(blocks)
        found.view(-1, shape[-1])[index, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    return found.to(DEVICE)


def of(tensor, frames):
    """Blocks at the frames ``(B, G, R, 1, 1, M)`` of ``tensor (B, G, F, L, D)``."""
    batch, groups = tensor.shape[:2]
    rows = torch.arange(batch, device=DEVICE).view(-1, 1, 1, 1, 1, 1)
    heads = torch.arange(groups, device=DEVICE).view(1, -1, 1, 1, 1, 1)
    return tensor[rows, heads, frames.long().clamp(0, tensor.shape[2] - 1)]


@pytest.mark.skipif(not ON_GPU, reason="nothing is in flight on a CPU")
def test_what_a_kernel_may_still_read_is_not_given_out_anew():
    """Pinned memory of an extent that came from an archive, so that no copy of a GPU has touched
    it.
    """
    shape = (2, 1, 1, 2, LENGTH, DIM)
    extent = HostExtent(shape, torch.float32)
    extent.fill(torch.randn(shape))
    begin = extent.address(torch.device(DEVICE))[0]
    torch.cuda._sleep(10**9)
    del extent
    while_it_runs = HostExtent(shape, torch.float32)
    assert while_it_runs.address(torch.device(DEVICE))[0] != begin
    torch.cuda.synchronize()
    assert HostExtent(shape, torch.float32).address(torch.device(DEVICE))[0] == begin
