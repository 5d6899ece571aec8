"""Copies of a cache: ``copy.copy`` and ``copy.deepcopy`` are forks on every tier; pickling is
refused in one line.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from landmark import LandmarkCache, LandmarkConfig

TIERS: dict[str, dict[str, Any]] = {
    "device": {"tier": "device"},
    "host": {"tier": "host"},
    "disk": {"tier": "disk"},
    "disk below host": {"tier": "disk", "host_bytes": 6000},
}
COPIES: dict[str, Callable[[LandmarkCache], LandmarkCache]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy of what holds it": lambda cache: copy.deepcopy({"prefix": [cache, 1]})["prefix"][0],
}
PICKLERS: dict[str, Callable[[Any], Any]] = {
    "pickle": pickle.dumps,
    "torch.save": lambda each: torch.save(each, io.BytesIO()),
    "multiprocessing": ForkingPickler.dumps,
}


def model(**settings: Any) -> Any:
    return models.landmark_model(
        "llama", LandmarkConfig(block_size=4, top_k=2, local_blocks=1, **settings)
    )


def made(tier: str, opened: bool, folder: Path, **settings: Any) -> LandmarkCache:
    """A memory of 90 tokens, opened from a folder or not."""
    if not opened:
        return model(**settings).read(
            models.text(90)[None], cache=LandmarkCache(model(**settings), **TIERS[tier])
        )
    model(**settings).read(models.text(90)[None]).save(folder)
    return LandmarkCache.open(folder, model(**settings), **TIERS[tier])


@torch.no_grad()
def logits(cache: LandmarkCache, seed: int) -> torch.Tensor:
    return model()(models.text(20, seed=seed)[None], past_key_values=cache).logits


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("opened", [False, True])
@torch.no_grad()
def test_a_copy_is_a_fork(tier: str, way: str, opened: bool, tmp_path: Path) -> None:
    """It goes on as a fork does, and neither it nor its origin writes into what the other reads."""
    cache = made(tier, opened, tmp_path / "memory")
    expected = [logits(cache.fork(), seed) for seed in (1, 2)]
    copied = COPIES[way](cache)
    assert copied.saved is None and all(
        ours.tables is theirs.tables
        for ours, theirs in zip(copied.layers_in_use(), cache.layers_in_use(), strict=True)
    )
    copied.crop(-30)
    model().read(models.text(60, seed=3)[None], cache=copied)
    assert torch.equal(logits(cache.fork(), 1), expected[0])
    copied = COPIES[way](cache)
    cache.crop(-30)
    model().read(models.text(60, seed=3)[None], cache=cache)
    assert torch.equal(logits(copied, 2), expected[1])
    assert copied.tokens == [110] and cache.tokens == [120]


@pytest.mark.parametrize("way", PICKLERS)
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("read", [False, True])
def test_pickling_is_refused_with_the_remedy(
    tier: str, way: str, read: bool, tmp_path: Path
) -> None:
    cache = made(tier, False, tmp_path) if read else LandmarkCache(model(), **TIERS[tier])
    for each in (cache, {"cache": cache}):
        with pytest.raises(
            ValueError, match=r"cannot be pickled.*cache\.save\(folder\).*\.open\(.*cache\.fork\(\)"
        ):
            PICKLERS[way](each)
