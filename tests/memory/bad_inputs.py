"""What the memory refuses: (name, call, what the message says). A call may take an empty folder."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import models
from landmark import LandmarkCache, LandmarkConfig

TEXT = models.text(60)[None]


def cache(tier: str = "device", **budgets: Any) -> LandmarkCache:
    return LandmarkCache(model(), tier, **budgets)


def model() -> Any:
    return models.landmark_model("llama", LandmarkConfig(block_size=5))


def no_room(folder: Path) -> None:
    """The system refuses files above a size."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, most[1]))
    try:
        model().read(TEXT, cache=cache("disk", spill_folder=folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)


def lost(folder: Path) -> LandmarkCache:
    """The folder goes after the cache was made."""
    (folder / "gone").mkdir()
    made = cache("disk", spill_folder=folder / "gone")
    (folder / "gone").rmdir()
    return made


def indexed(index: str = "faiss-flat", **settings: Any) -> LandmarkCache:
    return LandmarkCache(
        models.landmark_model("llama", LandmarkConfig(block_size=5, **settings)), index=index
    )


def without_faiss() -> None:
    with mock.patch.dict(sys.modules, {"faiss": None}):
        indexed()


CASES = [
    (
        "an unknown tier",
        lambda: cache("tape"),
        "tier: expected one of device, host, disk, got 'tape'",
    ),
    (
        "a budget of 0",
        lambda: cache("host", device_bytes=0),
        "device_bytes: expected .* at least 1, got 0",
    ),
    (
        "a budget in words",
        lambda: cache("host", host_bytes="1 GB"),
        "host_bytes: expected .* got '1 GB'",
    ),
    (
        "a device budget of no use",
        lambda: cache(device_bytes=10),
        "device_bytes: expected none for tier 'device'",
    ),
    (
        "a host budget of no use",
        lambda: cache(host_bytes=10),
        "host_bytes: expected none for tier 'device', got '10'",
    ),
    (
        "a folder of no use",
        lambda folder: cache("host", spill_folder=folder),
        "spill_folder: expected none for tier 'host'.*leave",
    ),
    (
        "a folder not there",
        lambda folder: cache("disk", spill_folder=folder / "none"),
        "folder that exists, got .*none",
    ),
    (
        "a budget below one block",
        lambda: model().read(TEXT, cache=cache("host", device_bytes=100)),
        "device_bytes: expected at least .* in each layer.*got 50",
    ),
    (
        "more than the host may hold",
        lambda: model().read(TEXT, cache=cache("host", host_bytes=1000)),
        "host_bytes: expected room .*tier='disk'",
    ),
    (
        "a folder that takes no files",
        lambda folder: model().read(TEXT, cache=lost(folder)),
        "no file can be made for blocks in .*No such file.* name another",
    ),
    ("a full disk", no_room, "no room for .* more bytes of blocks in .*make room"),
    (
        "an unknown index",
        lambda: indexed("annoy"),
        "index: expected one of exact, faiss-flat, .* got 'annoy'",
    ),
    (
        "an index without faiss",
        without_faiss,
        r"needs the package faiss: pip install landmark-attention\[index\]",
    ),
    (
        "an index for shared choices",
        lambda: indexed(granularity="head"),
        "granularity='token_head'.* got 'head'; set",
    ),
    (
        "an index by the token",
        lambda: indexed("faiss-ivf", granularity="token"),
        "'faiss-ivf'.*every landmark",
    ),
    (
        "an index for exact positions",
        lambda: indexed(positions="exact"),
        "positions='stingy'.* got 'exact'.*leave",
    ),
    (
        "an index where all is seen",
        lambda: indexed("faiss-hnsw", mode="all"),
        "mode='retrieval' .*nothing is chosen",
    ),
]
