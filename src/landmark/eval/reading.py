"""Reads a text into a memory chunk by chunk, so that it can be said how far it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor

from landmark.data.encoding import Progress
from landmark.hf.cache import LandmarkCache

Item = TypeVar("Item")


def read_reporting(
    model: Any,
    ids: Tensor,
    *,
    retrieve: bool,
    cache: LandmarkCache | None = None,
    progress: Progress | None = None,
) -> LandmarkCache:
    """Reads ``ids (B, T)`` as ``model.read`` does, in the same chunks.

    Args:
        model: a landmark model.
        ids: token ids on its device.
        retrieve: as for ``model.read``.
        cache: a memory to go on from, a new one for ``None``.
        progress: called before the first chunk and after each.

    Raises:
        ValueError: as ``model.read``.
    """
    if progress is None:
        return model.read(ids, cache=cache, retrieve=retrieve)  # type: ignore[no-any-return]
    length = ids.shape[1]
    chunk = model.landmark.chunk_tokens
    progress("tokens read", 0, length)
    for begin in range(0, max(1, length), chunk):
        cache = model.read(ids[:, begin : begin + chunk], cache=cache, retrieve=retrieve)
        progress("tokens read", min(length, begin + chunk), length)
    assert cache is not None
    return cache


def counted(what: str, items: Sequence[Item], progress: Progress | None) -> Iterator[Item]:
    """Yields items, and says before each how many are done."""
    for number, item in enumerate(items):
        if progress is not None:
            progress(what, number, len(items))
        yield item
