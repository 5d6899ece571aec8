"""Saved memories: opened on any tier they answer as before, bit for bit, and go on; nothing half
written counts.
"""

from __future__ import annotations

import copy
import os
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import writer

import models
from interrupt import Interrupted
from landmark import LandmarkCache
from landmark.config import GRANULARITIES, POSITIONS, LandmarkConfig
from landmark.hf import cache_io
from landmark.memory.archive import log
from landmark.memory.archive.layer import verify
from landmark.memory.archive.log import Archive, Damaged
from landmark.memory.storage import offload, pool, store

CASES = 240
ALWAYS = 16
TIERS: tuple[dict[str, Any], ...] = (
    {"tier": "device"},
    {"tier": "host"},
    {"tier": "disk"},
    {"tier": "disk", "host_bytes": 6000},
)


def settings(**changes: Any) -> LandmarkConfig:
    return LandmarkConfig(block_size=4, top_k=2, local_blocks=1, chunk_tokens=30).replace(**changes)


def draw(chance: random.Random) -> LandmarkConfig:
    return LandmarkConfig(
        block_size=chance.randint(2, 6),
        top_k=chance.randint(1, 4),
        granularity=chance.choice((*GRANULARITIES, "head")),
        positions=chance.choice(POSITIONS),
        local_blocks=chance.randint(0, 2),
        local=chance.choice(("blocks", "blocks", "blocks", "chunk")),
        max_blocks=chance.choice((None, None, 0, 1, 3)),
        layers=chance.choice((None, None, (1,), (0,))),
        mode=chance.choice(("retrieval",) * 5 + ("all",)),
        chunk_tokens=chance.choice((1, 5, 11, 100)),
    )


def equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other is None or (
        one is not None and other is not None and torch.equal(one, other)
    )


class Lives:
    """The same history on a cache that is never saved, and on one that is saved and opened again
    and again.
    """

    def __init__(self, model: Any, chance: random.Random, root: Path) -> None:
        self.model = model
        self.chance = chance
        self.root = root
        self.twin = LandmarkCache(model.config)
        self.cache = LandmarkCache(model.config, **chance.choice(TIERS))
        self.folders = 0
        # In the last folder, None where it is not this cache's.
        self.saved_tokens: int | None = None
        self.low = 0  # tokens that were never taken back since then
        self.compared = self.opened = 0

    @property
    def folder(self) -> Path:
        return self.root / str(self.folders)

    def feed(self) -> None:
        block = self.model.landmark.text_per_block
        tokens = self.chance.choice(
            (1, 2, block, block - self.twin.tokens[0] % block, self.chance.randint(1, 50))
        )
        ids = torch.randint(1, models.VOCAB, (1, tokens))
        retrieve = self.chance.random() < 0.8
        if retrieve:
            both = [
                self.model(ids, past_key_values=cache).logits for cache in (self.twin, self.cache)
            ]
            assert torch.equal(*both)
            self.compared += 1
        else:
            for cache in (self.twin, self.cache):
                self.model.read(ids, cache=cache, retrieve=False)

    def crop(self) -> None:
        tokens = self.chance.randint(
            0, min(self.twin.tokens[0] - 1, self.chance.choice((1, 3, 9, 30)))
        )
        refusals = []
        for cache in (self.twin, self.cache):
            try:
                cache.crop(-tokens)
            except ValueError as refusal:
                refusals.append(str(refusal))
        assert len(refusals) in (0, 2) and len(set(refusals)) < 2
        self.low = min(self.low, self.twin.tokens[0])

    def fork(self) -> None:
        """Goes on with a fork; its origin reads something else and writes it into their folder."""
        origin = self.cache
        self.cache = self.cache.fork()
        assert self.cache.saved is None
        self.model.read(models.text(9)[None], cache=origin)
        if self.saved_tokens is not None and self.low >= self.saved_tokens:
            origin.save(self.folder)
        self.saved_tokens = None

    def save(self) -> None:
        if self.saved_tokens is None:
            self.folders += 1
        elif self.low < self.saved_tokens:
            with pytest.raises(
                ValueError, match=r"got one that was cropped; save it to a new folder"
            ):
                self.cache.save(self.folder)
            self.folders += 1
        self.cache.save(self.folder)
        self.saved_tokens = self.low = self.twin.tokens[0]
        assert verify(self.folder) == []

    def open(self) -> None:
        if self.saved_tokens != self.twin.tokens[0] or self.low < self.saved_tokens:
            self.save()
        self.cache = LandmarkCache.open(self.folder, self.model, **self.chance.choice(TIERS))
        assert self.cache.tokens == self.twin.tokens and torch.equal(
            self.cache.ids(), self.twin.ids()
        )
        for ours, theirs in zip(self.cache.layers_in_use(), self.twin.layers_in_use(), strict=True):
            state = ours.selector.state()
            expected = theirs.selector.state()
            assert state.keys() == expected.keys(), "what the selector of `head` knows"
            assert all(equal(state[name], expected[name]) for name in expected)
        self.opened += 1


