"""A memory on disk while a cache knows it: another working directory, a folder that is gone, or
holds another.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from landmark import LandmarkCache, LandmarkConfig
from landmark.memory.archive.layer import verify
from landmark.memory.archive.log import STATE, Damaged
from landmark.memory.storage import offload

TIERS = ("device", "host", "disk")


def model() -> Any:
    settings = LandmarkConfig(block_size=4, top_k=2, local_blocks=1, chunk_tokens=30)
    return models.landmark_model("llama", settings, dtype=torch.float32)


@torch.no_grad()
def answer(cache: LandmarkCache) -> torch.Tensor:
    return model()(models.text(15, seed=2)[None], past_key_values=cache.fork()).logits


def known(folder: Path | str, tier: str, how: str) -> LandmarkCache:
    """A cache that was saved to a folder, or opened from it, and has read on."""
    cache = model().read(models.text(90)[None], cache=LandmarkCache(model(), tier))
    cache.save(folder)
    if how == "opened":
        cache = LandmarkCache.open(folder, model(), tier)
    model().read(models.text(20, seed=1)[None], cache=cache)
    return cache


@pytest.fixture(autouse=True)
def small_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "EXTENT_BYTES", 2000)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Begins in one folder; called, it goes to another."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return lambda: monkeypatch.chdir(tmp_path / "there")


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("how", ["saved", "opened"])
def test_another_working_directory_changes_nothing(
    tier: str, how: str, tmp_path: Path, elsewhere: Callable[[], None]
) -> None:
    cache = known("memory", tier, how)
    expected = answer(cache)
    elsewhere()
    assert torch.equal(answer(cache), expected)
    cache.save(tmp_path / "here" / "memory")
    assert verify(tmp_path / "here" / "memory") == []
    assert torch.equal(
        answer(LandmarkCache.open(tmp_path / "here" / "memory", model(), tier)), expected
    )
    cache.save("memory")  # a new one, as the user says where
    assert torch.equal(
        answer(LandmarkCache.open(tmp_path / "there" / "memory", model(), tier)), expected
    )


def test_a_relative_spill_folder_stays_where_it_was(
    tmp_path: Path, elsewhere: Callable[[], None]
) -> None:
    Path("spill").mkdir()
    cache = LandmarkCache(model(), "disk", spill_folder="spill")
    elsewhere()
    model().read(models.text(90)[None], cache=cache)
    assert {str(each.store.pool.offload.file.folder) for each in cache.layers_in_use()} == {
        str(tmp_path / "here" / "spill")
    }


def test_an_opened_memory_spills_where_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "spill").mkdir()
    model().read(models.text(90)[None]).save(tmp_path / "memory")
    cache = LandmarkCache.open(
        tmp_path / "memory", model(), "disk", spill_folder=tmp_path / "spill"
    )
    model().read(models.text(90)[None], cache=cache)
    assert {each.store.pool.offload.file.folder for each in cache.layers_in_use()} == {
        tmp_path / "spill"
    }
    assert list((tmp_path / "spill").iterdir()) == [], "its files have no name"


def moved(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def removed(folder: Path) -> None:
    shutil.rmtree(folder)


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("how", ["saved", "opened"])
@pytest.mark.parametrize("gone", [moved, removed, emptied])
def test_a_folder_that_is_gone(
    tier: str, how: str, gone: Callable[[Path], None], tmp_path: Path
) -> None:
    """Reading goes on; saving there says what to do, and does nothing; saving elsewhere loses
    nothing.
    """
    folder = tmp_path / "memory"
    cache = known(folder, tier, how)
    expected = answer(cache)
    gone(folder)
    assert torch.equal(answer(cache), expected)
    for _ in range(2):
        with pytest.raises(
            FileNotFoundError,
            match=r"opened in '.*memory', found none any more: put the folder back,",
        ):
            cache.save(folder)
    assert not folder.exists() or list(folder.iterdir()) == []
    if gone is moved:
        with pytest.raises(ValueError, match=r"expected a new or empty folder .* name another"):
            cache.save(tmp_path / "moved")
        (tmp_path / "moved").rename(folder)
        cache.save(folder)
        assert torch.equal(answer(LandmarkCache.open(folder, model(), tier)), expected)
    cache.save(tmp_path / "new")
    assert torch.equal(answer(LandmarkCache.open(tmp_path / "new", model(), tier)), expected)
    assert torch.equal(answer(cache), expected) and verify(tmp_path / "new") == []


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("how", ["saved", "opened"])
def test_a_folder_that_holds_another_memory(tier: str, how: str, tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    cache = known(folder, tier, how)
    expected = answer(cache)
    removed(folder)
    other = model().read(models.text(70, seed=5)[None])
    other.save(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert torch.equal(answer(cache), expected)
    with pytest.raises(
        ValueError,
        match=r"was written to since it was opened .*open it again, or save to a new folder",
    ):
        cache.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    cache.save(tmp_path / "new")
    assert torch.equal(answer(LandmarkCache.open(tmp_path / "new", model(), tier)), expected)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("first", [False, True])
def test_a_folder_that_cannot_be_written_to(
    number: int, first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "memory"
    cache = model().read(models.text(90)[None]) if first else known(folder, "disk", "opened")
    expected = answer(cache)
    real = Path.mkdir if first else os.open

    def refuse(path: Any, *arguments: Any, **more: Any) -> Any:
        if str(path).startswith(str(folder)) and (first or arguments[0] & os.O_CREAT):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(*(Path, "mkdir") if first else (os, "open"), refuse)
        before = (
            "nothing was committed before"
            if first
            else "what was committed before can be opened as it was"
        )
        with pytest.raises(
            ValueError,
            match=f"cannot write to '.*memory'.*writable or name another folder; {before}",
        ):
            cache.save(folder)
    assert torch.equal(answer(cache), expected)
    cache.save(folder)
    assert torch.equal(answer(LandmarkCache.open(folder, model())), expected)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", ["layer-00.blocks", "layer-01.sums", "text-ids"])
def test_a_file_that_was_cut_off_is_not_written_behind(
    tier: str, name: str, tmp_path: Path
) -> None:
    """Zeros would stand where blocks stood, and count."""
    folder = tmp_path / "memory"
    cache = known(folder, tier, "opened")
    expected = answer(cache)
    state = (folder / STATE).read_bytes()
    os.truncate(folder / name, 40)
    with pytest.raises(
        Damaged, match=rf"{name}: expected \d+ bytes, got 40; .*can be saved to a new folder"
    ):
        cache.save(folder)
    assert (folder / STATE).read_bytes() == state and (folder / name).stat().st_size == 40
    if tier == "device" or "blocks" not in name:
        cache.save(tmp_path / "new")
        assert torch.equal(answer(LandmarkCache.open(tmp_path / "new", model(), tier)), expected)
    else:
        with pytest.raises(Damaged, match=name):
            cache.save(tmp_path / "new")


@torch.no_grad()
def test_a_memory_that_loses_its_folder_while_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "memory"
    cache = known(folder, "disk", "opened")
    expected = answer(cache)

    def lose(kept: int) -> bytes:
        shutil.rmtree(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.save(folder, attachments={"lines": lose})
    cache.save(tmp_path / "new")
    assert torch.equal(answer(LandmarkCache.open(tmp_path / "new", model())), expected)
