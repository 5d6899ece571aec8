"""The tiers: every one computes the same bits, moves what it says, and keeps forks, crops and rows
apart.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from landmark import LandmarkCache
from landmark.config import GRANULARITIES, POSITIONS, LandmarkConfig
from landmark.memory import retrieval
from landmark.memory.geometry import make_geometry
from landmark.memory.storage import cached_pool, extents, offload, store
from landmark.memory.storage.offload import OffloadStore
from landmark.memory.storage.store import BlockStore
from landmark.memory.storage.tiers import OffloadConfig, TransferStats

CASES = 320
ALWAYS = {*range(15), 208}  # 208 moves an extent down while it is copied
LAYERS = 2
SIZE = 3
DIM = 2
HEADS = 2  # of the blocks of the tests below the models


def small_budget(chance: random.Random) -> int:
    """A budget of one block at least, for both layers: at most 3 rows, 6 slots, 12 numbers of 8
    bytes a head.
    """
    return LAYERS * chance.randint(1, 3) * 3 * models.HEADS * 2 * 6 * 12 * 8


def tiers(chance: random.Random, folder: Path) -> list[dict[str, Any]]:
    near = chance.choice((None, small_budget(chance)))
    return [
        {},
        {"tier": "host", "device_bytes": near},
        {"tier": "disk", "device_bytes": near, "spill_folder": folder},
        {
            "tier": "disk",
            "device_bytes": near,
            "host_bytes": chance.randint(1, 20) * 1000,
            "spill_folder": folder,
        },
    ]


class Histories:
    """The same history on caches of several tiers."""

    def __init__(
        self, model: Any, rows: int, chance: random.Random, caches: list[LandmarkCache]
    ) -> None:
        self.model = model
        self.chance = chance
        self.caches = caches
        self.rows = rows
        self.columns = 0
        self.compared = 0

    def feed(self) -> None:
        text = self.model.landmark.text_per_block
        tokens = self.chance.choice((1, 1, 2, text, self.chance.randint(1, 40)))
        self.call(self.caches, tokens)
        self.columns += tokens

    def call(self, caches: list[LandmarkCache], tokens: int) -> None:
        ids = torch.randint(1, models.VOCAB, (self.rows, tokens))
        mask = (
            torch.ones_like(ids)
            if self.chance.random() < 0.5
            else (torch.rand(ids.shape) < 0.8).long()
        )
        logits = [
            self.model(ids, attention_mask=mask, past_key_values=cache).logits for cache in caches
        ]
        for each in logits[1:]:
            assert torch.equal(each[mask == 1], logits[0][mask == 1])
            self.compared += 1
        for cache in caches:
            for memory in cache.layers_in_use():
                memory.check_integrity()

    def crop(self) -> None:
        tokens = self.chance.randint(0, min(self.columns, self.chance.choice((1, 3, 8, 30, 90))))
        refusals = []
        for cache in self.caches:
            try:
                cache.crop(-tokens)
            except ValueError as refusal:
                refusals.append(str(refusal))
        assert len(refusals) in (0, len(self.caches)) and len(set(refusals)) < 2
        self.columns -= 0 if refusals else tokens

    def reorder(self) -> None:
        if self.columns:
            self.rows = self.chance.choice((self.rows, self.rows, self.chance.randint(1, 3)))
            rows = torch.randint(0, len(self.caches[0].tokens), (self.rows,))
            for cache in self.caches:
                cache.reorder_cache(rows)

    def fork(self) -> None:
        """Both go on; sometimes the origin is kept."""
        forks = [cache.fork() for cache in self.caches]
        if self.chance.random() < 0.5:
            self.caches, forks = forks, self.caches
        for _ in range(self.chance.randint(1, 2)):
            self.call(forks, self.chance.choice((1, 3, 20)))

    def fail(self) -> None:
        """A call that ends in the second layer."""
        hook = self.model.base_model.layers[1].register_forward_pre_hook(failing)
        ids = torch.randint(1, models.VOCAB, (self.rows, self.chance.choice((1, 9, 30))))
        for cache in self.caches:
            with pytest.raises(RuntimeError, match="on purpose"):
                self.model(ids[:, : self.model.landmark.chunk_tokens], past_key_values=cache)
        hook.remove()


def failing(*_: Any) -> None:
    raise RuntimeError("on purpose")


def draw(chance: random.Random) -> LandmarkConfig:
    block_size = chance.randint(2, 6)
    return LandmarkConfig(
        block_size=block_size,
        top_k=chance.randint(1, 4),
        granularity=chance.choice(GRANULARITIES),
        positions=chance.choice(POSITIONS),
        local_blocks=chance.randint(0, 2),
        local=chance.choice(("blocks", "blocks", "blocks", "chunk")),
        max_blocks=chance.choice((None, None, None, 0, 1, 3)),
        layers=chance.choice((None, None, (1,), (0,))),
        mode=chance.choice(("retrieval",) * 5 + ("all",)),
        chunk_tokens=chance.choice((1, 2, block_size, 5, 11, 100)),
    )


@pytest.mark.parametrize(
    "seed",
    [pytest.param(seed, marks=() if seed in ALWAYS else pytest.mark.full) for seed in range(CASES)],
)
@torch.no_grad()
def test_every_tier_computes_the_same_bits(
    seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    settings = draw(chance)
    family = chance.choice(models.FAMILIES)
    kv_heads = chance.choice((1, 2, 4))
    monkeypatch.setitem(retrieval.SLAB_BYTES, "cpu", chance.choice((1, 20_000, 2**26)))
    monkeypatch.setattr(offload, "EXTENT_BYTES", chance.choice((1, 3_000, 20_000)))
    monkeypatch.setattr(extents, "MAPPED_BYTES", chance.choice((1, 2**24)))
    step, spare = chance.choice(((1, 3), (2, 8), (16, 8)))
    monkeypatch.setattr(store, "EVICTION_STEP", step)
    monkeypatch.setattr(store, "SPARE_BLOCKS", spare)
    dtype = chance.choice((torch.float32, torch.float64, torch.bfloat16))
    model = models.landmark_model(family, settings, kv_heads=kv_heads, dtype=dtype)
    torch.manual_seed(seed)
    caches = [LandmarkCache(model.config, **each) for each in tiers(chance, tmp_path)]
    history = Histories(model, chance.randint(1, 3), chance, caches)
    history.feed()
    for _ in range(chance.randint(4, 13)):
        getattr(
            history, chance.choice(("feed", "feed", "feed", "crop", "reorder", "fork", "fail"))
        )()
    history.feed()
    assert history.compared >= 6
    assert list(tmp_path.iterdir()) == []


class Counted:
    """Block table of one row and key/value head in plain loops, and what was counted."""

    def __init__(self, lru_size: int) -> None:
        self.lru: list[tuple[int, int]] = [(-1, 0)] * lru_size  # block, when it was used last
        self.window_size = 0
        self.window = {0}

    def open(self, first: int, latest: int, span: int) -> None:
        self.window_size = max(self.window_size, span)
        written = self.window | set(range(first, latest + 1))
        self.window = {0} | {block for block in written if block > latest - self.window_size}

    def ask(self, blocks: set[int], now: int) -> tuple[list[int], list[int]]:
        held = {block: index for index, (block, _) in enumerate(self.lru)}
        old = sorted(blocks - self.window)
        for block in old:
            if block in held:
                self.lru[held[block]] = (block, now)
        return [block for block in old if block in held], [
            block for block in old if block not in held
        ]

    def admit(self, blocks: list[int], now: int) -> None:
        for block in blocks:
            oldest = min(range(len(self.lru)), key=lambda index: (self.lru[index][1], index))
            self.lru[oldest] = (block, now)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_counters_and_contents_against_plain_loops(
    seed: int, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    unit = 2 * SIZE * DIM * 4
    monkeypatch.setattr(offload, "EXTENT_BYTES", chance.choice((1, 5 * unit)))
    rows = chance.randint(1, 3)
    lru_size = chance.randint(1, 4)
    config = LandmarkConfig(block_size=SIZE, local_blocks=1)
    blocks = BlockStore(
        SIZE,
        local_blocks=1,
        offload=OffloadConfig(tier, device_bytes=lru_size * rows * HEADS * unit),
    )
    counted = {(row, head): Counted(lru_size) for row in range(rows) for head in range(HEADS)}
    written: dict[tuple[int, int], torch.Tensor] = {}  # (2, G, D) of a row's slot
    starts = [0] * rows
    finished = 0
    hits = 0
    misses = 0
    now = 0
    for _ in range(20):
        lengths = [chance.choice((1, 1, 2, chance.randint(0, 20))) for _ in range(rows)]
        plan = make_geometry(starts, lengths, config)
        width = max(*lengths, 1)
        key, value = torch.rand(2, rows, HEADS, width, DIM)
        blocks.append(key, value, plan)
        blocks.check_integrity()
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            for column in range(length):
                written[row, start + column] = torch.stack(
                    (key[row, :, column], value[row, :, column])
                )
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        finished += sum(
            end // SIZE - start // SIZE for start, end in zip(starts, ends, strict=True)
        )
        latest = [max(start, end - 1) // SIZE for start, end in zip(starts, ends, strict=True)]
        span = max(last - start // SIZE for last, start in zip(latest, starts, strict=True)) + 2
        for (row, _), each in counted.items():
            each.open(starts[row] // SIZE, latest[row], span)
        for _ in range(3):
            count = chance.randint(1, 5)
            whole = [max(1, end // SIZE) for end in ends]
            wanted = torch.tensor(
                [
                    [[chance.randrange(whole[row]) for _ in range(count)] for _ in range(HEADS)]
                    for row in range(rows)
                ]
            )
            first = torch.zeros(rows, 1, dtype=torch.long)
            resident = blocks.pool.make_resident(first, wanted).selected
            if resident is None:
                resident = blocks.pool.gather_blocks(wanted)
            now = now + 1
            asked = {}
            for (row, head), each in counted.items():
                asked[row, head] = each.ask(set(wanted[row, head].tolist()), now)
                for block, index in zip(
                    wanted[row, head].tolist(), resident.index[row, head].tolist(), strict=True
                ):
                    for slot in range(SIZE):
                        found = torch.stack(
                            (
                                resident.keys[row, head, index, slot],
                                resident.values[row, head, index, slot],
                            )
                        )
                        expected = written.get((row, block * SIZE + slot))
                        assert expected is None or torch.equal(found, expected[:, head])
            hits += sum(len(each[0]) for each in asked.values())
            misses += sum(len(each[1]) for each in asked.values())
            if all(len(found) + len(missing) <= lru_size for found, missing in asked.values()):
                for row_head, (_, missing) in asked.items():
                    counted[row_head].admit(missing, now)
        starts = ends
    stats = blocks.stats
    assert misses > 0 and finished > 0
    assert (stats.hits, stats.misses) == (hits, misses)
    moved = {f"fetched_{tier}": misses * unit, f"written_{tier}": finished * HEADS * unit}
    empty = dict.fromkeys(("fetched_host", "fetched_disk", "written_host", "written_disk"), 0)
    assert dataclasses.asdict(stats) == {"hits": hits, "misses": misses, **empty, **moved}


def settings() -> LandmarkConfig:
    return LandmarkConfig(block_size=4, top_k=2, local_blocks=1, chunk_tokens=30)


@pytest.mark.parametrize(
    "budgets", [{"tier": "host"}, {"tier": "disk"}, {"tier": "disk", "host_bytes": 2**15}]
)
def test_the_device_holds_no_more_when_the_memory_grows(
    budgets: dict[str, Any], monkeypatch: Any
) -> None:
    """But for landmarks; and the host no more than its budget."""
    monkeypatch.setattr(offload, "EXTENT_BYTES", 2**12)
    model = models.landmark_model("llama", settings())
    cache = LandmarkCache(model.config, **budgets)
    held = []
    for _ in range(10):
        model.read(models.text(300)[None], cache=cache)
        marks = sum(
            memory.store.landmark_keys.nbytes for memory in cache.memories if memory is not None
        )
        held.append((cache.nbytes("device") - marks, cache.nbytes("host"), cache.nbytes("disk")))
    device, host, disk = zip(*held, strict=True)
    assert len(set(device)) == 1
    below = [a + b for a, b in zip(host, disk, strict=True)]
    assert below[-1] > 9 * below[0]
    if budgets == {"tier": "host"}:
        assert set(disk) == {0}
    else:
        assert max(host) <= budgets.get("host_bytes", 0)
        assert cache.transfers.written_disk >= disk[-1]


@torch.no_grad()
def test_what_a_long_call_needed_near_is_given_back() -> None:
    """The next short call leaves no more frames than if there had been no long one."""
    held = []
    for tokens in (6, 30):
        model = models.landmark_model("llama", settings().replace(chunk_tokens=tokens))
        cache = model.read(models.text(300)[None], cache=LandmarkCache(model.config, "host"))
        for _ in range(2):
            held.append([memory.store.pool.nbytes("device") for memory in cache.layers_in_use()])
            model(models.text(1)[None], past_key_values=cache)
    for short, after_short, long, after_long in zip(*held, strict=True):
        assert after_long <= after_short <= short < long


@pytest.mark.parametrize("seed", range(6))
def test_pointers_are_kept_up(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told piece by piece of what moved, a store gives the pointers that it would give at once."""
    monkeypatch.setattr(offload, "EXTENT_BYTES", 2 * HEADS * 2 * SIZE * DIM * 4)
    chance = random.Random(seed)
    rows = 2
    blocks = 0
    made = OffloadStore(OffloadConfig("host"), TransferStats())
    cpu = torch.device("cpu")
    forks = []
    for _ in range(30):
        do = chance.choice(("write", "write", "write", "again", "drop", "rows", "fork"))
        if do == "write" or blocks == 0:
            for row in range(rows):
                data = torch.randn(1, HEADS, 2, SIZE, DIM)
                made.write(torch.tensor([row]), torch.tensor([blocks]), data, rows)
            blocks += 1
        elif do == "again":
            made.write(
                torch.tensor([0]),
                torch.tensor([blocks - 1]),
                torch.randn(1, HEADS, 2, SIZE, DIM),
                rows,
            )
        elif do == "drop":
            made.drop(blocks // 2)
        elif do == "rows":
            rows = chance.choice((1, 2, 3))
            made.select_rows(
                torch.tensor([chance.randrange(len(made.extents[0].rows)) for _ in range(rows)])
            )
        else:
            forks.append(made)
            made = copy.deepcopy(made)
        other = copy.deepcopy(made)
        other._pointers = None
        other._dirty = set(other.extents)
        found = made.device_pointers(cpu)
        right = other.device_pointers(cpu)
        assert found is not None and right is not None
        assert torch.equal(found[list(made.extents)], right[list(made.extents)])
    assert max(made.extents) > 4


def test_extents_in_order_share_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small tensor for each would scatter the memory of the process."""
    monkeypatch.setattr(offload, "EXTENT_BYTES", 1)
    model = models.landmark_model("llama", settings())
    for budgets in ({"tier": "host"}, {"tier": "disk"}, {"tier": "disk", "host_bytes": 2**13}):
        cache = model.read(models.text(200)[None], cache=LandmarkCache(model.config, **budgets))
        rows = [
            each.rows
            for memory in cache.layers_in_use()
            for each in memory.store.pool.offload.extents.values()
        ]
        assert len(rows) > 100 and len({each.data_ptr() for each in rows}) == 1


def test_the_null_implementation_moves_nothing() -> None:
    model = models.landmark_model("llama", settings())
    cache = model.read(models.text(200)[None])
    assert set(dataclasses.asdict(cache.transfers).values()) == {0}
    assert cache.nbytes() == cache.nbytes("device") > 0


def test_neighbouring_steps_choose_what_is_near() -> None:
    """What the cache of older blocks is for: asked for the same again, nothing moves."""
    model = models.landmark_model("llama", settings())
    cache = model.read(models.text(400)[None], cache=LandmarkCache(model.config, "host"))
    before = cache.transfers
    with torch.no_grad():
        for _ in range(3):
            model(models.text(1)[None], past_key_values=cache)
            cache.crop(-1)
    after = cache.transfers
    assert after.hits - before.hits >= 2 * (after.misses - before.misses)


def test_a_fork_writes_nothing_into_the_files_of_its_origin(tmp_path: Path) -> None:
    model = models.landmark_model("llama", settings())
    cache = model.read(
        models.text(200)[None], cache=LandmarkCache(model.config, "disk", spill_folder=tmp_path)
    )
    before = {handle: content(handle) for handle in handles(cache)}
    fork = cache.fork()
    fork.crop(-50)
    model.read(models.text(100, seed=1)[None], cache=fork)
    assert len(before) == LAYERS and not before.keys() & set(handles(fork))
    assert all(content(handle) == each != b"" for handle, each in before.items())


def handles(cache: LandmarkCache) -> list[int]:
    """The files that a cache writes to."""
    return [memory.store.pool.offload.file.handle for memory in cache.layers_in_use()]


def content(handle: int) -> bytes:
    return os.pread(handle, os.fstat(handle).st_size, 0)


def test_files_go_with_the_last_cache_that_reads_them(tmp_path: Path) -> None:
    model = models.landmark_model("llama", settings())
    cache = model.read(
        models.text(200)[None], cache=LandmarkCache(model.config, "disk", spill_folder=tmp_path)
    )
    files = {handle: os.fstat(handle).st_ino for handle in handles(cache)}
    fork = cache.fork()
    del cache
    gc.collect()
    assert all(is_open(*file) for file in files.items()), "the fork reads them"
    assert torch.equal(model.read(models.text(9)[None], cache=fork).ids()[:200], models.text(200))
    del fork
    gc.collect()
    assert not any(is_open(*file) for file in files.items())


def is_open(handle: int, number: int) -> bool:
    """Whether a handle still is that of a file with this number."""
    try:
        return os.fstat(handle).st_ino == number
    except OSError:
        return False


@pytest.mark.parametrize("named", [True, False], ids=["folder", "the system's folder"])
def test_a_killed_process_leaves_no_file(named: bool, tmp_path: Path) -> None:
    """kill -9 while all blocks lie in files, which a fork has as well."""
    code = """
        import os, signal, sys, torch, models
        from landmark import LandmarkCache, LandmarkConfig

        model = models.landmark_model("llama", LandmarkConfig(block_size=4))
        folder = {"spill_folder": sys.argv[1]} if len(sys.argv) > 1 else {}
        cache = LandmarkCache(model.config, "disk", **folder)
        model.read(models.text(200)[None], cache=cache)
        fork = cache.fork()
        model.read(models.text(200)[None], cache=fork)
        print(cache.nbytes("disk"), fork.nbytes("disk"), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    where = [str(tmp_path)] if named else []
    paths = os.pathsep.join(
        map(str, (Path(store.__file__).parents[2], Path(models.__file__).parent))
    )
    environment = {**os.environ, "PYTHONPATH": paths, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(code), *where]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert all(int(size) > 0 for size in done.stdout.split()) and len(done.stdout.split()) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("forked_goes_back", [True, False])
@torch.no_grad()
def test_a_fork_and_its_origin_go_back_without_the_other(
    tier: str, forked_goes_back: bool, monkeypatch: Any
) -> None:
    """What was finished is rewritten by one of them, while the other goes on reading it: no cache
    hides it.
    """
    monkeypatch.setattr(cached_pool, "LRU_BLOCKS", 1)
    model = models.landmark_model("llama", settings())
    found = []
    for each in ("device", tier):
        origin = model.read(models.text(200)[None], cache=LandmarkCache(model.config, each))
        fork = origin.fork()
        back, on = (fork, origin) if forked_goes_back else (origin, fork)
        back.crop(-120)
        model.read(models.text(90, seed=1)[None], cache=back)
        found.append(model(models.text(60, seed=2)[None], past_key_values=on).logits)
    assert torch.equal(*found)


def test_more_rows_stay_within_the_budget() -> None:
    model = models.landmark_model("llama", settings())
    block = 2 * 2 * 4 * 8 * 8
    cache = LandmarkCache(model.config, "host", device_bytes=LAYERS * 4 * block)
    model.read(models.text(200)[None], cache=cache)
    found = []
    for rows in (1, 2, 4):
        cache.reorder_cache(torch.zeros(rows, dtype=torch.long))
        found += [memory.store.pool.table.lru_size for memory in cache.memories]
    assert found == [4, 4, 2, 2, 1, 1]
    with pytest.raises(ValueError, match="device_bytes: expected at least"):
        cache.reorder_cache(torch.zeros(5, dtype=torch.long))
    assert len(cache.tokens) == 4


def test_extents_of_a_file_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``max_blocks`` a memory that goes on for ever takes no more of the disk."""
    for module, name, value in (
        (offload, "EXTENT_BYTES", 1),
        (store, "EVICTION_STEP", 1),
        (store, "SPARE_BLOCKS", 0),
    ):
        monkeypatch.setattr(module, name, value)
    model = models.landmark_model("llama", settings().replace(max_blocks=3))
    cache = LandmarkCache(model.config, "disk")
    sizes = []
    for _ in range(5):
        model.read(models.text(100)[None], cache=cache)
        sizes.append([os.fstat(handle).st_size for handle in handles(cache)])
    assert sizes[1] == sizes[-1]


class Steps:
    """While open, counts the steps that Python takes inside the files of the memory."""

    def __init__(self) -> None:
        self.taken = 0
        self.folder = str(Path(store.__file__).parents[1])

    def __enter__(self) -> Steps:
        sys.settrace(self.entered)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(None)

    def entered(self, frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.folder):
            return None
        frame.f_trace_lines = False
        frame.f_trace_opcodes = True
        return self.stepped

    def stepped(self, frame: Any, event: str, argument: Any) -> Any:
        self.taken += event == "opcode"
        return self.stepped


EVICTING = [{"tier": "host"}, {"tier": "disk"}, {"tier": "disk", "host_bytes": 20 * 2 * 2 * 2 * 4}]


@pytest.mark.parametrize("budgets", EVICTING)
@pytest.mark.parametrize("asked", [True, False])
def test_a_block_costs_the_same_however_many_came_before(
    budgets: dict[str, Any], asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``max_blocks``, counted in steps of the interpreter; also where a kernel asks for
    pointers in between.
    """
    monkeypatch.setattr(offload, "EXTENT_BYTES", 1)
    config = LandmarkConfig(block_size=2, local_blocks=1, max_blocks=20)
    blocks = BlockStore(2, local_blocks=1, offload=OffloadConfig(**budgets))
    taken = []
    for begin in range(0, 800, 16):
        plan = make_geometry([2 * begin], [2 * 16], config)
        key = torch.full((1, 1, 2 * 16, 2), float(begin))
        with Steps() as steps:
            blocks.append(key, key, plan)
            if asked:
                blocks.pool.offload.device_pointers(torch.device("cpu"))
        taken.append(steps.taken)
    early = sum(taken[10:20])
    late = sum(taken[-10:])
    assert early > 0 and late < 1.05 * early
    kept = blocks.pool.offload.extents
    assert len(kept) < 20 + 16 + store.SPARE_BLOCKS + 16 + 2 and blocks.first > 700


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_lies_on_disk_is_not_resident() -> None:
    """300 MiB written and read again, in a process of its own: neither pages written nor pages read
    stay.
    """
    code = """
        import re, torch
        from landmark import LandmarkConfig
        from landmark.memory.geometry import make_geometry
        from landmark.memory.storage.store import BlockStore
        from landmark.memory.storage.tiers import OffloadConfig

        def resident():
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

        torch.set_num_threads(1)
        store = BlockStore(64, local_blocks=2, offload=OffloadConfig("disk"))
        config = LandmarkConfig()
        key = torch.randn(1, 6, 1024, 64)
        for begin in range(0, 100 * 1024, 1024):
            plan = make_geometry([begin], [1024], config)
            store.append(key + begin, key, plan)
            if begin == 4096:
                before = resident()
        first = torch.zeros(1, 1, dtype=torch.long)
        for begin in range(0, 1600, 16):
            blocks = torch.arange(begin, begin + 16).expand(1, 6, 16)
            store.pool.make_resident(first, blocks)
        assert store.stats.fetched_disk > 2**28 < store.nbytes("disk")
        print(resident() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    paths = {**os.environ, "PYTHONPATH": str(Path(store.__file__).parents[3])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=paths)
    assert int(done.stdout) / 2**10 < 100


def limited(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@torch.no_grad()
def test_a_full_disk_leaves_the_memory_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's own refusal, by a limit on the size of files."""
    monkeypatch.setattr(offload, "EXTENT_BYTES", 2**13)
    model = models.landmark_model("llama", settings())
    ids = models.text(400)[None]
    expected = model(ids).logits[:, 100:]
    cache = model.read(
        ids[:, :100], cache=LandmarkCache(model.config, "disk", spill_folder=tmp_path)
    )
    limited(2**14 + 2**12)
    try:
        with pytest.raises(ValueError, match=f"no room for .* bytes of blocks in '{tmp_path}'"):
            while True:
                model(ids[:, 100:200], past_key_values=cache)
    finally:
        limited(resource.RLIM_INFINITY)
    cache.crop(100)
    torch.testing.assert_close(
        model(ids[:, 100:], past_key_values=cache).logits, expected, rtol=0, atol=1e-9
    )