@pytest.mark.parametrize(
    "seed",
    [pytest.param(seed, marks=() if seed < ALWAYS else pytest.mark.full) for seed in range(CASES)],
)
@torch.no_grad()
def test_a_saved_memory_answers_bit_for_bit(
    seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    family = chance.choice(models.FAMILIES)
    kv_heads = chance.choice((1, 2, 4))
    monkeypatch.setattr(offload, "EXTENT_BYTES", chance.choice((1, 3_000, 20_000)))
    at_once = chance.choice((1, 3, 256))
    for module in (store, pool):
        monkeypatch.setattr(module, "AT_ONCE", at_once)
    step, spare = chance.choice(((1, 3), (2, 8), (16, 8)))
    monkeypatch.setattr(store, "EVICTION_STEP", step)
    monkeypatch.setattr(store, "SPARE_BLOCKS", spare)
    dtype = chance.choice((torch.float32, torch.float64, torch.bfloat16))
    model = models.landmark_model(family, draw(chance), kv_heads=kv_heads, dtype=dtype)
    torch.manual_seed(seed)
    lives = Lives(model, chance, tmp_path)
    first = models.text(chance.randint(1, 60), seed)[None]
    for cache in (lives.twin, lives.cache):
        model.read(first, cache=cache)
    for _ in range(chance.randint(6, 14)):
        getattr(lives, chance.choice(("feed", "feed", "feed", "crop", "fork", "save", "open")))()
    lives.open()
    lives.feed()
    lives.open()
    lives.feed()
    assert lives.compared > 0 and lives.opened >= 2


def grown(folder: Path, tokens: int = 150, **changes: Any) -> tuple[Any, LandmarkCache]:
    """A model and a memory that was saved twice; its block is 4, its text random."""
    model = models.landmark_model("llama", settings(**changes), dtype=torch.float32)
    cache = model.read(models.text(tokens // 2)[None])
    cache.save(folder)
    model.read(models.text(tokens - tokens // 2, seed=1)[None], cache=cache)
    cache.save(folder)
    return model, cache


@torch.no_grad()
def answer(model: Any, cache: LandmarkCache) -> torch.Tensor:
    """Logits of a question on a fork."""
    return model(models.text(5, seed=2)[None], past_key_values=cache.fork()).logits


def test_it_is_opened_without_reading_the_blocks(tmp_path: Path) -> None:
    model, cache = grown(tmp_path)
    for path in tmp_path.glob("*.blocks"):
        path.write_bytes(bytes(path.stat().st_size))
    for tier in ("host", "disk"):
        with pytest.raises(
            ValueError, match=r"block 0, key/value head 0 \(bytes 0-256\) is not what was written"
        ):
            LandmarkCache.open(tmp_path, model, tier)  # block 0 alone is read
    assert len(verify(tmp_path)) == 2 * 2 * (cache.slots[0] // 4)


def test_evicted_blocks_take_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "EVICTION_STEP", 1)
    monkeypatch.setattr(store, "SPARE_BLOCKS", 0)
    model, cache = grown(tmp_path, 3000, max_blocks=3)
    path = tmp_path / "layer-01.blocks"
    block = 2 * 2 * 4 * 8 * 4
    assert path.stat().st_size == 1000 * block
    assert path.stat().st_blocks * 512 < 100 * block, "only kept blocks take room"
    assert path.read_bytes()[block : 400 * block] == bytes(399 * block)
    assert verify(tmp_path) == []
    for tier in ("device", "host", "disk"):
        again = LandmarkCache.open(tmp_path, model, tier)
        ids = models.text(40)[None]
        with torch.no_grad():
            assert torch.equal(
                *(model(ids, past_key_values=each.fork()).logits for each in (again, cache))
            )


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_what_was_evicted_stays_away(
    tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither saving a memory nor opening it brings back blocks that nobody will see."""
    for module, name, value in (
        (offload, "EXTENT_BYTES", 1),
        (store, "EVICTION_STEP", 1),
        (store, "SPARE_BLOCKS", 0),
    ):
        monkeypatch.setattr(module, name, value)
    model = models.landmark_model("llama", settings(max_blocks=3), dtype=torch.float32)
    cache = model.read(models.text(600)[None], cache=LandmarkCache(model.config, tier))
    before = cache.nbytes("host", "disk")
    cache.save(tmp_path)
    assert cache.nbytes("host", "disk") == before
    assert LandmarkCache.open(tmp_path, model, tier).nbytes("host", "disk") == before


def test_a_memory_of_a_model_that_was_cast_since_is_refused(tmp_path: Path) -> None:
    model = models.landmark_model("llama", LandmarkConfig(block_size=4), dtype=torch.float32)
    model = copy.deepcopy(model)
    cache = model.read(models.text(20)[None])
    model.to(torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"in float32, .* got it in bfloat16; call model.to\(torch.float32\)"
    ):
        cache.save(tmp_path / "memory")
    assert not (tmp_path / "memory").exists()
    model.float()
    cache.save(tmp_path / "memory")


def test_a_row_of_a_padded_batch_is_saved_alone(tmp_path: Path) -> None:
    model = models.landmark_model("llama", settings(granularity="head"))
    ids, mask = models.padded([models.text(33), models.text(70, seed=1)], "left")
    cache = LandmarkCache(model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match=r"memory of one row .* got rows of \[33, 70\]"):
            cache.save(tmp_path)
        cache.batch_select_indices(torch.tensor([0]))
        cache.save(tmp_path)
        again = LandmarkCache.open(tmp_path, model, "disk")
        assert again.tokens == [33] == [again.get_seq_length()]
        assert torch.equal(again.ids(), models.text(33).int())
        assert torch.equal(
            *(model(models.text(9)[None], past_key_values=each).logits for each in (cache, again))
        )


def test_notes_and_streams_come_back(tmp_path: Path) -> None:
    model = models.landmark_model("llama", settings())
    cache = model.read(models.text(30)[None])
    cache.save(
        tmp_path / "memory",
        notes={"sources": ["a"]},
        attachments={"lines": lambda kept: b"0123"[kept:]},
    )
    again = LandmarkCache.open(tmp_path / "memory", model)
    assert again.saved is not None
    assert again.saved.notes == {"sources": ["a"]} and again.saved.attachment("lines") == b"0123"
    model.read(models.text(9)[None], cache=again)
    again.save(tmp_path / "memory", attachments={"lines": lambda kept: b"012345"[kept:]})
    third = LandmarkCache.open(tmp_path / "memory", model)
    assert third.saved is not None
    assert third.saved.notes == {"sources": ["a"]} and third.saved.attachment("lines") == b"012345"


def test_a_memory_of_an_adapter_is_opened_with_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import landmark

    base = landmark.convert(models.stock_model("llama", dtype=torch.float32), block_size=4)
    config = peft.LoraConfig(
        target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    adapted = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        cache = adapted.get_base_model().read(models.text(50)[None])
        cache.save(tmp_path)
        again = LandmarkCache.open(tmp_path, adapted, "disk")
        assert torch.equal(
            *(adapted(models.text(9)[None], past_key_values=each).logits for each in (cache, again))
        )
    plain = landmark.convert(models.stock_model("llama", dtype=torch.float32), block_size=4)
    with pytest.raises(ValueError, match="made with another model"):
        LandmarkCache.open(tmp_path, plain)


@pytest.mark.parametrize(
    "at", [(log, "_read_state"), (cache_io, "saved_layers"), (Archive, "verify")]
)
def test_a_reader_outlives_a_tail_that_is_replaced_meanwhile(
    at: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer commits right after the reader has learnt which files there are."""
    model, cache = grown(tmp_path)
    real = getattr(*at)
    calls = []

    def interrupted(*arguments: Any) -> Any:
        found = real(*arguments)
        calls.append(arguments)
        if len(calls) == 1:
            model.read(models.text(7)[None], cache=cache)
            cache.save(tmp_path)
        return found

    monkeypatch.setattr(*at, interrupted)
    if at[1] == "verify":
        assert verify(tmp_path) == []
    else:
        again = LandmarkCache.open(tmp_path, model, "disk")
        assert again.tokens == cache.tokens and torch.equal(
            answer(model, again), answer(model, cache)
        )
    assert len(calls) >= 2


def test_two_caches_of_one_folder_do_not_overwrite_each_other(tmp_path: Path) -> None:
    model, cache = grown(tmp_path)
    late = LandmarkCache.open(tmp_path, model, "disk")
    asked = answer(model, late)
    model.read(models.text(40)[None], cache=cache)
    cache.save(tmp_path)
    assert torch.equal(answer(model, late), asked), "a reader goes on with what it opened"
    model.read(models.text(3)[None], cache=late)
    with pytest.raises(
        ValueError, match=r"was written to since it was opened \(commit 3, not 2\); open it again"
    ):
        late.save(tmp_path)
    late.save(tmp_path / "other")
    assert LandmarkCache.open(tmp_path, model).tokens == [190]
    assert LandmarkCache.open(tmp_path / "other", model).tokens == [153]


def damage(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def test_every_flipped_byte_is_found_and_none_reaches_an_answer(quick: Path) -> None:
    """One bit of one byte, 200 times, over all files by their sizes and at least 6 times in
    each.
    """
    model, _ = grown(quick, 130, top_k=64)
    chance = random.Random(0)
    paths = sorted(path for path in quick.iterdir() if path.stat().st_size)
    sizes = [path.stat().st_size for path in paths]
    flips = [path for path in paths for _ in range(6)]
    flips += chance.choices(paths, sizes, k=200 - len(flips))
    assert len(paths) == 2 * 3 + 1 + 1 + 1 and len(flips) == 200
    expected = answer(model, LandmarkCache.open(quick, model))
    for index, path in enumerate(flips):
        before = path.read_bytes()
        late = LandmarkCache.open(quick, model, ("host", "disk")[index % 2])
        damage(path, chance)
        found = verify(quick)
        assert found and all(path.name in line for line in found), (path.name, found)
        with pytest.raises(
            Damaged, match=path.name
        ):  # on lower tiers the question reads the blocks
            answer(model, LandmarkCache.open(quick, model, ("device", "host", "disk")[index % 3]))
        try:  # what was read before the byte changed may still answer
            assert torch.equal(answer(model, late), expected)
        except Damaged as error:
            assert path.name in str(error)
        path.write_bytes(before)
    assert verify(quick) == []


def test_truncated_and_missing_files_are_named(tmp_path: Path) -> None:
    model, _ = grown(tmp_path)
    for path in sorted(path for path in tmp_path.iterdir() if path.stat().st_size):
        before = path.read_bytes()
        path.write_bytes(before[:-1])
        assert any(path.name in line for line in verify(tmp_path))
        with pytest.raises(Damaged, match=path.name):
            LandmarkCache.open(tmp_path, model, "disk")
        path.unlink()
        if path.name != log.STATE:
            assert any(path.name in line for line in verify(tmp_path))
        with pytest.raises((Damaged, FileNotFoundError), match=path.name):
            LandmarkCache.open(tmp_path, model, "disk")
        path.write_bytes(before)
    assert verify(tmp_path) == []


class Killed:
    """Folders of writers that were killed, and what an undisturbed writer has at each of its
    saves.
    """

    def __init__(self, root: Path, kills: int) -> None:
        command = [
            sys.executable,
            str(Path(__file__).with_name("writer.py")),
            str(root),
            str(kills),
        ]
        paths = os.pathsep.join(
            [str(Path(log.__file__).parents[2]), str(Path(__file__).parents[1])]
        )
        subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=True, timeout=900)
        self.model = writer.model()
        self.root = root
        self.expected: dict[int, torch.Tensor | None] = {0: None}
        cache = LandmarkCache(self.model.config)
        for _ in range(writer.SAVES):
            writer.read(self.model, cache)
            self.expected[cache.tokens[0]] = answer(self.model, cache)

    def check(self, index: int) -> tuple[bool, bool]:
        """Opens a folder and lets the work go on; returns whether it was killed at work, and inside
        a save.
        """
        folder = self.root / str(index)
        acknowledged = writer.acknowledged(folder)
        there = log.STATE in os.listdir(folder) if folder.exists() else False
        assert there or not acknowledged
        cache = LandmarkCache(self.model.config, "disk")
        inside = False
        if there:
            assert verify(folder) == []
            inside = Archive.open(folder).leftover() != {}
            cache = LandmarkCache.open(folder, self.model, "disk")
            assert equal(answer(self.model, cache), self.expected[cache.tokens[0]])
        read = sum(cache.tokens)
        assert read in self.expected and acknowledged <= read <= acknowledged + writer.PART
        writer.go_on(self.model, cache, folder)
        assert verify(folder) == []
        if (
            read < writer.PART * writer.SAVES
        ):  # else killed behind the last commit: a next save removes the old tail
            assert Archive.open(folder).leftover() == {}
        again = LandmarkCache.open(folder, self.model)
        assert equal(answer(self.model, again), self.expected[writer.PART * writer.SAVES])
        return acknowledged < writer.PART * writer.SAVES, inside


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.full)])
def test_a_killed_writer_loses_nothing_that_it_acknowledged(kills: int, tmp_path: Path) -> None:
    """kill -9 at instants spread uniformly over the writing, on a disk, where that takes longer
    than the reading.
    """
    killed = Killed(tmp_path, kills)
    found = [killed.check(index) for index in range(kills)]
    at_work, inside = (sum(each) for each in zip(*found, strict=True))
    print(f"{kills} kills: {at_work} before the end, {inside} left something half written")
    assert at_work >= kills // 2 and inside >= kills // 50


@torch.no_grad()
def test_a_full_disk_leaves_what_was_saved(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused at each call to the system in turn, at the first save and at a later one."""
    model = models.landmark_model("llama", settings(granularity="head"), dtype=torch.float32)
    begun = model.read(models.text(21)[None], cache=LandmarkCache(model.config, "disk"))
    after = answer(model, model.read(models.text(21)[None], cache=begun.fork()))
    for first in (True, False):
        before = None if first else answer(model, begun)
        for at in range(1000):
            folder = quick / f"{first}-{at}"
            cache = begun.fork()
            if not first:
                cache.save(folder)
            model.read(models.text(21)[None], cache=cache)
            with monkeypatch.context() as patch:
                interrupted = Interrupted(patch, at, kill=False)
                try:
                    cache.save(folder)
                except (ValueError, OSError) as error:
                    assert "No space left on device" in str(error) and "\n" not in str(error)
                    failed = True
                else:
                    failed = False
            there = LandmarkCache.open(folder, model) if (folder / log.STATE).exists() else None
            found = None if there is None else answer(model, there)
            if failed and (found is None or not torch.equal(found, after)):
                assert found is before is None or torch.equal(found, before)
                cache.save(folder)
            assert torch.equal(answer(model, LandmarkCache.open(folder, model, "disk")), after)
            assert verify(folder) == [] and Archive.open(folder).leftover() == {}
            cache.save(quick / f"{folder.name}-elsewhere")
            model.read(models.text(21)[None], cache=cache)
            cache.save(quick / f"{folder.name}-elsewhere")
            again = LandmarkCache.open(quick / f"{folder.name}-elsewhere", model)
            assert torch.equal(answer(model, again), answer(model, cache))
            if not interrupted.happened:
                break
        assert 15 < at < 100


def limited(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_the_systems_own_refusal_is_a_clear_error(tmp_path: Path) -> None:
    model, cache = grown(tmp_path)
    expected = answer(model, cache)
    model.read(models.text(100)[None], cache=cache)
    limited(2**14 + 2**10)
    try:
        with pytest.raises(
            ValueError, match=r"no room for \d+ more bytes in '.*' \(File too large\): make room"
        ):
            cache.save(tmp_path)
    finally:
        limited(resource.RLIM_INFINITY)
    assert torch.equal(answer(model, LandmarkCache.open(tmp_path, model, "disk")), expected)
    cache.save(tmp_path)
    assert torch.equal(
        answer(model, LandmarkCache.open(tmp_path, model, "disk")), answer(model, cache)
    )
